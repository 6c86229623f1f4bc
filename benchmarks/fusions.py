"""Each fusion block with two, three and four modalities: parameters, time, and how far its exported graph is from it.

A block is exported once for each number of modalities; what is present is told to the graph at run time, row by row.
Every subset of modalities takes its turn, and the difference is the largest that any of them shows.

    python -m benchmarks.fusions [--dim 64] [--markdown FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.seed_tables import add_outputs, command_line, put_out, table
from distill.contracts import Batch, Outputs
from distill.export.onnx import export_onnx, graph_inputs
from distill.fusion import FUSIONS
from distill.fusion.base import masked_mean
from distill.multimodal import evaluating
from distill.predict import EMBEDDING, open_session

LENGTHS = {"image": 16, "text": 9, "audio": 12, "series": 7}
COUNTS = (2, 3, 4)
ROWS, REPETITIONS = 8, 20
MAX_DIFFERENCE = 1e-4
BLOCKS = [name for name, block in FUSIONS.items() if not block.plain]


@dataclass(frozen=True)
class Found:
    """What was measured of a block.

    Attributes:
        fusion: its type.
        modalities: their number.
        parameters: of the block.
        torch_ms: median time of a forward of all rows, with everything present.
        onnxruntime_ms: the same of its graph.
        subsets: of modalities that were present, the empty one included.
        difference: the largest between torch and onnxruntime.
    """

    fusion: str
    modalities: int
    parameters: int
    torch_ms: float
    onnxruntime_ms: float
    subsets: int
    difference: float


class Fused(nn.Module):
    """A fusion block as a model, ``Batch -> Outputs``: inputs are tokens, and a pooled vector is their mean."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, batch: Batch) -> Outputs:
        """Return the fused vector, [B, dim]."""
        tokens = {name: batch.inputs[name] for name in batch.present}
        masks = {name: batch.inputs[f"{name}_mask"] for name in batch.present}
        pooled = {name: masked_mean(tokens[name], masks[name]) for name in tokens}
        return Outputs({}, {"fused": self.fusion(tokens, masks, pooled, batch.present)}, {})


def fused(kind: str, count: int, dim: int) -> Fused:
    """A block of so many modalities with random weights, those included that start at zero."""
    torch.manual_seed(0)
    model = Fused(FUSIONS[kind](list(LENGTHS)[:count], dim)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(count: int, dim: int, *, rows: int = ROWS, seed: int = 0) -> Batch:
    """Random tokens, some of them padding."""
    chance = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for name, length in list(LENGTHS.items())[:count]:
        values[name] = torch.randn(rows, length, dim, generator=chance)
        values[f"{name}_mask"] = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=chance)
    present = {name: torch.ones(rows, dtype=torch.bool) for name in list(LENGTHS)[:count]}
    return Batch(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), values, present, {})


def subsets(batch: Batch) -> Iterator[Batch]:
    """The same rows with each subset of their modalities, nothing included, and with a subset of its own each."""
    rows, names = len(batch.ids), list(batch.present)
    some = [set(chosen) for count in range(len(names) + 1) for chosen in combinations(names, count)]
    for chosen in some:
        yield batch._replace(present={name: torch.full((rows,), name in chosen) for name in names})
    own = [some[row % len(some)] for row in range(rows)]
    yield batch._replace(present={name: torch.tensor([name in chosen for chosen in own]) for name in names})


def milliseconds(work: Callable[[], object]) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for _ in range(REPETITIONS + 2):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return median(times[2:])


def measure(kind: str, count: int, dim: int, folder: Path) -> Found:
    """Export a block once and compare it with its graph for every subset of modalities."""
    model, path = fused(kind, count, dim), folder / f"{kind}-{count}.onnx"
    export_onnx(model, inputs(count, dim, seed=1), path)
    session, differences = open_session(path), []

    def run(batch: Batch) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in graph_inputs(batch).items()}
        return torch.from_numpy(session.run([f"{EMBEDDING}fused"], feeds)[0])

    batch = inputs(count, dim)
    with evaluating(model):
        for some in subsets(batch):
            differences.append(float((run(some) - model(some).embeddings["fused"]).abs().max()))
        torch_ms, onnxruntime_ms = milliseconds(lambda: model(batch)), milliseconds(lambda: run(batch))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Found(kind, count, parameters, torch_ms, onnxruntime_ms, 2**count, max(differences))


def markdown(found: Sequence[Found], dim: int, command: str) -> str:
    """What was measured as a table."""
    titles = ["fusion", "modalities", "parameters", "torch, ms", "onnxruntime, ms", "subsets", "largest difference"]
    rows = [
        [
            each.fusion,
            str(each.modalities),
            f"{each.parameters:,}",
            f"{each.torch_ms:.2f}",
            f"{each.onnxruntime_ms:.2f}",
            str(each.subsets),
            f"{each.difference:.1e}",
        ]
        for each in found
    ]
    lengths = ", ".join(f"{name} {length}" for name, length in LENGTHS.items())
    parts = [
        "# Fusion blocks",
        f"    {command}",
        f"Width {dim}, {ROWS} rows a forward, one thread; tokens: {lengths}.\n"
        "A block is exported once for a number of modalities, and told at run time which ones each row has.",
        table(titles, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; exit with 1 where a graph is further from its block than it may be."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dim", type=int, default=64, help="width of tokens and vectors (default: %(default)s)")
    add_outputs(parser)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fusions-") as name:
        found = [measure(kind, count, options.dim, Path(name)) for kind in BLOCKS for count in COUNTS]
    command = command_line("benchmarks.fusions", given)
    put_out(options, markdown(found, options.dim, command), {"dim": options.dim, "found": [asdict(f) for f in found]})
    if any(not each.difference < MAX_DIFFERENCE for each in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
