"""Each fusion block inside a model: exported for any subset of modalities, quantized, pruned, listed, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import test_prune
import torch
from export_models import as_feeds
from test_prune import outputs, real, settled, silenced
from tiny import make_batch, make_model
from torch import nn

from benchmarks import fusions as benchmark
from distill.bench import flops
from distill.config import PruneConfig, QuantizeConfig
from distill.contracts import Batch, Outputs, UserError
from distill.export.onnx import export_onnx, graph_inputs
from distill.fusion import FUSIONS
from distill.multimodal import MultimodalModel, Reader, evaluating
from distill.predict import EMBEDDING, open_session
from distill.prune import prune
from distill.quantization.common import WEIGHTED_OPERATORS
from distill.quantization.static import quantize_static
from distill.taps import list_taps
from distill.tasks import LinearHead

BLOCKS = benchmark.BLOCKS
PRUNED = {
    "concat",
    "gated",
    "convolutional",
    "tensor",
    "bottleneck",
    "perceiver",
    "cross_attention",
    "self_attention",
}  # have channels of their own to prune
DIM, EMBEDDED = 16, 16


class Several(nn.Module):
    """Blocks beside each other: the fused vector of each under its name."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(self, batch: Batch) -> Outputs:
        return Outputs({}, {name: model(batch).embeddings["fused"] for name, model in self.models.items()}, {})


def ensemble(tokenizer_file: Path) -> MultimodalModel:
    """Two encoders and a member for each block, whose embeddings lie side by side."""
    encoders = dict(make_model(tokenizer_file).encoders)
    widths = {name: encoder.out_dim for name, encoder in encoders.items()}
    parts = [(FUSIONS[kind](list(widths), DIM), {"kind": LinearHead(DIM, 3)}, {}) for kind in BLOCKS]
    options = {"dim": DIM, "embedding_dim": EMBEDDED}
    first, *others = parts
    return MultimodalModel(encoders, *first, others=[Reader(widths, *part, **options) for part in others], **options)


def graph_of(model: nn.Module, example: Batch, path: Path) -> Any:
    export_onnx(model, example, path)
    return open_session(path)


def answers(session: Any, batch: Batch) -> dict[str, np.ndarray]:
    feeds = {name: tensor.numpy() for name, tensor in graph_inputs(batch).items()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        (["weighted_sum", "low_rank", "mfb", "perceiver"], 4),
        *(pytest.param(BLOCKS, count, marks=pytest.mark.slow) for count in benchmark.COUNTS),
    ],
)
def test_one_graph_answers_for_every_subset_of_its_modalities(kinds: list[str], count: int, tmp_path: Path) -> None:
    """Several blocks in one export, as exporting is what takes time; the benchmark does each alone."""
    model = Several({kind: benchmark.fused(kind, count, DIM) for kind in kinds})
    session = graph_of(model, benchmark.inputs(count, DIM, seed=1), tmp_path / "model.onnx")
    with evaluating(model):
        for rows in (8, 1):
            for batch in benchmark.subsets(benchmark.inputs(count, DIM, rows=rows)):
                found, expected = answers(session, batch), model(batch).embeddings
                for kind in kinds:
                    np.testing.assert_allclose(
                        found[f"{EMBEDDING}{kind}"], expected[kind].numpy(), rtol=0, atol=1e-4, err_msg=kind
                    )


def test_the_table_is_made_of_what_was_measured(tmp_path: Path) -> None:
    found = benchmark.measure("weighted_sum", 2, DIM, tmp_path)
    assert found.parameters == 2 and found.difference < 1e-5 and found.torch_ms > 0 and found.onnxruntime_ms > 0
    text = benchmark.markdown([found], DIM, "python -m benchmarks.fusions")
    assert "| weighted_sum | 2 | 2 |" in text and all(len(line) <= 120 for line in text.splitlines())


def test_whole_models_are_exported_and_quantized(tmp_path: Path, wordpiece_file: Path) -> None:
    """Int8 reaches the layers of each block, and what it says is near what the model says."""
    model = ensemble(wordpiece_file)
    calibration = [make_batch(24, seed=seed) for seed in range(3)]
    with torch.no_grad():
        for batch in calibration:
            model.train()(batch)  # statistics of BatchNorm
    session = graph_of(model, make_batch(3), tmp_path / "model.onnx")
    quantize_static(tmp_path / "model.onnx", tmp_path / "int8.onnx", map(as_feeds, calibration), QuantizeConfig())
    quantized = open_session(tmp_path / "int8.onnx")
    batch = make_batch(24, seed=9)
    present = {"image": torch.arange(24) % 4 % 3 > 0, "text": torch.arange(24) % 4 < 2}  # each subset of the two
    batch = batch._replace(present=present)
    with evaluating(model):
        expected = model(batch).embeddings["fused"].numpy()
    exact, rounded = (answers(each, batch)[f"{EMBEDDING}fused"] for each in (session, quantized))
    np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-4)
    parts = zip(BLOCKS, *(np.split(values, len(BLOCKS), axis=1) for values in (expected, rounded)), strict=True)
    for kind, wanted, found in parts:
        cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosine.mean() > 0.97, (kind, cosine.mean())
    graph = onnx.load(tmp_path / "int8.onnx").graph
    whole = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    left = {node.name for node in graph.node if node.op_type in WEIGHTED_OPERATORS and not whole & set(node.input)}
    assert left and all(".attention/MatMul" in name for name in left)  # products of two activations


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("modules", [["encoders.image"], ["encoders.image", "fusion"], ["fusion"]])
def test_a_pruned_model_is_the_silenced_one(kind: str, modules: list[str]) -> None:
    torch.manual_seed(0)
    model = settled(real(FUSIONS[kind](["image", "text"], 32), unnormalised=True))
    config = PruneConfig(ratio=0.5, modules=modules)
    if modules == ["fusion"] and kind not in PRUNED:
        with pytest.raises(UserError, match="no channels can be pruned there; name other modules"):
            prune(model, test_prune.batch(), config)
        return
    pruned, made = prune(model, test_prune.batch(), config)
    expected = outputs(silenced(model, made))
    for key, value in outputs(pruned).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    cut = any(name.startswith("fusion.") for name in made.tensors)
    assert cut == (kind in PRUNED and "fusion" in modules)
    assert abs(made.report["channels"][1] / made.report["channels"][0] - 0.5) < 0.15


@pytest.mark.parametrize("kind", BLOCKS)
def test_taps_are_listed_and_operations_counted(kind: str, wordpiece_file: Path) -> None:
    model = make_model(wordpiece_file, fusion=kind, dim=DIM).eval()
    taps = {tap.path: tap for tap in list_taps(model, make_batch())}
    assert taps["fusion"].shape == [DIM] and taps["fusion"].kind == "vector"
    inside = sum(parameter.numel() for parameter in model.fusion.parameters())
    assert taps["fusion"].num_params == inside
    assert flops(model, make_batch(1)) > 0
