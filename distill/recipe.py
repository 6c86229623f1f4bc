"""How a recipe is read: YAML, part files, overrides, then validation.

``data:``, ``teacher:`` and ``student:`` hold a mapping, or name a part file: a path relative to the recipe,
or a name among the packaged configs (``configs/teachers/NAME.yaml``). Paths of data, weights and other runs start
from the folder of the file that names them, those on the command line from the working directory; so do the data and
the runs that a packaged recipe names, as its own output lies there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from distill.config import Recipe, complaint, nearest, one_line, shortened
from distill.contracts import UserError

PARTS = {"data": "data", "teacher": "teachers", "student": "students"}
"""Part -> folder of its packaged files."""
QUICK_START, RECIPES = "quickstart", "recipes"
"""A packaged recipe, and the folder of those beside it."""
ANY_TASK = "*"
"""In a term of a file: each task of the data."""
LOCAL = "path:"
"""Begins the name of weights that lie in a folder."""
SAMPLE, HUB = "sample:", "hub:"
"""Begins the name of packaged data."""


def packaged_configs() -> Path:
    """Return the folder of the configs that come with the package (in a wheel, or in the checkout)."""
    inside = Path(str(resources.files("distill"))) / "configs"
    return inside if inside.is_dir() else Path(str(resources.files("distill"))).parent / "configs"


def load_recipe(path: str | Path, overrides: Sequence[str] = (), parts: dict[str, str] | None = None) -> Recipe:
    """Read a recipe, resolve its part files, apply ``a.b=c`` overrides and validate it.

    Args:
        path: a YAML file, or the name of a packaged recipe.
        overrides: dotted assignments, applied last; ``teacher=NAME`` names a part file.
        parts: part files that replace the recipe's ``data``, ``teacher`` or ``student``.

    Returns:
        The recipe; its paths of data and weights are absolute.

    Raises:
        UserError: one sentence naming file, key, what was expected, and the nearest allowed key.
    """
    file = _find(str(path), Path.cwd(), "")
    raw, files = _read(file), {"": file}
    assigned = dict(_split(item) for item in overrides)
    chosen = {key: value for key, value in (parts or {}).items() if value}
    chosen |= {key: assigned.pop(key) for key in PARTS if not assigned.get(key, "{").startswith("{")}
    for key, folder in PARTS.items():
        name = chosen.get(key, raw.get(key))
        if isinstance(name, str):
            files[key] = _find(name, Path.cwd() if key in chosen else file.parent, folder)
            raw[key] = _read(files[key])
    recipe = _validated(_on_each_task(_assigned(raw, assigned, file)), files)
    return _anchored(recipe, files, assigned)


def _on_each_task(raw: Any) -> Any:
    """Put terms on every task in the place of those on the task ``*``, or on a head of it: such parts fit any data."""
    data, teacher, student = (_mapping(raw, key) for key in PARTS)
    aware = _mapping(_mapping(_mapping(raw, "export"), "quantize"), "qat")
    for part, name in ((teacher, "objective"), (student, "baseline"), (student, "objective"), (aware, "objective")):
        if isinstance(part.get(name), list):
            part[name] = [one for term in part[name] for one in _each(term, data.get("targets"))]
    return raw


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    part = raw.get(key)
    return part if isinstance(part, dict) else {}


def _each(term: Any, tasks: Any) -> list[Any]:
    own, dot, head = str(term.get("task") if isinstance(term, dict) else "").partition(".")
    if own != ANY_TASK or not isinstance(tasks, dict) or not tasks:
        return [term]
    return [{**term, "task": f"{task}{dot}{head}"} for task in tasks]


def load_models(
    name: str, overrides: Sequence[str] = (), parts: dict[str, str] | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """Read a recipe, or a teacher's or student's part in the place of that of the quick start.

    Args:
        name: a recipe or such a part: a YAML file, or a packaged name.
        overrides: as of :func:`load_recipe`; those of a part begin with ``teacher.`` or ``student.`` too. A teacher's
            part may lack its objective, which builds nothing.
        parts: as of :func:`load_recipe`.

    Returns:
        The recipe, and which of its models are meant: both of a recipe, or the one that the part describes.

    Raises:
        UserError: as :func:`load_recipe`.
    """
    given = _part_of(name)
    if given is None:
        return load_recipe(name, overrides, parts), ("student", "teacher")
    key, bare = given
    without = ["teacher.objective=[]"] if key == "teacher" and bare else []
    return load_recipe(QUICK_START, [*without, *overrides], {**(parts or {}), key: name}), (key,)


def _part_of(name: str) -> tuple[str, bool] | None:
    """The key of a recipe that a file is the part of, and whether it lacks an objective; None where it is none."""
    for folder in ("", PARTS["teacher"], PARTS["student"]):
        try:
            raw = _read(_find(name, Path.cwd(), folder))
        except UserError:
            continue
        if "encoders" not in raw:
            return None
        return "student" if "baseline" in raw else "teacher", "objective" not in raw
    return None


def changed(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """Return a recipe with other values of some dotted keys, validated anew by its schema.

    Args:
        recipe: the recipe; its paths are absolute, and so are those of values.
        values: dotted key -> value, as overrides name them.
        where: what gives them, for the message.

    Raises:
        UserError: there is no such key, or its value is refused.
    """
    tree, whole = recipe.model_dump(exclude_unset=True), recipe.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        node, known = tree, whole
        for step in path:
            if step not in known or not isinstance(known[step], dict):
                raise UserError(
                    f"{where}: {key!r} leads nowhere, as there is no {step!r} with keys; {nearest(step, known)}"
                )
            known, node = known[step], node.setdefault(step, {})
        node[last] = value
    return _validated(tree, {"": Path(where)})


def as_yaml(recipe: Recipe) -> str:
    """Return a recipe with all its defaults as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump()))


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r} is not an assignment; write it as a.b=value")
    return key, value


