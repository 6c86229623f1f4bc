"""Pretrained towers in transformers format: text (BERT family, CLIP text) and vision (CLIP, SigLIP, ViT, DINO)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import UserError
from distill.multimodal import Encoded, Encoder
from distill.runs import read_json
from teachers.weights import resolve_weights

CLIP_LIKE = ("clip", "siglip", "siglip2")


def load_tower(folder: Path, tower: Literal["text", "vision"]) -> nn.Module:
    """Load one tower of a local transformers checkpoint, from safetensors only.

    Raises:
        UserError: an architecture that transformers does not know, or a checkpoint that lacks some of its weights
            (which transformers would fill with random ones).
    """
    from transformers import CONFIG_MAPPING, AutoModel, SiglipTextModel, SiglipVisionModel
    from transformers import CLIPTextModel, CLIPVisionModel  # isort: skip

    kind = read_json(folder / "config.json").get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{folder}: transformers has no architecture {kind!r}; {nearest(kind, CONFIG_MAPPING.keys())[:200]}")
    classes: dict[tuple[str, str], Any] = {
        ("clip", "text"): CLIPTextModel,
        ("clip", "vision"): CLIPVisionModel,
        ("siglip", "text"): SiglipTextModel,
        ("siglip", "vision"): SiglipVisionModel,
    }
    builder = classes.get((kind.removesuffix("_model"), tower), AutoModel)
    extra = {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta", "vit") else {}
    try:
        model, info = builder.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **extra
        )
    except OSError as error:
        raise UserError(f"{folder}: weights cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = sorted(name for name in info["missing_keys"] if "position_ids" not in name)
    if missing:
        raise UserError(f"{folder}: the checkpoint lacks {len(missing)} weights of its {tower} tower, first {missing[0]!r}")
    return model


class PretrainedText(Encoder):
    """A transformers text model; tokens are its last hidden states, pooled is their masked mean.

    Args:
        weights: see :func:`teachers.weights.resolve_weights`.
        sha256: pinned hash of ``model.safetensors``.
        freeze: fix the tower's parameters; its outputs are then computed once for each distinct input.
        max_length: tokens a text is cut to, closing token included.
    """

    def __init__(
        self, *, weights: str | Sequence[str], sha256: str | None = None, freeze: bool = True, max_length: int = 32
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        self.tower = load_tower(folder, "text")
        self.frozen, self.max_length = freeze, max_length
        self.tokenizer_file = folder / "tokenizer.json"
        if not self.tokenizer_file.is_file():
            raise UserError(f"{folder}: no tokenizer.json; save the tokenizer in its fast form first")
        config = self.tower.config
        self.pad_id = int(config.pad_token_id or 0)
        self.causal = config.model_type.startswith("clip")
        self.out_dim = int(config.hidden_size)
        if freeze:
            self.tower.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``text`` under ``text_mask``, or take ``text_encoded`` [B, L, D] computed before."""
        mask = inputs["text_mask"]
        tokens = inputs["text_encoded"] if "text_encoded" in inputs else self.encode(inputs["text"], mask)
        weights = mask.to(tokens.dtype)[..., None]
        return Encoded(tokens, mask, (tokens * weights).sum(1) / weights.sum(1).clamp(min=1))

    def encode(self, text: Tensor, mask: Tensor) -> Tensor:
        """Run the tower alone: int64 [B, L], bool [B, L] -> [B, L, D]."""
        if self.causal:  # the tower adds its own causal mask; padding sits behind every token that is read
            return self.tower(input_ids=text, attention_mask=mask.long()).last_hidden_state
        # A ready additive 4-D mask gives the same output and exports to every runtime.
        bias = (1.0 - mask.to(torch.float32))[:, None, None, :] * -1e4
        return self.tower(input_ids=text, attention_mask=bias).last_hidden_state

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

    def __init__(self, *, weights: str | Sequence[str], sha256: str | None = None, freeze: bool = True) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        self.tower = load_tower(folder, "vision")
        self.frozen = freeze
        self.out_dim = int(self.tower.config.hidden_size)
        self.size = int(self.tower.config.image_size)
        mean, std = _statistics(folder)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if freeze:
            self.tower.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W], or take ``image_encoded`` [B, T, D] computed before."""
        tokens = inputs["image_encoded"] if "image_encoded" in inputs else self.encode(inputs["image"])
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens[:, 0])

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
