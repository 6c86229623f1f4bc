"""A pruning plan: what remains of a model, as JSON that any model of the same architecture can be cut by.

The same call prunes trained weights, and rebuilds the small architecture before ``load_weights`` reads them. It needs
the plan alone, not the package that found it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.contracts import UserError
from distill.runs import read_json, write_json

FORMAT, VERSION = "multidistill pruning plan", 2
TOKEN_ROWS = "token_rows"
"""The attribute that came with version 2: who does not know it would feed other ids. Plans without are of version 1."""
Cuts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PrunePlan:
    """What remains of a model. All names are those of the unpruned one.

    Attributes:
        tensors: state-dict name -> dimension (as a string, for JSON) -> ``{"of": old size, "kept": [indices]}``.
        attributes: module path -> plain attribute -> new value (``in_channels``, ``normalized_shape``, ``heads``,
            ``token_rows``...).
        removed: path of a list of blocks -> ``{"of": old length, "gone": [indices]}``.
        report: ``parameters``, ``flops`` (a row; a multiply-add is two), and ``channels``, ``heads``, ``head_dims``,
            ``blocks`` and ``tokens`` (of what may be pruned, where that was asked for), each ``[before, after]``;
            ``sensitivity``, the scan that chose ratios: see :mod:`distill.prune.sensitivity`.
    """

    tensors: dict[str, Cuts] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: Cuts = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the plan as JSON, with the hash that :meth:`load` checks."""
        version = VERSION if any(TOKEN_ROWS in values for values in self.attributes.values()) else 1
        content = {"format": FORMAT, "version": version, **asdict(self)}
        write_json(path, {**content, "sha256": _sha256(content)})

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            UserError: the file is absent, truncated or no plan, was changed after it was written, or is of a later
                version.
        """
        try:
            content = read_json(path)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            if content["version"] > VERSION:
                raise UserError(
                    f"{path}: this pruning plan has version {content['version']}, and {VERSION} is read here; "
                    "use the later multidistill that wrote it, or prune again"
                )
            if content.pop("sha256") != _sha256(content):
                raise UserError(
                    f"{path}: this pruning plan was changed after it was written, as its sha256 says; prune again"
                )
            return cls(**{name: value for name, value in content.items() if name not in ("format", "version")})
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: not readable as a pruning plan: {reason}; prune again") from error

    def original(self, name: str) -> str:
        """Return the unpruned model's name of a module or tensor of the pruned one, whose blocks count anew."""
        found: list[str] = []
        for part in name.split("."):
            cut = self.removed.get(".".join(found))
            found.append(str(_left(cut)[int(part)]) if cut and part else part)
        return ".".join(found)

    def renamed(self, name: str) -> str | None:
        """Return the pruned model's name of a module of the unpruned one; None where it lies in a removed block."""
        parts = name.split(".")
        found = []
        for place, part in enumerate(parts):
            cut = self.removed.get(".".join(parts[:place]))
            if cut and int(part) in cut["gone"]:
                return None
            found.append(str(_left(cut).index(int(part))) if cut else part)
        return ".".join(found)

    def lost(self, name: str, dim: int) -> int:
        """Return how many indices a tensor, named as in the pruned model, has lost."""
        cut = self.tensors.get(self.original(name), {}).get(str(dim))
        return cut["of"] - len(cut["kept"]) if cut else 0

    def since(self, before: PrunePlan) -> PrunePlan:
        """Return what this plan does to a model that was pruned by an earlier one, which it goes on from.

        ``compose(before, plan.since(before))`` is the plan again.
        """
        tensors: dict[str, Cuts] = {}
        for name, cuts in self.tensors.items():
            now, known = before.renamed(name), before.tensors.get(name, {})
            inner = {dim: _relative(cut, known[dim]) if dim in known else cut for dim, cut in cuts.items()}
            inner = {dim: cut for dim, cut in inner.items() if len(cut["kept"]) < cut["of"]}
            if now is not None and inner:
                tensors[now] = inner
        removed = {}
        for path, cut in self.removed.items():
            left = _left(before.removed.get(path, {"of": cut["of"], "gone": []}))
            gone = [place for place, index in enumerate(left) if index in cut["gone"]]
            now = before.renamed(path)
            if now is not None and gone:
                removed[now] = {"of": len(left), "gone": gone}
        here = {path: before.renamed(path) for path in self.attributes}
        attributes = {now: dict(self.attributes[path]) for path, now in here.items() if now is not None}
        return PrunePlan(tensors, attributes, removed, self.report)


