"""What a Core ML program means, computed by torch: Core ML itself runs on macOS alone, so this checks conversions here.

Each operation is computed as Apple's description of the MIL operators has it, in float32 whatever its precision; an
operation that is not listed is an error, so nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.libmilstoragepython import _BlobStorageReader
from coremltools.proto import Model_pb2
from torch import Tensor
from torch.nn import functional

from distill.runtimes.coreml import MODEL, WEIGHTS

DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
Inputs = dict[str, Any]


def _axes(given: Inputs) -> list[int]:
    return [int(axis) for axis in np.atleast_1d(given["axes"])]


def _gather(given: Inputs) -> Tensor:
    (axis,) = np.atleast_1d(given["axis"])
    indices = given["indices"].long()
    shape = (*given["x"].shape[:axis], *indices.shape, *given["x"].shape[axis + 1 :])
    return given["x"].index_select(int(axis), indices.flatten()).reshape(shape)


def _gather_nd(given: Inputs) -> Tensor:
    return given["x"][tuple(given["indices"].long().unbind(-1))]


def _max_pool(given: Inputs) -> Tensor:
    before = given["pad"].reshape(-1, 2).flip(0).flatten().tolist()
    padded = functional.pad(given["x"], before, value=float("-inf"))
    return functional.max_pool2d(padded, given["kernel_sizes"].tolist(), given["strides"].tolist())


def _avg_pool(given: Inputs) -> Tensor:
    assert not given["pad"].any()
    return functional.avg_pool2d(given["x"], given["kernel_sizes"].tolist(), given["strides"].tolist())


def _upsample(given: Inputs) -> Tensor:
    factors = (float(given["scale_factor_height"]), float(given["scale_factor_width"]))
    corners = bool(given["align_corners"])
    sizes = [int(size * factor) for size, factor in zip(given["x"].shape[2:], factors, strict=True)]
    return functional.interpolate(given["x"], sizes, mode="bilinear", align_corners=corners)


def _conv(given: Inputs) -> Tensor:
    before = given["pad"].reshape(-1, 2).flip(0).flatten().tolist()  # torch pads the last axis first
    padded = functional.pad(given["x"], before)
    call = {3: functional.conv1d, 4: functional.conv2d}[padded.ndim]
    stride, dilation = given["strides"].tolist(), given["dilations"].tolist()
    return call(padded, given["weight"], given.get("bias"), stride, 0, dilation, int(given["groups"]))


def _slice(given: Inputs) -> Tensor:
    x = given["x"]
    flags = {name: given.get(name, torch.zeros(x.ndim, dtype=torch.bool)) for name in ("begin_mask", "end_mask")}
    squeezed = given.get("squeeze_mask", torch.zeros(x.ndim, dtype=torch.bool))
    parts: list[Any] = []
    for axis in range(x.ndim):
        begin, end = int(given["begin"][axis]), int(given["end"][axis])
        stride = int(given["stride"][axis]) if "stride" in given else 1
        if squeezed[axis]:
            parts.append(begin)
            continue
        start, stop = (None if flags[f"{name}_mask"][axis] else at for name, at in (("begin", begin), ("end", end)))
        parts.append(slice(start, stop, stride))
    return torch.from_numpy(x.numpy()[tuple(parts)].copy())  # whose strides may be negative


def _split(given: Inputs) -> list[Tensor]:
    axis = int(given["axis"])
    if "split_sizes" in given:
        return list(given["x"].split(given["split_sizes"].tolist(), axis))
    return list(given["x"].chunk(int(given["num_splits"]), axis))


def _matmul(given: Inputs) -> Tensor:
    x, y = given["x"], given["y"]
    x = x.transpose(-1, -2) if given.get("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if given.get("transpose_y", False) else y)


def _pad(given: Inputs) -> Tensor:
    assert given["mode"] == "constant"
    pairs = given["pad"].reshape(-1, 2).flip(0).flatten().tolist()
    return functional.pad(given["x"], pairs, value=float(given["constant_val"]))


OPERATIONS: dict[str, Callable[[Inputs], Any]] = {
    "add": lambda g: g["x"] + g["y"],
    "avg_pool": _avg_pool,
    "cast": lambda g: g["x"].to(DTYPES[g["dtype"]]),
    "clip": lambda g: g["x"].clamp(float(g["alpha"]), float(g["beta"])),
    "concat": lambda g: torch.cat(g["values"], int(g["axis"])),
    "conv": _conv,
    "equal": lambda g: g["x"] == g["y"],
    "exp": lambda g: g["x"].exp(),
    "floor_div": lambda g: torch.div(g["x"], g["y"], rounding_mode="floor"),
    "expand_dims": lambda g: _expanded(g["x"], _axes(g)),
    "gather": _gather,
    "gather_along_axis": lambda g: g["x"].gather(int(g["axis"]), g["indices"].long()),
    "gather_nd": _gather_nd,
    "greater": lambda g: g["x"] > g["y"],
    "greater_equal": lambda g: g["x"] >= g["y"],
    "gelu": lambda g: functional.gelu(g["x"], approximate={"EXACT": "none"}[g["mode"]]),
    "layer_norm": lambda g: functional.layer_norm(
        g["x"], [g["x"].shape[axis] for axis in _axes(g)], g.get("gamma"), g.get("beta"), float(g["epsilon"])
    ),
    "less": lambda g: g["x"] < g["y"],
    "less_equal": lambda g: g["x"] <= g["y"],
    "log": lambda g: (g["x"] + float(g["epsilon"])).log(),
    "max_pool": _max_pool,
    "maximum": lambda g: torch.maximum(g["x"], g["y"]),
    "minimum": lambda g: torch.minimum(g["x"], g["y"]),
    "pow": lambda g: g["x"] ** g["y"],
    "reduce_argmax": lambda g: g["x"].argmax(int(g["axis"]), keepdim=bool(g["keep_dims"])).int(),
    "reduce_max": lambda g: g["x"].amax(_axes(g), keepdim=bool(g["keep_dims"])),
    "reduce_sum_square": lambda g: (g["x"] ** 2).sum(_axes(g), keepdim=bool(g["keep_dims"])),
    "rsqrt": lambda g: (g["x"] + float(g["epsilon"])).rsqrt(),
    "sqrt": lambda g: g["x"].sqrt(),
    "square": lambda g: g["x"] ** 2,
    "stack": lambda g: torch.stack(g["values"], int(g["axis"])),
    "upsample_bilinear": _upsample,
    "linear": lambda g: functional.linear(g["x"], g["weight"], g.get("bias")),
    "logical_and": lambda g: g["x"] & g["y"],
    "logical_not": lambda g: ~g["x"],
    "matmul": _matmul,
    "mul": lambda g: g["x"] * g["y"],
    "not_equal": lambda g: g["x"] != g["y"],
    "pad": _pad,
    "real_div": lambda g: g["x"] / g["y"],
    "reduce_mean": lambda g: g["x"].mean(_axes(g), keepdim=bool(g["keep_dims"])),
    "reduce_sum": lambda g: g["x"].sum(_axes(g), keepdim=bool(g["keep_dims"]), dtype=g["x"].dtype),
    "relu": lambda g: g["x"].relu(),
    "reshape": lambda g: g["x"].reshape(g["shape"].tolist()),
    "select": lambda g: torch.where(g["cond"], g["a"], g["b"]),
    "sigmoid": lambda g: g["x"].sigmoid(),
    "slice_by_index": _slice,
    "softmax": lambda g: g["x"].softmax(int(g["axis"])),
    "split": _split,
    "squeeze": lambda g: g["x"].squeeze(_axes(g)),
    "sub": lambda g: g["x"] - g["y"],
    "tanh": lambda g: g["x"].tanh(),
    "tile": lambda g: g["x"].tile(g["reps"].tolist()),
    "transpose": lambda g: g["x"].permute(g["perm"].tolist()),
}


def _expanded(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


class Program:
    """A package's program of one row."""

    def __init__(self, package: Path) -> None:
        spec = Model_pb2.Model.FromString((package.parent / MODEL).read_bytes())
        (function,) = spec.mlProgram.functions.values()
        self.block = function.block_specializations[function.opset]
        self.inputs = [value.name for value in spec.description.input]
        self.outputs = [value.name for value in spec.description.output]
        self.blobs = _BlobStorageReader(str(package.parent / WEIGHTS))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run rows one after the other: flags and whole numbers come as int32, as Core ML takes them."""
        rows = len(next(iter(feeds.values())))
        given = {
            name: feeds[name] if feeds[name].dtype == np.float32 else feeds[name].astype(np.int32) for name in feeds
        }
        found = [self._row({name: given[name][row : row + 1] for name in self.inputs}) for row in range(rows)]
        return {name: np.concatenate([each[name].numpy() for each in found]) for name in self.outputs}

    def _row(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        values: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()}
        for operation in self.block.operations:
            if operation.type == "const":
                values[operation.outputs[0].name] = self._value(operation.attributes["val"])
                continue
            given: Inputs = {}
            for key, argument in operation.inputs.items():
                read = [values[each.name] if each.WhichOneof("binding") == "name" else self._value(each.value)
                        for each in argument.arguments]  # fmt: skip
                given[key] = read if key == "values" else read[0]
            said = OPERATIONS[operation.type](given)
            said = said if isinstance(said, list) else [said]
            for output, value in zip(operation.outputs, said, strict=True):
                sizes = [size.constant.size for size in output.type.tensorType.dimensions]
                assert list(value.shape) == sizes, (operation.type, list(value.shape), sizes)
                values[output.name] = value
        return {name: values[name] for name in self.outputs}

    def _value(self, value: Any) -> Any:
        shape = [size.constant.size for size in value.type.tensorType.dimensions]
        kind = value.type.tensorType.dataType
        if value.WhichOneof("value") == "blobFileValue":
            offset = value.blobFileValue.offset
            if kind == 10:  # FLOAT16, as its bits
                bits = np.asarray(self.blobs.read_fp16_data(offset), np.uint16)
                return torch.from_numpy(bits.view(np.float16).astype(np.float32)).reshape(shape)
            assert kind == 11
            return torch.from_numpy(np.array(self.blobs.read_float_data(offset), np.float32)).reshape(shape)
        tensor = value.immediateValue.tensor
        if kind == 2:  # STRING
            return tensor.strings.values[0]
        if kind == 10:
            found = np.frombuffer(tensor.bytes.values, np.float16).astype(np.float32)
        elif kind == 11:
            found = np.array(tensor.floats.values, np.float32)
        elif kind == 1:
            found = np.array(tensor.bools.values, bool)
        else:
            found = np.array(tensor.ints.values, np.int32)
        return torch.from_numpy(found).reshape(shape)
