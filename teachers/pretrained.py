"""Pretrained towers in transformers format: text (BERT family, CLIP text) and vision (CLIP, SigLIP, ViT, DINO)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import UserError
from distill.dropout import Dropout
from distill.multimodal import Encoded, Encoder
from distill.runs import read_json
from teachers.weights import resolve_weights


def load_tower(folder: Path, tower: Literal["text", "vision"]) -> nn.Module:
    """Load one tower of a local transformers checkpoint, from safetensors only.

    Raises:
        UserError: an architecture that transformers does not know or that is not of this modality, unreadable files, or
            a checkpoint that lacks some of its weights (which transformers would fill with random ones).
    """
    from transformers import CONFIG_MAPPING, AutoModel, SiglipTextModel, SiglipVisionModel
    from transformers import CLIPTextModel, CLIPVisionModel  # isort: skip

    try:
        content = read_json(folder / "config.json")
        kind, own_code = content.get("model_type", ""), content.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder}: config.json is not readable as JSON: {error}") from error
    if own_code:
        raise UserError(
            f"{folder}: config.json names code of its own (auto_map), which is never run; name other weights"
        )
    if kind not in CONFIG_MAPPING:
        known = nearest(kind, CONFIG_MAPPING.keys())[:200]
        raise UserError(f"{folder}: transformers has no architecture {kind!r}; {known}")
    classes: dict[tuple[str, str], Any] = {
        ("clip", "text"): CLIPTextModel,
        ("clip", "vision"): CLIPVisionModel,
        ("siglip", "text"): SiglipTextModel,
        ("siglip", "vision"): SiglipVisionModel,
    }
    builder = classes.get((kind.removesuffix("_model"), tower), AutoModel)
    extra = {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta", "vit") else {}
    try:
        with _quiet_loading():
            model, info = builder.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **extra,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not hasattr(model.config, {"text": "vocab_size", "vision": "image_size"}[tower]):
        raise UserError(f"{folder}: a {kind!r} has no {tower} tower; name a checkpoint that has one")
    other = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if other:
        raise UserError(f"{folder}: {len(other)} weights have another shape than config.json says, first {other[0]!r}")
    missing = sorted(name for name in info["missing_keys"] if "position_ids" not in name)
    if missing:
        raise UserError(f"{folder}: lacks {len(missing)} weights of its {tower} tower, first {missing[0]!r}")
    return model


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence transformers' bar and its list of unused weights; missing ones are an error here anyway."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


class PretrainedText(Encoder):
    """A transformers text model; tokens are its hidden states, pooled is their masked mean.

    States of several layers, side by side, say more to a frozen tower's reader than the last ones alone (Devlin et al.
    2019, arXiv 1810.04805, section 5.3): early layers keep the words, late ones what the tower was trained for.

    Args:
        weights: see :func:`teachers.weights.resolve_weights`.
        sha256: pinned hash of ``model.safetensors``.
        freeze: fix the tower's parameters; its outputs are then computed once for each distinct input.
        max_length: tokens a text is cut to, closing token included.
        layers: whose outputs the tokens are, joined along D; 0 is the embedding layer. The last one alone if left out.
        dropout: probability of dropping a feature of the pooled vector in training.
    """

    def __init__(
        self,
        *,
        weights: str | Sequence[str],
        sha256: str | None = None,
        freeze: bool = True,
        max_length: int = 32,
        layers: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        self.tower = load_tower(folder, "text")
        self.frozen, self.max_length = freeze, max_length
        self.dropout = Dropout(dropout)
        self.tokenizer_file = folder / "tokenizer.json"
        if not self.tokenizer_file.is_file():
            raise UserError(f"{folder}: no tokenizer.json; save the tokenizer in its fast form first")
        config: Any = self.tower.config
        self.pad_id = int(config.pad_token_id or 0)
        self.causal = config.model_type.startswith("clip")
        self.layers, depth = tuple(layers), int(config.num_hidden_layers)
        if not all(0 <= layer <= depth for layer in self.layers):
            raise UserError(f"{folder}: layers is {list(layers)}, this tower has the layers 0 to {depth}")
        self.out_dim = int(config.hidden_size) * (len(self.layers) or 1)
        if freeze:
            self.tower.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``text`` under ``text_mask``, or take ``text_encoded`` [B, L, D] computed before."""
        mask = inputs["text_mask"]
        tokens = inputs["text_encoded"] if "text_encoded" in inputs else self.encode(inputs["text"], mask)
        weights = mask.to(tokens.dtype)[..., None]
        pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return Encoded(tokens, mask, self.dropout(pooled))

    def encode(self, text: Tensor, mask: Tensor) -> Tensor:
        """Run the tower alone: int64 [B, L], bool [B, L] -> [B, L, D]."""
        # A causal tower adds its own mask; padding sits behind every token that is read. Elsewhere a ready additive
        # 4-D mask gives the same output and exports to every runtime.
        allowed = mask.long() if self.causal else (1.0 - mask.to(torch.float32))[:, None, None, :] * -1e4
        found = self.tower(input_ids=text, attention_mask=allowed, output_hidden_states=bool(self.layers))
        if not self.layers:
            return found.last_hidden_state
        states = (*found.hidden_states[:-1], found.last_hidden_state)  # CLIP normalises its last one
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    def train(self, mode: bool = True) -> PretrainedText:
        """Switch mode; a frozen tower stays in eval mode, so that its dropout is off."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self


class PretrainedVision(Encoder):
    """A transformers vision transformer; tokens are its last hidden states, pooled is the class token or the mean.

    Args:
        weights: see :func:`teachers.weights.resolve_weights`.
        sha256: pinned hash of ``model.safetensors``.
        freeze: fix the tower's parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, weights: str | Sequence[str], sha256: str | None = None, freeze: bool = True) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        self.tower = load_tower(folder, "vision")
        self.frozen = freeze
        config: Any = self.tower.config
        self.out_dim, self.size = int(config.hidden_size), int(config.image_size)
        self.class_token = not config.model_type.startswith("siglip")
        mean, std = _statistics(folder)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if freeze:
            self.tower.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W], or take ``image_encoded`` [B, T, D] computed before."""
        tokens = inputs["image_encoded"] if "image_encoded" in inputs else self.encode(inputs["image"])
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens[:, 0] if self.class_token else tokens.mean(1))

    def encode(self, image: Tensor) -> Tensor:
        """Run the tower alone: resize, normalise, encode: uint8 [B, 3, H, W] -> [B, T, D]."""
        pixels = image.float() / 255
        if image.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return self.tower(pixel_values=(pixels - self.mean) / self.std).last_hidden_state

    def train(self, mode: bool = True) -> PretrainedVision:
        """Switch mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self


def _statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation a channel, [1, 3, 1, 1], from the checkpoint's own preprocessor config."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no preprocessor_config.json, which says how the tower's images are normalised")
    config = read_json(file)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return mean, std
