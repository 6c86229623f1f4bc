"""The page: one HTML file that loads nothing and runs nothing, and its pictures as files of their own."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from distill.explain.pictures import AGAINST, FOR, READ
from distill.explain.subject import Explained, Panel
from distill.runs import atomic, write_json

MODEL_COLUMNS = "minmax(320px, 1fr)"


def write_page(
    folder: Path,
    about: Mapping[str, Any],
    rows: Sequence[tuple[dict[str, Any], Image.Image | None, Mapping[str, Explained]]],
) -> dict[str, Any]:
    """Write ``explain.json``, ``explain.html`` and a PNG file a picture; return what the JSON file holds.

    Args:
        folder: where to; made if absent.
        about: JSON values on top: run, task, models, what is explained.
        rows: for each row what is known of it (``id``, ``true``, ``text``), its image, and each model's explanation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, shown = [], []
    for known, image, models in rows:
        pictures: dict[str, list[str]] = {}
        views = []
        for name, explained in models.items():
            panels = []
            for panel in explained.panels:
                data = None
                if panel.picture is not None:
                    file = f"row-{known['id']}-{name}-{panel.name}.png"
                    data = _save(panel.picture, folder / file)
                    pictures.setdefault(name, []).append(file)
                panels.append({"panel": panel, "data": data, "words": _tinted(panel)})
            views.append({"name": name, "numbers": explained.numbers, "panels": panels})
        picture = None if image is None else _save(image, folder / f"row-{known['id']}.png")
        shown.append({**known, "picture": picture, "models": views})
        answers = {name: {**explained.numbers, "pictures": pictures[name]} for name, explained in models.items()}
        written.append({**known, "models": answers})
    found = {**about, "rows": written}
    write_json(folder / "explain.json", found)
    environment = Environment(
        loader=PackageLoader("distill.explain"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=True,
    )
    content = environment.get_template("explain.html.j2").render(about=about, rows=shown, columns=MODEL_COLUMNS)
    with atomic(folder / "explain.html") as temporary:
        temporary.write_text(content, encoding="utf-8")
    return found


def _save(image: Image.Image, path: Path) -> str:
    """Write a picture, and return it as the address of an inline image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tinted(panel: Panel) -> list[dict[str, Any]]:
    """A panel's words with the colour behind them: rgba, more opaque where they count more."""
    tinted = []
    for word, value in panel.words:
        red, green, blue = READ if panel.read else FOR if value >= 0 else AGAINST
        tinted.append({"word": word, "colour": f"rgba({red},{green},{blue},{abs(value) * 0.7:.2f})", "value": value})
    return tinted
