"""Does a bundle say here what its source said? It answers the rows that it brings, on its own runtime; without torch.

Bundles bring rows where the system that wrote them could not run them (``export.check_rows``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill.contracts import UserError
from distill.predict import CHECK_FILE, EMBEDDING, INPUT, OUTPUT, load
from distill.runtimes import CPU
from distill.targets import CAPTIONING

CLOSE, CLOSE_HALF = 1e-2, 5e-2
"""Difference of a number, relative to the source's largest: of fp32 as the gate allows, and of other precisions."""
UNDECIDED = 1
"""Captions that may differ: a word that is undecided is no mistake."""


class VerificationError(RuntimeError):
    """A bundle says something else than its source."""


def verify_answers(folder: str | Path, *, threads: int = 1, provider: str = CPU) -> dict[str, Any]:
    """Load a bundle, run it on the rows that it brings, and compare with its source's answers.

    Args:
        folder: the bundle.
        threads: threads inside an operator.
        provider: of onnxruntime; see :func:`~distill.predict.load`.

    Returns:
        ``bundle``, ``runtime``, ``device``, ``rows``, and ``outputs``: name -> ``max_difference``, ``relative`` (to the
        source's largest number, at least 1) and ``agreement``, the share of rows with the same largest number, or the
        same caption. Of a bundle without rows 0 and none: its files and model were checked all the same.

    Raises:
        UserError: as :func:`~distill.predict.load`, or the rows are not the model's.
        VerificationError: a number is not finite or too far from the source's, or captions differ.
    """
    folder = Path(folder)
    predictor = load(folder, threads=threads, provider=provider)
    rows = _read_rows(folder / CHECK_FILE) if CHECK_FILE in predictor.info["files"] else {}
    feeds = {name.removeprefix(INPUT): value for name, value in rows.items() if name.startswith(INPUT)}
    said = {name.removeprefix(OUTPUT): value for name, value in rows.items() if name.startswith(OUTPUT)}
    found = predictor.run(feeds) if feeds else {}
    close = CLOSE if predictor.info["info"].get("precision") == "fp32" else CLOSE_HALF
    outputs = {}
    for name, expected in said.items():
        if name not in found or found[name].shape != expected.shape:
            raise UserError(f"{folder / CHECK_FILE} is of another model ({name}); export the bundle again")
        flag = feeds.get(f"{name.removeprefix(EMBEDDING)}_present", np.ones(len(expected), bool))
        task = predictor.tasks.get(name)
        captions = task is not None and task.kind == CAPTIONING
        outputs[name] = _compared(name, found[name][flag], expected[flag], close, captions=captions)
    runtime = f"{predictor.info['runtime']} {predictor.runtime.version}"
    count = len(next(iter(said.values()), ()))
    device = predictor.runtime.device
    return {"bundle": predictor.info["name"], "runtime": runtime, "device": device, "rows": count, "outputs": outputs}


def _read_rows(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); export the bundle again") from error


def _compared(
    name: str, found: NDArray[Any], expected: NDArray[Any], close: float, *, captions: bool
) -> dict[str, float]:
    """Compare [N, ...] with [N, ...]."""
    if not len(expected):
        return {"max_difference": 0.0, "relative": 0.0, "agreement": 1.0}
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    same = (found == expected).all(axis=1) if captions else found.argmax(axis=1) == expected.argmax(axis=1)
    relative = difference / max(1.0, float(np.abs(expected).max()))
    if captions and (~same).sum() > UNDECIDED:
        raise VerificationError(f"output {name!r}: {(~same).sum()} of {len(same)} captions are not the source's")
    if not captions and not relative <= close:  # NaN too
        raise VerificationError(
            f"output {name!r} differs from the source's by {difference:.4g}, {relative:.2g} of the largest number; "
            f"{close:.2g} is allowed"
        )
    return {"max_difference": difference, "relative": relative, "agreement": float(same.mean())}
