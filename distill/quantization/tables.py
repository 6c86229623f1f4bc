"""Embedding tables as int8 rows with a scale each: only the rows that a text looks up are ever dequantized.

They are most of a small text model's bytes.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

MIN_TABLE_ELEMENTS = 2**14
"""Smaller tables are left alone: the extra operators would cost more than the bytes saved."""

PARTS = ("int8", "scale")
"""What a quantized table consists of."""


def lookups(graph: GraphProto, keep_float: Collection[str] = ()) -> dict[str, list[NodeProto]]:
    """Return the float tables that can become integers -> the nodes that look rows up in them.

    A table that anything else than a lookup reads, too, is none; nor one of which a lookup is to stay in float.

    Args:
        graph: any.
        keep_float: names of nodes.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer if _is_table(tensor)}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input) & tables.keys():
            readers.setdefault(name, []).append(node)
    return {
        name: nodes
        for name, nodes in readers.items()
        if all(_is_lookup(node, name) and node.name not in keep_float for node in nodes)
    }


def quantize_tables(graph: GraphProto, keep_float: Collection[str] = ()) -> int:
    """Replace float embedding tables [V, D] by int8 rows and one float16 scale a row, in place.

    ``Gather(table, ids)`` becomes ``Cast(Gather(int8 table, ids)) * Cast(Gather(scales, ids))``: rows are
    dequantized after the lookup.

    Args:
        graph: any.
        keep_float: names of lookups whose table stays as it is.

    Returns:
        The number of lookups that were replaced.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer}
    replacements: dict[str, list[NodeProto]] = {}
    for name, nodes in lookups(graph, keep_float).items():
        arrays = quantize_rows(numpy_helper.to_array(tables[name]))
        graph.initializer.remove(tables[name])
        graph.initializer.extend(
            numpy_helper.from_array(array, f"{name}/{part}") for array, part in zip(arrays, PARTS, strict=True)
        )
        replacements.update({node.output[0]: _lookup(node, name) for node in nodes})
    nodes = [new for node in graph.node for new in replacements.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    return len(replacements)


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Return int8 values [V, D] and float16 scales [V, 1] whose product is near the table [V, D].

    The scale is rounded to float16 first, upwards, so that its rounding adds no error and nothing is clipped.
    """
    exact = np.abs(table).max(axis=1, keepdims=True).astype(np.float64) / 127  # of the smallest floats this is above 0
    scales = exact.astype(np.float16)
    scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    return np.rint(table / divisor).astype(np.int8), scales


def _is_table(tensor: TensorProto) -> bool:
    return (
        tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and tensor.dims[0] * tensor.dims[1] >= MIN_TABLE_ELEMENTS
    )


def _is_lookup(node: NodeProto, table: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == table and axis == 0


def _lookup(node: NodeProto, table: str) -> list[NodeProto]:
    """The nodes that replace a Gather of a float table."""
    indices, output = node.input[1], node.output[0]
    nodes: list[NodeProto] = []
    for part in PARTS:  # a slash keeps clear of the quantizer's own names, such as OUTPUT_scale
        gathered, real = f"{output}/{part}", f"{output}/{part}_float"
        nodes.append(helper.make_node("Gather", [f"{table}/{part}", indices], [gathered], f"{node.name}_{part}"))
        nodes.append(helper.make_node("Cast", [gathered], [real], f"{node.name}_{part}_cast", to=TensorProto.FLOAT))
    factors = [f"{output}/{part}_float" for part in PARTS]
    return [*nodes, helper.make_node("Mul", factors, [output], f"{node.name}_dequantize")]
