"""Tiny data, tokenizers, checkpoints and models that the tests share: real formats, random weights, milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from distill.config import TermConfig
from distill.contracts import CLEAN_VIEW, IGNORE, Batch
from distill.data import prepared
from distill.data.loader import InputSpec, Loader
from distill.data.prepared import PreparedData
from distill.data_config import AugmentConfig
from distill.formats.image import ImageFormat
from distill.fusion import FUSIONS
from distill.losses.objective import Objective
from distill.losses.terms import tap_paths
from distill.multimodal import MultimodalModel, evaluating
from distill.tapped import Tapped
from distill.targets import unnamed
from distill.tasks import LinearHead
from students import ConvNet, StaticEmbeddings

SIZE = 16
KINDS, TONES = ("cat", "dog", "sun"), ("dark", "light")
WORDS = [*KINDS, *TONES, "red", "green", "blue", "moon", "a", "the", "small", "big"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
AUGMENT = AugmentConfig.model_validate({"image": {"flip": 0.5, "shift": 2}, "text": {"word_dropout": 0.3}})
NUM_CLASSES = {"kind": len(KINDS), "tone": len(TONES)}
TASKS = {task: unnamed(count) for task, count in NUM_CLASSES.items()}
SPLIT_ROWS = {"train": 80, "valid": 24, "test": 24}
NO_TEXT, NO_IMAGE, NO_KIND = 5, 9, 11  # positions of train rows that lack something


def write_wordpiece(path: Path) -> Path:
    """A BERT-style tokenizer: special tokens, single characters and their continuations, then whole words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *(w for w in WORDS if len(w) > 1), "##s"]
    vocab = {piece: code for code, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer.save(str(path))
    return path


def write_bert(folder: Path, *, seed: int = 0) -> Path:
    """A random one-layer BERT with its tokenizer, in transformers format."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    write_wordpiece(folder / "tokenizer.json")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """A random CLIP with both towers, byte-level BPE tokenizer and preprocessor config, in transformers format."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: code for code, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens(tokens[-2:])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[-2]} $A {tokens[-1]}", special_tokens=[(name, vocab[name]) for name in tokens[-2:]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        max_position_embeddings=32,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
        **shape,
    )
    vision = CLIPVisionConfig(hidden_size=24, image_size=SIZE, patch_size=8, **shape)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    statistics = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": SIZE}, **statistics}))
    return folder


def write_prepared(folder: Path) -> Path:
    """Prepared data on disk that can be learned: colour and words name the classes; a few rows lack something."""
    random = np.random.default_rng(0)
    split = [name for name, count in SPLIT_ROWS.items() for _ in range(count)]
    total = len(split)
    kind, tone = random.integers(0, 3, total), random.integers(0, 2, total)
    images = random.integers(0, 60, (total, 3, SIZE, SIZE))
    images[np.arange(total), kind] += 120
    images += 60 * tone[:, None, None, None]
    texts = [
        " ".join(random.permutation([KINDS[k], TONES[t], *random.choice(WORDS[5:], random.integers(0, 4))]))
        for k, t in zip(kind, tone, strict=True)
    ]
    present = {"image": np.ones(total, bool), "text": np.ones(total, bool)}
    targets = {"kind": kind.copy(), "tone": tone}
    texts[NO_TEXT], present["text"][NO_TEXT] = "", False
    images[NO_IMAGE], present["image"][NO_IMAGE] = 0, False
    targets["kind"][NO_KIND] = IGNORE
    return prepared.write_prepared(
        folder,
        ids=np.arange(total) * 3 + 7,
        split=split,
        groups=np.arange(total) // 2,
        texts=texts,
        present=present,
        targets=targets,
        labels={"kind": KINDS, "tone": TONES},
        arrays={"image": images.clip(0, 255).astype(np.uint8)},
        formats={"image": ImageFormat(SIZE)},
    )


def make_model(
    tokenizer_file: Path, *, fusion: str = "concat", dim: int = 12, seed: int = 0, **options: float
) -> MultimodalModel:
    """A two-modality model of some thousand parameters, the same for the same seed."""
    torch.manual_seed(seed)
    vocab_size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    encoders = {
        "image": ConvNet(widths=[4, 8], blocks=[0, 1]),
        "text": StaticEmbeddings(tokenizer_file=tokenizer_file, vocab_size=vocab_size, dim=8),
    }
    return around(encoders, fusion=fusion, dim=dim, **options)


def around(encoders, *, fusion: str = "concat", dim: int = 12, **options: float) -> MultimodalModel:
    """Fusion and heads around given encoders."""
    heads = {task: LinearHead(dim, count) for task, count in NUM_CLASSES.items()}
    alone = {task: {name: LinearHead(dim, count) for name in encoders} for task, count in NUM_CLASSES.items()}
    block = FUSIONS[fusion](list(encoders), dim)
    return MultimodalModel(encoders, block, heads, alone, dim=dim, embedding_dim=6, **options)


def make_loader(data: PreparedData, tokenizer_file: Path, reads: tuple[str, ...] = ("student",), **options) -> Loader:
    """Shuffled, augmented training rows with three repeating views, unless told otherwise."""
    spec = InputSpec(("image",), tokenizer_file, 16)
    defaults = {"split": "train", "batch_size": 16, "seed": 0, "augment": AUGMENT, "views": 3, "shuffle": True}
    chosen = defaults | options
    return Loader(data, chosen.pop("split"), dict.fromkeys(reads, spec), **chosen)


def make_batch(rows: int = 6, length: int = 5, *, seed: int = 0, vocab: int = 60) -> Batch:
    """Random inputs with every modality present and texts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    text = torch.randint(5, vocab, (rows, length), generator=generator) * mask
    inputs = {
        "image": torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        "text": text,
        "text_mask": mask,
    }
    present = {name: torch.ones(rows, dtype=torch.bool) for name in ("image", "text")}
    targets = {task: torch.arange(rows) % count for task, count in NUM_CLASSES.items()}
    return Batch(torch.arange(rows), torch.full((rows,), CLEAN_VIEW), inputs, present, targets)


def terms(*items: dict) -> list[TermConfig]:
    """Validated terms of an objective."""
    return [TermConfig.model_validate(item) for item in items]


LABELS = terms({"loss": "cross_entropy", "task": "kind"}, {"loss": "cross_entropy", "task": "tone"})


def only_ids(ids: torch.Tensor | None) -> Batch | None:
    """Rows of which nothing but the ids is known."""
    return None if ids is None else Batch(ids, torch.zeros_like(ids), {}, {}, {})


def make_objective(model: MultimodalModel, objective: list[TermConfig], batch: Batch, teacher=None, **options):
    """The tapped model and its objective, as a stage builds them."""
    tapped = Tapped(model, tap_paths(objective, "student"))
    with evaluating(model):
        example = tapped(batch)
    return tapped, Objective(objective, example, teacher, **options)
