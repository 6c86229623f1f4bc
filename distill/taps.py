"""What the taps of terms may name: each module of a model whose output is a tensor, with its shape.

Shapes come from one forward of the model, with initial weights where it has no others to load, on made-up inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.build import Model, example_batch, input_spec
from distill.check import check_parts
from distill.config import ModelConfig, Recipe, nearest
from distill.contracts import Batch, UserError
from distill.data.prepared import LABELS_FILE
from distill.data_config import Part
from distill.formats import TABULAR, TEXT
from distill.layouts import IMAGE, grid_of, layout_of, modality_of
from distill.losses.picks import read_models
from distill.losses.projectors import build_projector
from distill.losses.terms import FEATURES, LOSSES, one_modality, tap_paths
from distill.multimodal import evaluating
from distill.prune import check_names
from distill.runs import read_json
from distill.tapped import Tapped, tapped_tensor
from distill.targets import CAPTIONING, LAST, Task, tasks_from_json, unnamed
from distill.towers import frozen_towers
from distill.workspace import STUDENT, TEACHER, untrained

ROWS, LENGTH, CLASSES = 3, 7, 2  # of the made-up inputs; classes where nobody has counted them yet
KINDS = {"map_last": "map, channels last"}
ENCODERS = "encoders."
NAMED = {"fusion": 1, "unimodal_heads": 3}
"""Part of a model -> steps of a path that name it, where these are not 2 (``heads.TASK``)."""


@dataclass(frozen=True)
class Tap:
    """A module whose output a term may read.

    Attributes:
        path: what ``taps`` names.
        shape: of its output, a row.
        kind: vector, tokens, map, attention or other; of an image's tokens also how they lie.
        num_params: its parameters, those of modules inside it too.
        module: its class.
        inside: how many levels it lies inside a numbered layer of an encoder, or inside fusion, neck or head.
        trivial: it has no parameters and gives the shape it was given, as activations and dropout do.
    """

    path: str
    shape: list[int]
    kind: str
    num_params: int
    module: str
    inside: int
    trivial: bool


def inspect_models(
    recipe: Recipe, names: Sequence[str], encoders: Mapping[str, Callable[..., Any]], *, part: bool = False
) -> dict[str, Any]:
    """Build the models of a recipe and list their taps.

    Args:
        recipe: validated by its schema.
        names: "student", "teacher" or both.
        encoders: encoder type -> class.
        part: the model is a part alone, and the rest of the recipe is not its own.

    Returns:
        name -> ``num_params``, ``notes`` and ``taps``, or ``missing`` where weights are not there that say how one of
        two models is built.

    Raises:
        UserError: a part is wrong, or the only model asked for cannot be built.
    """
    found: dict[str, Any] = {}
    for name in names:
        config = getattr(recipe, name)
        counts, notes = _tasks(recipe, config, part=part)
        check_parts(config, name, encoders, recipe, list(counts))
        try:
            model = untrained(_without_weights(config, encoders), name, encoders, counts, recipe.data)
        except UserError as error:
            if len(names) == 1:
                raise
            found[name] = {"missing": str(error)}
            continue
        spec = input_spec(model)
        batch = example_batch(spec, recipe.data, rows=ROWS, length=min(LENGTH, spec.max_length))
        size, data = recipe.data.working_size, recipe.data
        described = {
            "image": f"images of {size} pixels",
            "video": f"clips of {data.video.frames} frames of {size} pixels",
            "audio": f"sounds of {data.audio.seconds:g} s at {data.audio.sample_rate} Hz",
            "series": f"series of {data.series.steps} steps",
            TABULAR: f"records of {len(data.columns(TABULAR))} columns",
        }
        inputs = [described[name] for name in spec.media]
        inputs += [f"texts of {batch.inputs[TEXT].shape[1]} tokens"] if spec.tokenizer else []
        notes = [f"shapes are those of {' and '.join(inputs)}", *notes]
        notes += [
            f"encoders.{bare} is built without its weights, which change no shape" for bare in _bare(config, encoders)
        ]
        for tower in frozen_towers(model) if name == TEACHER else ():
            notes.append(
                f"encoders.{tower} is frozen: its outputs are kept and its modules do not run beside a student; tap "
                f"encoders.{tower}, its tokens"
            )
        num_params = sum(parameter.numel() for parameter in model.parameters())
        found[name] = {"num_params": num_params, "notes": notes, "taps": list_taps(model, batch)}
    return found


def check_taps(recipe: Recipe, encoders: Mapping[str, Callable[..., Any]]) -> None:
    """Try the taps of the student's terms on untrained models, before a teacher is fitted for hours.

    Teachers of other runs are not looked at here.

    Raises:
        UserError: a model has no such module, it says nothing, or no projector brings two features together.
    """
    terms = [term for term in recipe.student.objective if term.taps and term.teachers == (None,)]
    if not terms:
        return
    said = {}
    for name in (STUDENT, TEACHER):
        model = _without_training(recipe, name, encoders)
        if model is None:
            return
        spec, paths = input_spec(model), tap_paths(terms, name)
        batch = example_batch(spec, recipe.data, rows=ROWS, length=min(LENGTH, spec.max_length))
        with evaluating(model):
            said[name] = Tapped(model, paths)(batch)
        for path in paths:
            if path not in said[name].features:
                raise UserError(
                    f"student.objective: tap {path!r} of the {name} says nothing, as its module does not run; `distill "
                    "inspect` lists those that do"
                )
    for term in terms:
        loss = LOSSES[term.loss]
        if loss.kind in FEATURES and loss.one_width:
            ours, theirs = read_models(term, loss, said[STUDENT], said[TEACHER])
            build_projector(term.name, ours, theirs, one_modality(term))


def check_pruned(recipe: Recipe, encoders: Mapping[str, Callable[..., Any]]) -> None:
    """Look for what ``prune`` names in an untrained student, before it is trained for hours.

    Raises:
        UserError: there is no such module, list of blocks or attention, or too few blocks.
    """
    config = recipe.prune
    if config.modules or config.ratios or config.depth or config.heads or config.head_dims:
        model = _without_training(recipe, STUDENT, encoders)
        if model is not None:
            check_names(model, config)


def _without_training(recipe: Recipe, name: str, encoders: Mapping[str, Callable[..., Any]]) -> Model | None:
    """The student or the teacher as it is built; None where its weights are not here yet."""
    config = getattr(recipe, name)
    tasks = _tasks(recipe, config, part=False)[0]
    try:
        return untrained(_without_weights(config, encoders), name, encoders, tasks, recipe.data)
    except UserError:
        return None


def list_taps(model: nn.Module, batch: Batch) -> list[Tap]:
    """The modules of a model that give a tensor with the batch's rows first: encoders, then what reads them."""
    found: dict[str, Tap] = {}

    def reader(path: str) -> Callable[[nn.Module, Any, object], None]:
        def read(module: nn.Module, args: Any, output: object) -> None:
            feature = tapped_tensor(output)
            if feature is None or not feature.is_floating_point() or feature.ndim < 2 or len(feature) != len(batch.ids):
                return
            found[path] = _tap(path, module, args[0] if args else None, feature)

        return read

    hooks = [module.register_forward_hook(reader(path)) for path, module in model.named_modules() if path]
    with evaluating(model):
        model(batch)
    for hook in hooks:
        hook.remove()
    in_order = [found[path] for path, _ in model.named_modules() if path in found]
    return sorted(in_order, key=lambda tap: not tap.path.startswith(ENCODERS))


