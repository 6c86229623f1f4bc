"""A program of one row as a LiteRT file, in float32 or int8.

int8 is ai-edge-quantizer's dynamic quantization: weights int8 per channel, embedding tables too, activations quantized
while the model runs, so that nothing is calibrated and inputs and outputs stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from distill.export.subprocesses import answer
from distill.export.torch_program import example_of, in_plain_layout, read_program
from distill.runtimes import RUNTIMES
from distill.runtimes.base import missing


def convert(source: Path, out: Path, *, feeds: str | None = None) -> dict[str, Any]:
    """Write a program as ``out``.

    Args:
        source: a program of one row, as :func:`distill.export.torch_program.export_program` writes it.
        out: the file to write.
        feeds: int8 where given; float32 without.

    Returns:
        ``inputs`` and ``outputs`` (name -> dtype and shape).

    Raises:
        UserError: a package is missing.
    """
    try:
        import litert_torch
        from ai_edge_quantizer import quantizer, recipe
    except ImportError as error:
        raise missing(RUNTIMES["litert"], error) from error
    program, graph = read_program(source)
    model = litert_torch.convert(in_plain_layout(program, graph).module(), example_of(graph))
    if feeds is None:
        model.export(str(out))
        return graph
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        model.export(str(path))
        chosen = quantizer.Quantizer(str(path))
        chosen.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        chosen.quantize().export_model(out, overwrite=True)
    return graph


if __name__ == "__main__":
    answer(convert)
