"""Programs of ``torch.export`` (``.pt2``), which need torch and nothing of the code that made the model.

Such a file is a zip of JSON and raw tensors, but torch's reader also unpickles what a file asks it to, evaluates its
expressions of sizes as Python, and calls whatever function of torch a node names (seen in 2.14). So
:func:`read_program` first checks that a file asks for none of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distill.contracts import UserError
from distill.runtimes.base import Runtime, Tensors, checked, refused

if TYPE_CHECKING:
    from torch.export import ExportedProgram

GRAPH_FILE = "graph.json"
"""An extra file of the archive: the names, types and shapes of what goes in and comes out."""
EMPTY = "data/sample_inputs/model.pt"
"""A pickle, which :func:`distill.export.torch_program.export_program` leaves empty."""
FILES = re.compile(
    r"data/(weights/weight_\d+|constants/tensor_\d+|weights/model_weights_config\.json"
    rf"|constants/model_constants_config\.json)|models/model\.json|{re.escape(EMPTY)}"
    rf"|extra/{re.escape(GRAPH_FILE)}|archive_format|archive_version|\.data/(version|serialization_id)|version|byteorder"
)
"""All that a program's archive holds."""
PLAIN = {
    "target": re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|eq|ne|lt|le|gt|ge)"),
    "path_name": re.compile(r"weight_\d+|tensor_\d+"),
    "expr_str": re.compile(
        r"(Symbol\('s\d+'|(positive|integer)=True|s\d+|-?\d+|(Integer|Mul|Add|Mod|FloorDiv|Max|Min)\(|[,()+* -])+"
    ),
}
"""Key -> what its strings may be."""
SPECS = ("in_spec", "out_spec")
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
CODE = ("as_operator", "as_custom_obj", "as_graph", "opaque")
"""Keys of values that name functions or objects."""


class TorchProgram(Runtime):
    """A program of any number of rows and texts of one length, which shorter ones are padded to."""

    files, extra, package, needs_torch = ("model.pt2",), None, "torch", True

    def __init__(self, path: Path, graph: Mapping[str, Tensors], threads: int = 1) -> None:
        """Open a program; torch's number of threads is the process's, and is set. See :class:`Runtime`."""
        import torch

        self.tensors, self.threads, self.version = graph["inputs"], threads, metadata.version(self.package)
        self.inputs, self.outputs = list(graph["inputs"]), list(graph["outputs"])
        torch.set_num_threads(threads)
        try:
            self.module = read_program(path)[0].module()
        except UserError:
            raise
        except Exception as error:  # torch raises what its parsers raise
            raise refused(path, self, error) from error

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See :meth:`Runtime.run`."""
        import torch

        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in checked(self.tensors, feeds).values()]
        with torch.no_grad():
            found = self.module(*tensors)
        return {name: value.float().numpy() for name, value in zip(self.outputs, found, strict=True)}


def read_program(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    """Read a program after checking that torch will run no code from it.

    Returns:
        The program, and its ``inputs`` and ``outputs`` (name -> dtype and shape).

    Raises:
        UserError: the file holds more than JSON and tensors, or names functions other than operators.
    """
    import torch
    from torch.export.pt2_archive import PT2ArchiveReader

    reader = PT2ArchiveReader(str(path))  # torch's own: another one might read another file from the same bytes
    names = reader.get_file_names()
    for name in names:
        if not FILES.fullmatch(name):
            raise UserError(f"{path} holds {name!r}, which is no part of a plain program; export the bundle again")
    if EMPTY in names and reader.read_bytes(EMPTY):
        raise UserError(f"{path} holds pickled inputs, which could run code; export the bundle again")
    for name in names:
        if name.endswith(".json"):
            for key, value in _strings(json.loads(reader.read_bytes(name))):
                if not _plain(key, value):
                    raise UserError(f"{path} could run code: its {key} is {value!r}; export the bundle again")
    graph = json.loads(reader.read_bytes(f"extra/{GRAPH_FILE}"))
    return torch.export.load(path), graph


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of JSON objects with its value, at any depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield name, each
            yield from _strings(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each, key)


def _plain(key: str, value: Any) -> bool:
    if key in PLAIN:
        return isinstance(value, str) and PLAIN[key].fullmatch(value) is not None
    if key in SPECS:
        return all(each in CONTAINERS for name, each in _strings(json.loads(value)) if name == "type")
    return not (key in CODE or (key == "use_pickle" and value))
