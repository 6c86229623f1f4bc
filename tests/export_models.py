"""Small models that the tests of export, quantization, prediction and benchmarks share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import tokenizers
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from distill.contracts import Batch, Outputs
from distill.formats.image import ImageFormat
from distill.preprocess import Preprocessor, Tokenizer

CLASSES = {"category": 4, "subcategory": 10}
LABELS = {task: [f"{task} {number}" for number in range(count)] for task, count in CLASSES.items()}
SIZE, VOCAB, DIM = 32, 16384, 128
WORDS = ["red", "green", "blue", "cat", "dog"]


def separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class StandIn(nn.Module):
    """A convolutional image tower, a table of token embeddings, concatenation and two heads."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            separable(width, 2 * width),
            separable(2 * width, DIM),
        )
        self.table = nn.Embedding(VOCAB, DIM)
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.randn(DIM)) for name in ("image", "text")})
        self.fuse = nn.Sequential(nn.Linear(2 * DIM, DIM), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(DIM, count) for task, count in CLASSES.items()})
        self.image_heads = nn.ModuleDict({task: nn.Linear(DIM, count) for task, count in CLASSES.items()})

    def forward(self, batch: Batch) -> Outputs:
        image = self.image(batch.inputs["image"].float() * (2 / 255) - 1).mean(dim=(2, 3))
        weights = batch.inputs["text_mask"].float()[..., None]
        text = (self.table(batch.inputs["text"]) * weights).sum(1) / weights.sum(1).clamp(min=1)
        vectors = {"image": image, "text": text}
        for name, flags in batch.present.items():
            vectors[name] = torch.where(flags[:, None], vectors[name], self.missing[name])
        vectors["fused"] = self.fuse(torch.cat([vectors["image"], vectors["text"]], dim=1))
        logits = {task: head(vectors["fused"]) for task, head in self.heads.items()}
        logits |= {f"{task}.image": head(vectors["image"]) for task, head in self.image_heads.items()}
        return Outputs(logits, vectors, {})


def rows(count: int, length: int, seed: int) -> Batch:
    """Rows whose class shows, under noise, in colours and in words; some miss a modality."""
    chance = torch.Generator().manual_seed(seed)
    label = torch.randint(10, (count,), generator=chance)
    patterns = torch.randint(256, (10, 3, 4, 4), generator=torch.Generator().manual_seed(99)).float()
    noise = torch.randint(256, (count, 3, SIZE, SIZE), generator=chance)
    image = 0.6 * functional.interpolate(patterns, SIZE)[label] + 0.4 * noise
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=chance)
    random = torch.randint(1, VOCAB, (count, length), generator=chance)
    word = 1 + 100 * label[:, None] + torch.randint(20, (count, length), generator=chance)
    text = torch.where(torch.rand(count, length, generator=chance) < 0.4, random, word) * mask
    has_image = torch.rand(count, generator=chance) < 0.8
    has_text = (torch.rand(count, generator=chance) < 0.8) | ~has_image
    return Batch(
        ids=torch.arange(count),
        views=torch.zeros(count, dtype=torch.int64),
        inputs={"image": image.round().to(torch.uint8), "text": text, "text_mask": mask},
        present={"image": has_image, "text": has_text},
        targets={"category": label % 4, "subcategory": label},
    )


@cache
def trained() -> StandIn:
    """The stand-in after a minute's worth of learning in two seconds; do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StandIn().train()
        model.table.weight.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(40):
            learn(model, optimizer, step)
    return model.eval()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    """Take a step on rows of its own; return the loss before it."""
    batch = rows(48, 8, seed=step)
    logits = model(batch).logits
    losses = [functional.cross_entropy(v, batch.targets[k.split(".")[0]]) for k, v in logits.items()]
    loss = torch.stack(losses).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def tiny_preprocessor(folder: Path, *, image_size: int = SIZE) -> Preprocessor:
    """A preprocessor with a word-level tokenizer of ``WORDS``."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: number for number, word in enumerate(WORDS, start=2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "source_tokenizer.json"))
    return Preprocessor({"image": ImageFormat(image_size)}, Tokenizer(folder / "source_tokenizer.json", max_length=6))


def write_tiny_graph(path: Path, *, size: int = 8, seed: int = 0) -> Path:
    """A hand-made graph with the inputs and outputs of an exported model; its one task has 3 classes."""
    chance = np.random.default_rng(seed)
    constants = {
        "colour": chance.normal(size=(3, 3)).astype(np.float32),
        "words": chance.normal(size=(len(WORDS) + 2, 3)).astype(np.float32),
        "positions": np.array([2, 3]),
        "one": np.array([1]),
        "last": np.array([-1]),
        "whole": np.array(255, dtype=np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        node("ReduceMean", ["pixels", "positions"], ["mean"], keepdims=0),
        node("Div", ["mean", "whole"], ["scaled"]),
        node("MatMul", ["scaled", "colour"], ["from_image"]),
        node("Gather", ["words", "text"], ["tokens"]),
        node("Cast", ["text_mask"], ["real"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["real", "last"], ["weights"]),
        node("Mul", ["tokens", "weights"], ["kept"]),
        node("ReduceSum", ["kept", "one"], ["from_text"], keepdims=0),
    ]
    for name in ("image", "text"):
        nodes.append(node("Cast", [f"{name}_present"], [f"{name}_flag"], to=TensorProto.FLOAT))
        nodes.append(node("Unsqueeze", [f"{name}_flag", "one"], [f"{name}_factor"]))
        nodes.append(node("Mul", [f"from_{name}", f"{name}_factor"], [f"used_{name}"]))
    nodes.append(node("Add", ["used_image", "used_text"], ["category"]))
    kinds = {
        "image": (TensorProto.UINT8, ["batch", 3, size, size]),
        "image_present": (TensorProto.BOOL, ["batch"]),
        "text": (TensorProto.INT64, ["batch", "length"]),
        "text_mask": (TensorProto.BOOL, ["batch", "length"]),
        "text_present": (TensorProto.BOOL, ["batch"]),
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("category", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def as_feeds(batch: Batch) -> dict[str, np.ndarray]:
    named: dict[str, Tensor] = {**batch.inputs, **{f"{name}_present": flags for name, flags in batch.present.items()}}
    return {name: tensor.numpy() for name, tensor in named.items()}
