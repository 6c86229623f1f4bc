"""The models of :mod:`benchmarks.compress`: random weights of a seed, since speed and faithfulness need no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel

from distill import pipeline, prune
from distill.build import Model, build_model
from distill.config import ModelConfig, PruneConfig
from distill.contracts import CLEAN_VIEW, Batch
from distill.data_config import DataConfig
from distill.targets import Task, unnamed

CLASSES, LENGTH = 20, 32
"""Classes of the only task, and tokens of all texts."""
BERT_VOCABULARY, WORDS = 30_522, 8_600


@dataclass(frozen=True)
class Spec:
    """A model.

    Attributes:
        about: what it is, for the table.
        encoders: modality -> part of a recipe; ``BERT`` stands for the folder of random weights.
        fusion: part of a recipe; None for a dual encoder.
        size: pixels of images.
        attends: whether it has attention heads to cut.
    """

    about: str
    encoders: Mapping[str, Mapping[str, Any]]
    fusion: Mapping[str, Any] | None
    size: int = 224
    attends: bool = False

    @property
    def cut(self) -> PruneConfig:
        """Half of the channels and of the attention heads, by magnitude."""
        parts = ["encoders", "fusion"] if self.fusion else ["encoders"]
        return PruneConfig(ratio=0.5, heads=0.5 if self.attends else 0.0, round_to=8, modules=parts)


def _timm(name: str) -> dict[str, Any]:
    return {"type": "timm", "name": name}


def _bert(name: str) -> dict[str, Any]:
    return {"type": "pretrained_text", "weights": name, "freeze": False, "max_length": LENGTH}


BERTS = {"bert_small": (512, 4, 8, BERT_VOCABULARY), "bert_256": (256, 4, 4, WORDS)}
"""Name -> width, layers, heads, tokens: BERT-small (Turc et al. 2019, arXiv 1908.08962), and a student's."""
CONCAT = {"type": "concat", "dim": 128}
MOBILE = _timm("mobilenetv4_conv_small")
MODELS = {
    "mobilenetv4": Spec("timm mobilenetv4_conv_small", {"image": MOBILE}, CONCAT),
    "resnet18": Spec("timm resnet18", {"image": _timm("resnet18")}, CONCAT),
    "vit_tiny": Spec("timm vit_tiny_patch16_224", {"image": _timm("vit_tiny_patch16_224")}, CONCAT, attends=True),
    "bert_small": Spec("BERT-small, 32 tokens", {"text": _bert("bert_small")}, CONCAT, attends=True),
    "gru": Spec(
        "GRU text, both directions, 32 tokens",
        {"text": {"type": "recurrent_text", "cell": "gru", "vocab_size": WORDS, "dim": 192, "hidden": 192}},
        CONCAT,
    ),
    "fused": Spec(
        "mobilenetv4_conv_small and a BERT of width 256, cross-attention",
        {"image": MOBILE, "text": _bert("bert_256")},
        {"type": "cross_attention", "dim": 256, "heads": 4, "depth": 1},
        attends=True,
    ),
    "dual": Spec(
        "mobilenetv4_conv_small and a BERT of width 256, dual encoder",
        {"image": MOBILE, "text": _bert("bert_256")},
        None,
        attends=True,
    ),
    "quickstart": Spec(
        "the quick start's student",
        {
            "image": {"type": "convnet", "widths": [16, 32, 64, 128], "blocks": [0, 0, 1, 1]},
            "text": {"type": "static_embeddings", "vocab_size": WORDS, "dim": 192},
        },
        {"type": "concat", "dim": 192},
        size=48,
    ),
}
"""Name -> model."""


def build(name: str, folder: Path, *, pruned: Path | None = None) -> Model:
    """Return a model with the weights of seed 0, in eval mode.

    Args:
        name: of :data:`MODELS`.
        folder: where random transformers and tokenizers are kept.
        pruned: a pruning plan; made and written there if it is not yet.
    """
    spec = MODELS[name]
    given = {"text": {"tokenizer_file": _tokenizer(folder)}} if "text" in spec.encoders else {}
    encoders: dict[str, Any] = {modality: dict(part) for modality, part in spec.encoders.items()}
    for part in encoders.values():
        if part["type"] == "pretrained_text":
            part["weights"] = f"path:{_transformer(folder, part['weights'])}"
            given = {}
    config = ModelConfig.model_validate({"encoders": encoders, "fusion": spec.fusion, "embedding_dim": 128})
    torch.manual_seed(0)
    tasks: dict[str, Task] = {"kind": unnamed(CLASSES)} if spec.fusion else {}
    model = build_model(config, pipeline.ENCODERS, tasks, name, given).eval()
    if pruned is None:
        return model
    if not pruned.is_file():
        prune.plan(model, rows(name, 4, seed=1), spec.cut).save(pruned)
    smaller: Any = prune.apply(model, prune.PrunePlan.load(pruned))
    return smaller.eval()


def rows(name: str, count: int, *, seed: int) -> Batch:
    """Return random rows with all modalities and texts of full length."""
    spec = MODELS[name]
    random = torch.Generator().manual_seed(seed)
    inputs: dict[str, torch.Tensor] = {}
    if "image" in spec.encoders:
        coarse = torch.rand(count, 3, 8, 8, generator=random)  # patches of colour, so that no two rows look alike
        whole = torch.nn.functional.interpolate(coarse, size=spec.size, mode="bilinear")
        inputs["image"] = (whole * 255).to(torch.uint8)
    if "text" in spec.encoders:
        inputs["text"] = torch.randint(5, WORDS, (count, LENGTH), generator=random)
        inputs["text_mask"] = torch.ones(count, LENGTH, dtype=torch.bool)
    present = {modality: torch.ones(count, dtype=torch.bool) for modality in spec.encoders}
    return Batch(torch.arange(count), torch.full((count,), CLEAN_VIEW), inputs, present, {})


def data_config(name: str) -> DataConfig:
    """Return the recipe's ``data`` that such rows would come from."""
    columns = {modality: modality for modality in MODELS[name].encoders}
    tree = {"source": {"type": "table", "path": "rows.csv"}, "modalities": columns, "working_size": MODELS[name].size}
    return DataConfig.model_validate(tree)


def _tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer of made-up words."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        words = {word: number for number, word in enumerate((*special, *(f"w{n}" for n in range(5, BERT_VOCABULARY))))}
        Tokenizer(WordPiece(words, unk_token="[UNK]")).save(str(file))
    return file


def _transformer(folder: Path, name: str) -> Path:
    """A random BERT in transformers' format, with its tokenizer."""
    place = folder / name
    if not (place / "model.safetensors").is_file():
        width, layers, heads, words = BERTS[name]
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        BertModel(config).save_pretrained(place)
        (place / "tokenizer.json").write_bytes(_tokenizer(folder).read_bytes())
    return place
