"""Checkpoints without pickle: safetensors for tensors, JSON for the rest, and always one that is whole.

A checkpoint is a folder: one ``GROUP.safetensors`` for each group of tensors, ``state.json``, and
``checkpoint.json`` with the sha256 of each file and of its own list, written last. :func:`save` builds it beside the
old one and swaps the two by renaming, so a crash at any moment leaves the old or the new one readable. The old one
stays in ``FOLDER.old`` until the next save, for damage that is found later: on disk lie two checkpoints, and three
during a save. :func:`load` finds the newest whole one, and changes nothing on disk, so that every rank may call it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.contracts import UserError
from distill.runs import atomic, read_json, room_for, sha256_file
from distill.sharding import split

MANIFEST = "checkpoint.json"
VERSION = 2
KERNELS = {"fused", "foreach"}  # of optimizers: how steps are computed, which may be another way where a run goes on
_ALIASES = "aliases"  # metadata of a safetensors file: names of tied tensors -> the name that holds the values

log = logging.getLogger(__name__)


def save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that the old one stays readable until the new one is whole and verified.

    Only one process may save to a folder at a time (rank 0).

    Args:
        folder: the checkpoint's folder; ``folder.new`` beside it is used on the way, ``folder.old`` is the one before.
        tensors: group ("model", "objective", "ema", ...) -> name -> tensor, any dtype, device and sharing.
        state: JSON values.

    Raises:
        DiskFullError: the disk is full; says how many bytes were needed.
        OSError: the disk cannot be written, or does not give back what was written.
            In both cases the old checkpoint is untouched.
    """
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    if not folder.exists() and new.exists() and not _damage(new):  # a save that died just before its last rename
        new.rename(folder)
    shutil.rmtree(new, ignore_errors=True)
    contents = {f"{group}.safetensors": _pack(members) for group, members in tensors.items()}
    contents["state.json"] = json.dumps(dict(state), indent=2, ensure_ascii=False).encode()
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    manifest = {"version": VERSION, "files": files, "sha256": _digest(files)}
    contents[MANIFEST] = json.dumps(manifest, indent=2).encode()
    with room_for(folder, sum(map(len, contents.values()))):
        try:
            _write_folder(new, contents)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            new.rename(folder)
            _flush_folder(folder.parent)
        except OSError:
            if folder.exists() or _damage(new):  # else the new one is whole, and the newest
                shutil.rmtree(new, ignore_errors=True)
            raise


def exists(folder: Path) -> bool:
    """Return whether :func:`load` has anything to try: not what is left of a first save that did not end."""
    finished = any((place / MANIFEST).is_file() for place in (folder, _sibling(folder, "old")))
    return finished or not _damage(_sibling(folder, "new"))