def chosen(found: Mapping[str, Any], pattern: str, depth: int) -> dict[str, list[Tap]]:
    """Of each listed model, the taps whose path holds a text or matches a pattern with ``*``.

    Without a pattern, those that are not trivial down to a depth.

    Raises:
        UserError: the pattern matches none of any model.
    """
    listed: dict[str, list[Tap]] = {name: model["taps"] for name, model in found.items() if "taps" in model}
    if not pattern:
        return {name: [tap for tap in taps if not tap.trivial and tap.inside <= depth] for name, taps in listed.items()}
    whole = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    matching = {name: [tap for tap in taps if fnmatchcase(tap.path, whole)] for name, taps in listed.items()}
    if listed and not any(matching.values()):
        steps = {step for taps in listed.values() for tap in taps for step in tap.path.split(".") if not step.isdigit()}
        raise UserError(f"--filter {pattern!r}: no module path has this in it; {nearest(pattern, steps)}")
    return matching


def as_json(found: Mapping[str, Any], pattern: str, depth: int) -> dict[str, Any]:
    """The listing as JSON values, of the taps that are :func:`chosen`."""
    kept = chosen(found, pattern, depth)
    return {
        name: model | {"taps": [asdict(tap) for tap in kept[name]]} if name in kept else model
        for name, model in found.items()
    }


