"""Both towers of checkpoints in open_clip format, with the package open_clip_torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.contracts import UserError
from distill.multimodal import Encoded, Encoder
from distill.runs import read_json
from teachers.weights import OPEN_CLIP, resolve_weights

CONFIG, WEIGHTS = OPEN_CLIP
PREFIX = {"text": "text.", "vision": "visual."}


class OpenClipImage(Encoder):
    """An image tower in open_clip format: its embedding, or the patches of a vision transformer and their mean.

    Args:
        weights: see :func:`teachers.weights.resolve_weights`; the folder holds ``open_clip_config.json`` and
            ``open_clip_model.safetensors``.
        sha256: pinned hash of ``open_clip_model.safetensors``.
        freeze: fix the tower's parameters.
        projected: give the checkpoint's own image embedding, as its one token and pooled vector.

    Raises:
        UserError: the package or weights are missing, or the tower gives an embedding alone.
    """

    reads = "image"
    mean: Tensor
    std: Tensor

    def __init__(
        self, *, weights: str | Sequence[str], sha256: str | None = None, freeze: bool = True, projected: bool = True
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256, files=OPEN_CLIP)
        config = read_config(folder)
        self.tower, self.own_scale = load_tower(folder, config, "vision")
        if not projected and not hasattr(self.tower, "output_tokens"):
            raise UserError(f"{folder}: its image tower is no vision transformer of open_clip; set projected to true")
        vision, self.frozen, self.projected = config["model_cfg"]["vision_cfg"], freeze, projected
        size = vision.get("image_size", 224)
        self.size = tuple(size) if isinstance(size, list) else (size, size)
        self.out_dim = int(config["model_cfg"]["embed_dim"] if projected else vision["width"])
        for name in ("mean", "std"):
            value = torch.tensor(config["preprocess_cfg"][name]).view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        if freeze:
            self.tower.requires_grad_(False).eval()

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W], or take ``image_encoded`` [B, T, D] computed before."""
        tokens = inputs["image_encoded"] if "image_encoded" in inputs else self.encode(inputs["image"])
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens.mean(1))

    def encode(self, image: Tensor) -> Tensor:
        """Resize, normalise and encode: uint8 [B, 3, H, W] -> [B, T, D], or [B, 1, D] if projected."""
        pixels = image.float() / 255
        if tuple(image.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, size=self.size, mode="bicubic", align_corners=False)
        found = self.tower((pixels - self.mean) / self.std)
        pooled, tokens = found if isinstance(found, tuple) else (found, None)
        return pooled[:, None] if self.projected else tokens

    def train(self, mode: bool = True) -> OpenClipImage:
        """Switch mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self


class OpenClipText(Encoder):
    """A text tower in open_clip format: its embedding, or its hidden states and their masked mean.

    Args:
        weights: as of :class:`OpenClipImage`; the folder holds ``tokenizer.json`` too.
        sha256: pinned hash of ``open_clip_model.safetensors``.
        freeze: fix the tower's parameters.
        max_length: tokens a text is cut to, closing token included; those of the tower where None.
        projected: give the checkpoint's own text embedding, as its one token and pooled vector.

    Raises:
        UserError: the package, weights or tokenizer are missing, or the tower finds its embedding in another way than
            by the closing token as the highest id (SigLIP's do).
    """

    reads = "text"
    word_table = "tower.token_embedding"

    def __init__(
        self,
        *,
        weights: str | Sequence[str],
        sha256: str | None = None,
        freeze: bool = True,
        max_length: int | None = None,
        projected: bool = True,
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256, files=OPEN_CLIP)
        config = read_config(folder)
        text = config["model_cfg"]["text_cfg"]
        if text.get("pool_type", "argmax") != "argmax" or text.get("embed_cls"):
            raise UserError(
                f"{folder}: its text tower does not read the embedding at the closing token, which is what is known "
                "here; name a CLIP, or a SigLIP in transformers format as pretrained_text"
            )
        self.tower, self.own_scale = load_tower(folder, config, "text")
        self.context, self.frozen, self.projected = int(text.get("context_length", 77)), freeze, projected
        self.max_length, self.pad_id = max_length or self.context, 0
        if self.max_length > self.context:
            raise UserError(f"{folder}: max_length is {max_length}, and its texts have at most {self.context}")
        self.tokenizer_file = folder / "tokenizer.json"
        if not self.tokenizer_file.is_file():
            raise UserError(f"{folder}: no tokenizer.json; save the tokenizer in its fast form first")
        self.out_dim = int(config["model_cfg"]["embed_dim"] if projected else text["width"])
        if freeze:
            self.tower.requires_grad_(False).eval()

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``text`` under ``text_mask``, or take ``text_encoded`` [B, L, D] computed before."""
        mask = inputs["text_mask"]
        tokens = inputs["text_encoded"] if "text_encoded" in inputs else self.encode(inputs["text"], mask)
        if self.projected:
            return Encoded(tokens, mask[:, :1] | True, tokens[:, 0])
        weights = mask.to(tokens.dtype)[..., None]
        return Encoded(tokens, mask, (tokens * weights).sum(1) / weights.sum(1).clamp(min=1))

    def encode(self, text: Tensor, mask: Tensor) -> Tensor:
        """Run the tower alone: int64 [B, L], bool [B, L] -> [B, L, D], or [B, 1, D] of its embedding."""
        whole = F.pad(text * mask, (0, self.context - text.shape[1]))  # 0 is never the highest id
        pooled, tokens = self.tower(whole)
        return pooled[:, None] if self.projected else tokens[:, : text.shape[1]]

    def train(self, mode: bool = True) -> OpenClipText:
        """Switch mode; a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``open_clip_config.json``: the model's shape and how its images are normalised.

    Raises:
        UserError: it is not readable, lacks something, or its text tower is built from the Hub.
    """
    try:
        content = read_json(folder / CONFIG)
        model, preprocess = content["model_cfg"], content["preprocess_cfg"]
        there = {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys() and {"mean", "std"} <= preprocess.keys()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: {CONFIG} is not readable: {' '.join(str(error).split())[:200]}") from error
    if not there:
        raise UserError(f"{folder}: {CONFIG} lacks embed_dim, vision_cfg, text_cfg, mean or std")
    if model["text_cfg"].get("hf_model_name"):
        raise UserError(f"{folder}: its text tower is one of transformers, which is not built here; name a plain CLIP")
    return content


def load_tower(
    folder: Path, config: dict[str, Any], tower: Literal["text", "vision"]
) -> tuple[nn.Module, dict[str, float]]:
    """Build a tower with the weights of its checkpoint.

    Returns:
        The tower, and ``logit_scale`` (and ``logit_bias``) that the checkpoint was trained with.

    Raises:
        UserError: the package is not installed, or weights are missing, unreadable or of another shape.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            "open_clip towers need the package open_clip_torch; pip install 'multidistill[openclip]'"
        ) from error
    shape = {key: value for key, value in config["model_cfg"].items() if key != "custom_text"}
    for part in ("vision_cfg", "text_cfg"):
        shape[part] = {**shape[part], "output_tokens": True}
    if "timm_model_name" in shape["vision_cfg"]:
        shape["vision_cfg"]["timm_model_pretrained"] = False
    try:
        whole = open_clip.CustomTextCLIP(**shape)
        state = open_clip.model.convert_to_custom_text_state_dict(load_file(folder / WEIGHTS))
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    prefix, scale = PREFIX[tower], {}
    chosen = whole.get_submodule(prefix.removesuffix("."))
    own = chosen.state_dict()
    bad = sorted(key for key in own if prefix + key not in state or state[prefix + key].shape != own[key].shape)
    if bad:
        raise UserError(
            f"{folder}: {len(bad)} weights of its {tower} tower are missing or of another shape, first {bad[0]!r}"
        )
    chosen.load_state_dict({key: state[prefix + key] for key in own})
    if "logit_scale" in state:
        scale["logit_scale"] = math.exp(float(state["logit_scale"]))
    if "logit_bias" in state:
        scale["logit_bias"] = float(state["logit_bias"])
    return chosen, scale