def remove(folder: Path) -> None:
    """Delete a checkpoint and what crashes left beside it; a half-deleted one is none."""
    for place in reversed(_places(folder)):
        (place / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the newest whole checkpoint, on the CPU; a damaged file that stands in its way is logged as a warning.

    Returns:
        What :func:`save` was given: the groups of tensors (tied ones share memory again), and the state.

    Raises:
        UserError: there is no checkpoint, or neither the checkpoint nor the one before it is whole.
    """
    problems: list[str] = []
    for place in _places(folder):
        problem = _damage(place)
        if problem is None:
            if problems:
                log.warning("%s; going on from the checkpoint before it", problems[0])
            names = read_json(place / MANIFEST)["files"]
            groups = [name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")]
            tensors = {group: read_tensors(place / f"{group}.safetensors") for group in groups}
            return tensors, read_json(place / "state.json")
        if place.exists() and place != _sibling(folder, "new"):  # a save that was killed leaves half of that one
            problems.append(problem)
    if exists(folder):
        what = f"{problems[0]}, and there is no whole one before it"
        raise UserError(f"checkpoint {folder} is damaged: {what}; delete it to start over")
    raise UserError(f"there is no checkpoint in {folder}; train first, or name the folder of another run")


def save_weights(weights: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """Write a module's state dict, or one, as one safetensors file, atomically; tied tensors are stored once."""
    data = _pack(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    with room_for(path, len(data)), atomic(path) as temporary:
        temporary.write_bytes(data)


def load_weights(module: nn.Module, path: Path, strict: bool = True) -> None:
    """Copy weights into a module from a file of :func:`save_weights`, or from any plain safetensors file.

    Args:
        module: built with the same architecture.
        path: the safetensors file.
        strict: refuse missing and unexpected names; shapes must agree in any case.

    Raises:
        UserError: the file is unreadable, or does not fit; the first name that differs is given.
    """
    tensors = read_tensors(path)
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if strict and missing:
        raise UserError(f"{path}: lacks {missing[0]!r} ({len(missing)} names in all); is it of another architecture?")
    if strict and unexpected:
        raise UserError(
            f"{path}: holds {unexpected[0]!r} ({len(unexpected)} names in all), which the model lacks; "
            "is it of another architecture?"
        )
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            raise UserError(
                f"{path}: {name!r} has shape {tuple(tensors[name].shape)}, the model's has "
                f"{tuple(expected[name].shape)}; is it of another architecture?"
            )
    module.load_state_dict(tensors, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file on the CPU; names tied at saving share memory again.

    Raises:
        UserError: the file is absent or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors: {' '.join(str(error).split())}") from error
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state dict into named tensors and JSON, without loss.

    Returns:
        Tensors, for a group of :func:`save`, and JSON values, for its state.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, {"state_dict": _encode(optimizer.state_dict(), "", tensors)}


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Give an optimizer the state that :func:`pack_optimizer` took: the next step is bit-identical.

    Raises:
        UserError: the optimizer has other parameter groups than the packed one.
    """
    try:
        state_dict = _decode(state["state_dict"], tensors)
        for group, own in zip(state_dict.get("param_groups", []), optimizer.param_groups, strict=False):
            group |= {key: own[key] for key in KERNELS & own.keys()}
        _split_states(optimizer, state_dict.get("state", {}))
        optimizer.load_state_dict(state_dict)
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer does not fit this one: {error}; start a new run") from error
    for parameter, kept in optimizer.state.items():  # files hold no strides, and fused kernels expect equal ones
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def rng_state() -> dict[str, Tensor]:
    """Return the states of torch's (CPU and CUDA), Python's and numpy's global generators as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one is meant)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{number}": value for number, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Set the generators to what :func:`rng_state` returned; CUDA devices that are absent here are left out."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), state["python.gauss"].item() if state["python.gauss"].numel() else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    words_and_place = ("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy.gauss"].item())
    np.random.set_state(words_and_place)  # noqa: NPY002
    for number in range(torch.cuda.device_count()):
        if f"cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{number}"], number)


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors, equal views of one memory once; safetensors itself refuses shared memory."""
    first: dict[tuple[Any, ...], str] = {}
    plain: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        plain[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return serialize(plain, metadata={_ALIASES: json.dumps(aliases)} if aliases else None)


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a nest of dicts, lists, tuples, scalars and tensors into JSON that keeps key types and tuples."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}/{key}".lstrip("/"), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _split_states(optimizer: Optimizer, states: dict[int, dict[str, Any]]) -> None:
    """Leave this rank's parts where parameters are in parts: of the states that have their shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        state = states.get(index, {})
        state |= {name: split(value, parameter) for name, value in state.items() if _alike(value, parameter)}


def _alike(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _places(folder: Path) -> tuple[Path, Path, Path]:
    return folder, _sibling(folder, "new"), _sibling(folder, "old")


def _damage(folder: Path) -> str | None:
    """Return which file of a checkpoint is bad and how; None if all are as the manifest says."""
    manifest = folder / MANIFEST
    try:
        content = read_json(manifest)
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
        if content["version"] != VERSION or content["sha256"] != _digest(content["files"]):
            return f"{manifest} is damaged"
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged"
    for name, (size, digest) in files.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or sha256_file(path) != digest:
            return f"{path} is damaged"
    return None


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in contents.items():
        _write(folder / name, data)
    _flush_folder(folder)
    if _damage(folder):
        raise OSError(f"{folder}: what was read back differs from what was written; the disk is failing")


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and writes its entries through
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