def render(found: Mapping[str, Any], pattern: str, depth: int) -> list[str]:
    """The listing as lines, of the taps that are :func:`chosen`."""
    lines: list[str] = []
    kept = chosen(found, pattern, depth)
    for name, model in found.items():
        if "missing" in model:
            lines.append(f"{name}: not listed: {model['missing']}")
            continue
        taps = kept[name]
        lines += [f"{name}: {model['num_params']:,} parameters", *(f"  ({note})" for note in model["notes"])]
        if pattern and not taps:
            lines.append(f"  no module path has {pattern!r} in it")
            continue
        cells = [(tap.path, "x".join(map(str, tap.shape)), f"{tap.num_params:,}", tap.kind) for tap in taps]
        head = ("tap", "shape a row", "parameters", "kind")
        wide = [max(len(row[column]) for row in (head, *cells)) for column in range(3)]
        lines += [
            f"  {row[0]:<{wide[0]}}  {row[1]:>{wide[1]}}  {row[2]:>{wide[2]}}  {row[3]}" for row in (head, *cells)
        ]
        more = len(model["taps"]) - len(taps)
        if more and not pattern:
            lines.append(f"  {more} more inside these: --depth {depth + 1}, or --filter TEXT")
    return lines


def _tap(path: str, module: nn.Module, given: object, feature: Tensor) -> Tap:
    num_params = sum(parameter.numel() for parameter in module.parameters())
    layout, modality = layout_of(feature, modality_of(path)), modality_of(path)
    kind = KINDS.get(layout, layout)
    grid = grid_of(feature, modality)
    if layout == "tokens" and modality == IMAGE and grid is not None:
        kind = f"tokens, {grid.height}x{grid.width}" + (f" behind {grid.before}" if grid.before else "")
    alike = isinstance(given, Tensor) and given.shape == feature.shape
    trivial = alike and not num_params and layout != "attention"
    return Tap(path, list(feature.shape[1:]), kind, num_params, type(module).__name__, _inside(path), trivial)


def _inside(path: str) -> int:
    steps = path.split(".")
    if path.startswith(ENCODERS):
        numbered = next((place for place, step in enumerate(steps) if step.isdigit()), len(steps))
        return max(0, len(steps) - 1 - numbered)
    owner = steps[2:] if steps[0] == "others" else steps  # of an ensemble's further members
    return max(0, len(owner) - NAMED.get(owner[0], 2))


def _tasks(recipe: Recipe, config: ModelConfig, *, part: bool) -> tuple[dict[str, Task], list[str]]:
    """The tasks, as far as anybody knows, and what to say of them; none of a model without heads."""
    if config.fusion is None:
        return {}, []
    labels = Path(recipe.output) / recipe.name / "data" / LABELS_FILE
    if not part and labels.is_file():
        return tasks_from_json(read_json(labels)), []
    tasks = list(config.heads or ({} if part else recipe.data.targets))
    if not tasks:
        terms = getattr(config, "objective", [])
        tasks = list(dict.fromkeys(str(term.task).partition(".")[0] for term in terms if term.task)) or ["task"]
    note = f"heads are shown with {CLASSES} classes: no run has counted those of the data yet"
    targets = recipe.data.targets
    kinds = {name: (targets[name].kind, targets[name].max_length) for name in tasks if name in targets}
    found = {name: unnamed(CLASSES, *kinds.get(name, ())) for name in tasks}
    written = {name: unnamed(LAST + CLASSES, task.kind, task.length) for name, task in found.items() if task.length}
    return found | {name: task for name, task in written.items() if task.kind == CAPTIONING}, [note]


def _without_weights(config: Any, encoders: Mapping[str, Callable[..., Any]]) -> Any:
    """The same model with initial weights wherever its builder can do without."""
    bare = _bare(config, encoders)
    parts = {
        name: Part(type=part.type, **{**part.params, **bare[name]})
        for name, part in config.encoders.items()
        if name in bare
    }
    return config.model_copy(update={"encoders": {**config.encoders, **parts}})


def _bare(config: ModelConfig, encoders: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Any]]:
    """Encoders that load weights only if they are told to, with what tells them not to."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in config.encoders.items():
        weights = inspect.signature(encoders[part.type]).parameters.get("weights")
        if part.params.get("pretrained"):
            found[name] = {"pretrained": False}
        elif part.params.get("weights") and weights is not None and weights.default is None:
            found[name] = {"weights": None}
    return found