def _assigned(raw: dict[str, Any], assigned: Mapping[str, str], file: Path) -> Any:
    """Apply assignments, whose values are YAML, and resolve references."""
    tree = OmegaConf.create(raw)
    for key, text in assigned.items():
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
            OmegaConf.update(tree, key, parsed["value"] if text else "", merge=False)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"override '{key}={text}' cannot be applied to {file}: {_first_line(error)}") from error
    try:
        return OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: a reference cannot be resolved: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]  # OmegaConf's further lines are about its own types


def _validated(plain: Any, files: dict[str, Path]) -> Recipe:
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise UserError(_explain(error, files)) from error


def _anchored(recipe: Recipe, files: dict[str, Path], assigned: Iterable[str]) -> Recipe:
    """Make the recipe's paths absolute, each from where it was written."""

    def base(*location: str) -> Path:
        dotted = ".".join(location)
        here = any(dotted == key or dotted.startswith(f"{key}.") for key in assigned)
        file = files.get(location[0], files[""])
        beside_output = location[0] in ("data", "teachers") and file.is_relative_to(packaged_configs())
        return Path.cwd() if here or beside_output else file.parent

    def absolute(value: Any, *location: str, prefix: str = "") -> Any:
        if isinstance(value, list):
            return [absolute(entry, *location, prefix=prefix) for entry in value]
        if not isinstance(value, str) or not value.startswith(prefix):
            return value
        return prefix + os.path.abspath(base(*location) / Path(value.removeprefix(prefix)).expanduser())

    tree = recipe.model_dump(exclude_unset=True)  # what the user wrote stays told apart from defaults
    source = tree["data"]["source"]
    for key in {"path", "root", "train", "valid", "test"} & source.keys():
        if not str(source[key]).startswith((SAMPLE, HUB)) and "://" not in str(source[key]):
            source[key] = absolute(source[key], "data", "source", key)
    for model in ("teacher", "student"):
        for name, part in tree[model]["encoders"].items():
            if "weights" in part:
                part["weights"] = absolute(part["weights"], model, "encoders", name, "weights", prefix=LOCAL)
    for name, other in tree.get("teachers", {}).items():
        other["run"] = absolute(other["run"], "teachers", name, "run")
    return Recipe.model_validate(tree)


def _find(name: str, base: Path, folder: str) -> Path:
    suffixed = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    packaged = [packaged_configs() / place for place in ([folder] if folder else ["", RECIPES])]
    for candidate in (base / name, base / suffixed, base / folder / suffixed, *(at / suffixed for at in packaged)):
        if candidate.is_file():
            return candidate
    known = [file.stem for at in packaged for file in at.glob("*.yaml")]
    what = folder.removesuffix("s") or "recipe"
    raise UserError(f"no {what} file {name!r} in {base} or among the packaged ones; {nearest(name, known)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected a mapping of keys, found a {type(raw).__name__}")
    return {str(key): value for key, value in raw.items()}


def _explain(error: ValidationError, files: dict[str, Path]) -> str:
    """Turn pydantic's first problem into one sentence."""
    problem, more = error.errors()[0], error.error_count() - 1
    where = ".".join(str(step) for step in problem["loc"] if not str(step).startswith("="))  # which tags of unions do
    file = files.get(str(problem["loc"][0]), files[""])
    rest = f" (and {more} more)" if more else ""
    if problem["type"] == "extra_forbidden":
        section = _section(problem["loc"][:-1])
        known = [field.alias or name for name, field in section.model_fields.items()]
        return f"{file}: unknown key {where!r}; {nearest(str(problem['loc'][-1]), known)}{rest}"
    if problem["type"] == "missing":
        return f"{file}: {where!r} is missing; add it{rest}"
    return f"{file}: {where!r} is {shortened(problem['input'])}: {complaint(problem)}{rest}"


def _section(loc: Sequence[int | str]) -> type[BaseModel]:
    """Find the schema class at a location, through dicts, lists and optionals."""
    current: Any = Recipe
    for step in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(step)].annotation
        else:  # a dict or list entry
            current = get_args(current)[-1]
        while not isinstance(current, type) and type(None) in get_args(current):
            current = next(a for a in get_args(current) if a is not type(None))
    return current
