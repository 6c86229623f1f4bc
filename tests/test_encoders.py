"""Every type of encoder in a whole model: taps, freezing, files, pruning and export; with ``-m slow -s`` as a table."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from big_checkpoints import write_audio
from safetensors.torch import save_file
from test_open_clip import SHAPE, STATISTICS, whole
from tiny import write_bert, write_clip

from distill.build import build_model, example_batch, input_spec, told_by_data
from distill.checkpoint import load_weights, save_weights
from distill.config import ModelConfig, PruneConfig
from distill.contracts import Batch, UserError
from distill.data_config import DataConfig
from distill.evaluate import feeds
from distill.export.onnx import export_onnx
from distill.multimodal import evaluating
from distill.pipeline import ENCODERS
from distill.predict import open_session
from distill.prune import apply, plan
from distill.tapped import Tapped
from distill.taps import list_taps
from distill.targets import unnamed

STAGES = {"widths": [8, 16], "blocks": [1, 1]}
WORDS = {"vocab_size": 80, "dim": 16, "max_length": 12}
PARAMS: dict[str, dict[str, Any]] = {
    "audio_convnet": STAGES,
    "audio_patches": {"dim": 16},
    "convnet": STAGES,
    "frame_convnet": STAGES,
    "image_patches": {"dim": 16},
    "open_clip_image": {"weights": "path:open_clip"},
    "open_clip_text": {"weights": "path:open_clip"},
    "pretrained_audio": {"weights": "path:audio"},
    "pretrained_text": {"weights": "path:bert", "max_length": 12},
    "pretrained_vision": {"weights": "path:clip"},
    "recurrent_text": WORDS | {"hidden": 8},
    "resnet_cifar": {"depth": 8, "widths": [4, 8, 8, 16]},
    "series_convnet": STAGES,
    "series_patches": {"dim": 16},
    "series_recurrent": {"dim": 16},
    "series_transformer": {"dim": 16, "heads": 2},
    "small_transformer": WORDS | {"heads": 2},
    "static_embeddings": WORDS,
    "tabular_mlp": {"dim": 16},
    "tabular_tokens": {"dim": 16},
    "text_cnn": WORDS | {"channels": 16},
    "text_tokens": WORDS,
    "timm": {"name": "test_resnet"},
    "torchvision": {"name": "resnet18", "weights": None, "size": 64},
}
DATA = DataConfig.model_validate(
    {
        "source": {"type": "table", "path": "rows.csv"},
        "modalities": {"tabular": ["a", "b", "c"], **{m: m for m in ("image", "text", "audio", "video", "series")}},
        "working_size": 32,
        "audio": {"sample_rate": 16000, "seconds": 0.25},
        "video": {"frames": 3},
        "series": {"channels": 2, "steps": 24},
        "tabular": {"categories": ["c"], "max_categories": 4},
    }
)


def test_every_type_has_an_example_and_says_what_it_reads():
    assert PARAMS.keys() == ENCODERS.keys()
    assert {ENCODERS[kind].reads for kind in PARAMS} == set(DATA.modalities)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Random checkpoints in their real formats."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_bert(folder / "bert")
    write_clip(folder / "clip")
    write_audio(folder / "audio", "wav2vec2")
    (folder / "open_clip").mkdir()
    settings = {"model_cfg": SHAPE, "preprocess_cfg": STATISTICS}
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(whole().state_dict(), folder / "open_clip" / "open_clip_model.safetensors")
    shutil.copy(folder / "bert" / "tokenizer.json", folder / "open_clip")
    return folder


def build(kind: str, folder: Path, **changes: Any) -> Any:
    """A model of one encoder, whose weights and statistics are not those of its start."""
    modality, params = ENCODERS[kind].reads, {**PARAMS[kind], **changes}
    if str(params.get("weights")).startswith("path:"):
        params["weights"] = f"path:{folder / params['weights'].removeprefix('path:')}"
    config = ModelConfig.model_validate(
        {"encoders": {modality: {"type": kind, **params}}, "fusion": {"type": "concat", "dim": 16}, "embedding_dim": 8}
    )
    given = told_by_data(config, ENCODERS, DATA)
    if "vocab_size" in params:
        given = {modality: {"tokenizer_file": folder / "bert" / "tokenizer.json"}}
    torch.manual_seed(0)
    model: Any = build_model(config, ENCODERS, {"kind": unnamed(3)}, "student", given)
    model.train()(example(model, rows=8))
    return model.eval()


def example(model: Any, rows: int = 3) -> Batch:
    return example_batch(input_spec(model), DATA, rows=rows, length=7)


def largest(ours: Any, theirs: Any) -> float:
    return max(float((ours.logits[name] - theirs.logits[name]).abs().max()) for name in ours.logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARAMS)
def test_an_encoder_from_its_config_to_its_graph(kind, checkpoints, tmp_path):
    began, modality = time.perf_counter(), ENCODERS[kind].reads
    model = build(kind, checkpoints)
    batch = example(model)
    taps = list_taps(model, batch)
    assert f"encoders.{modality}" in {tap.path for tap in taps}
    with evaluating(model):
        said = model(batch)
        tapped = Tapped(model, [f"encoders.{modality}"])(batch)
    assert tapped.features[f"encoders.{modality}"].ndim == 3

    save_weights(model, tmp_path / "model.safetensors")
    again = build(kind, checkpoints)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    load_weights(again, tmp_path / "model.safetensors")
    with evaluating(again):
        assert largest(said, again(batch)) == 0.0

    takes_freeze = "freeze" in ENCODERS[kind].__init__.__annotations__
    if takes_freeze:
        fixed = build(kind, checkpoints, freeze=True).train()
        tower = fixed.encoders[modality]
        assert not any(parameter.requires_grad for parameter in tower.parameters()) and tower.frozen

    export_onnx(model, batch, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx")
    (found,) = session.run(["kind"], dict(feeds(batch)))
    difference = float(np.abs(found - said.logits["kind"].numpy()).max())
    assert difference < 1e-4

    print(
        f"\n{kind:19} {modality:8} {sum(p.numel() for p in model.parameters()):>10,} parameters, {len(taps)} taps, "
        f"{'can be frozen' if takes_freeze else 'not frozen   '}, file 0.0, onnxruntime {difference:.0e}, "
        f"{pruned(model, batch, modality)} ({time.perf_counter() - began:.1f} s)"
    )


def pruned(model: Any, batch: Batch, modality: str) -> str:
    """What pruning to half makes of an encoder, or the sentence why it does not."""
    encoder = model.encoders[modality]
    if encoder.unprunable:
        return f"not pruned: {encoder.unprunable}"
    config = PruneConfig(ratio=0.5, round_to=1, modules=[f"encoders.{modality}"])
    try:
        made = plan(model, batch, config)
    except UserError as error:
        return f"not pruned: {error}"
    smaller = apply(copy.deepcopy(model), made)
    with evaluating(smaller):
        assert smaller(batch).logits["kind"].isfinite().all()
    before, after = made.report["channels"]
    assert after < before
    return f"pruned from {before} channels to {after}"