def apply(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """Cut a model's tensors, set its sizes and take out its removed blocks, in place.

    Make optimizers afterwards: cut parameters are new objects.

    Args:
        model: as large as the one that was planned for; its weights may be anything.
        plan: from :func:`distill.prune.plan` or :meth:`PrunePlan.load`.

    Returns:
        The same model.

    Raises:
        UserError: the plan is for another architecture, or was applied before; the model is untouched.
    """
    owners, before = dict(model.named_modules()), model.state_dict()
    _check(plan, owners, {name: tuple(tensor.shape) for name, tensor in before.items()})
    for name, cuts in plan.tensors.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(owners[path], leaf)
        new = old.detach()
        for dim, cut in cuts.items():
            new = new.index_select(int(dim), torch.tensor(cut["kept"], device=new.device))
        setattr(owners[path], leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for path, values in plan.attributes.items():
        for attribute, value in values.items():
            setattr(owners[path], attribute, tuple(value) if isinstance(value, list) else value)
    for path, cut in plan.removed.items():
        blocks: Any = owners[path]
        for index in sorted(cut["gone"], reverse=True):
            del blocks[index]
    return model


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """Return the plan that does at once what two do one after the other.

    Args:
        first: of the unpruned model.
        second: of the model that the first leaves.

    Raises:
        UserError: the second is not for what the first leaves.
    """
    tensors = {name: dict(cuts) for name, cuts in first.tensors.items()}
    for name, cuts in second.tensors.items():
        mine = tensors.setdefault(first.original(name), {})
        for dim, cut in cuts.items():
            mine[dim] = _within(mine[dim], cut, name) if dim in mine else cut
    attributes = {path: dict(values) for path, values in first.attributes.items()}
    for path, values in second.attributes.items():
        attributes.setdefault(first.original(path), {}).update(values)
    removed = dict(first.removed)
    for path, cut in second.removed.items():
        name = first.original(path)
        if name in removed:
            left = _left(removed[name])
            gone = [*removed[name]["gone"], *(left[index] for index in cut["gone"])]
            cut = {"of": removed[name]["of"], "gone": sorted(gone)}
        removed[name] = cut
    lost = [f"{path}.{index}." for path, cut in removed.items() for index in cut["gone"]]
    tensors, attributes, removed = (
        {name: value for name, value in part.items() if not f"{name}.".startswith(tuple(lost))}
        for part in (tensors, attributes, removed)
    )
    return PrunePlan(tensors, attributes, removed, _joined(first.report, second.report))


def _within(outer: dict[str, Any], inner: dict[str, Any], name: str) -> dict[str, Any]:
    if inner["of"] != len(outer["kept"]):
        raise UserError(f"pruning plans: {name!r} has {len(outer['kept'])} left, and the next expects {inner['of']}")
    return {"of": outer["of"], "kept": [outer["kept"][index] for index in inner["kept"]]}


def _relative(cut: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What is kept of that which an earlier cut has kept."""
    places = {index: place for place, index in enumerate(before["kept"])}
    return {"of": len(places), "kept": [places[index] for index in cut["kept"]]}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Reports of two plans: pairs go from the first's beginning to the second's end."""
    pairs = {
        name: [first[name][0], value[1]] for name, value in second.items() if name in first and isinstance(value, list)
    }
    return first | second | pairs


def _left(cut: dict[str, Any]) -> Sequence[int]:
    """Old indices of the blocks that stay, in order."""
    return [index for index in range(cut["of"]) if index not in cut["gone"]]


def _check(plan: PrunePlan, owners: dict[str, nn.Module], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, cuts in plan.tensors.items():
        sizes = {int(dim): cut["of"] for dim, cut in cuts.items()}
        found = shapes.get(name, ())
        if any(dim >= len(found) or found[dim] != size for dim, size in sizes.items()):
            raise UserError(
                f"pruning plan: {name!r} is {found or 'absent'}, expected sizes {sizes}; "
                "build the model it was made for"
            )
    for path, cut in plan.removed.items():
        blocks = owners.get(path)
        found_blocks = len(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else "absent"
        if found_blocks != cut["of"]:
            raise UserError(
                f"pruning plan: {path!r} has blocks {found_blocks}, expected {cut['of']}; "
                "build the model it was made for"
            )


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
