"""Pretrained towers in transformers format: text (BERT family, CLIP text) and vision (CLIP, SigLIP, ViT, DINO)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import UserError
from distill.dropout import Dropout
from distill.multimodal import Encoded, Encoder
from distill.runs import read_json
from teachers.lora import adapt
from teachers.weights import resolve_weights


def checkpoint_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a local transformers checkpoint.

    Raises:
        UserError: it is not readable, names code of its own, or an architecture that transformers does not know.
    """
    from transformers import CONFIG_MAPPING

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
    return content


def load_checkpoint(folder: Path, builder: Any, **options: Any) -> tuple[nn.Module, list[str]]:
    """Load a model of a local transformers checkpoint, from safetensors only.

    Args:
        folder: the checkpoint.
        builder: the model's class in transformers.
        options: values of its configuration that replace the checkpoint's.

    Returns:
        The model, and the names of its weights that the checkpoint lacks, which are random now.

    Raises:
        UserError: unreadable files, or weights of another shape than the configuration says.
    """
    try:
        with _quiet_loading():
            model, info = builder.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    other = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if other:
        raise UserError(f"{folder}: {len(other)} weights have another shape than config.json says, first {other[0]!r}")
    return model, sorted(name for name in info["missing_keys"] if "position_ids" not in name)


def refuse_missing(folder: Path, missing: Sequence[str], tower: str) -> None:
    """Refuse a checkpoint that lacks weights of a tower, which transformers would fill with random ones."""
    if missing:
        raise UserError(f"{folder}: lacks {len(missing)} weights of its {tower} tower, first {missing[0]!r}")


def load_tower(folder: Path, tower: Literal["text", "vision"], *, projected: bool = False) -> nn.Module:
    """Load one tower of a local transformers checkpoint, from safetensors only.

    Args:
        folder: the checkpoint.
        tower: which one.
        projected: with what brings its pooled output into the space of the other tower's.

    Raises:
        UserError: an architecture that transformers does not know or that is not of this modality, unreadable files, or
            a checkpoint that lacks some of its weights (which transformers would fill with random ones).
    """
    from transformers import AutoModel, SiglipTextModel, SiglipVisionModel
    from transformers import ClapTextModelWithProjection  # isort: skip
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # isort: skip
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection  # isort: skip

    content = checkpoint_config(folder)
    kind = content["model_type"]
    classes: dict[tuple[str, str], Any] = {
        ("clip", "text"): CLIPTextModelWithProjection if projected else CLIPTextModel,
        ("clip", "vision"): CLIPVisionModelWithProjection if projected else CLIPVisionModel,
        ("siglip", "text"): SiglipTextModel,
        ("siglip", "vision"): SiglipVisionModel,
    }
    if projected and (kind, tower) == ("clap", "text"):
        classes["clap", "text"] = ClapTextModelWithProjection
    elif projected and kind not in ("clip", "siglip"):
        raise UserError(
            f"{folder}: a {kind!r} shares no embedding space with another tower; leave 'projected' out, or name a CLIP "
            "or SigLIP checkpoint"
        )
    builder = classes.get((kind.removesuffix("_model"), tower), AutoModel)
    extra = {"add_pooling_layer": False} if kind in ("bert", "roberta", "xlm-roberta", "vit") else {}
    if projected and "projection_dim" in content:
        extra["projection_dim"] = content["projection_dim"]  # that of a tower's own part may be a default
    model, missing = load_checkpoint(folder, builder, **extra)
    config: Any = model.config
    if not hasattr(config, {"text": "vocab_size", "vision": "image_size"}[tower]):
        raise UserError(f"{folder}: a {kind!r} has no {tower} tower; name a checkpoint that has one")
    refuse_missing(folder, missing, tower)
    return model


def cut_tower(tower: nn.Module, cut: dict[str, int] | None, *, freeze: bool) -> nn.Module:
    """Return a smaller tower of the same kind, with random weights: for a student that inherits ``tower_weights``.

    Width and MLPs shrink with the heads, which stay as wide as they are.

    Args:
        tower: the whole one; returned as it is where nothing is cut.
        cut: "layers" and "heads" that stay; all where left out.
        freeze: whether its weights are fixed, which random ones may not be.

    Raises:
        UserError: an unknown key, more layers or heads than there are, or a frozen tower.
    """
    if not cut:
        return tower
    config: Any = copy.deepcopy(tower.config)
    there = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    for key, count in cut.items():
        if key not in there:
            raise UserError(f"cut: unknown key {key!r}; {nearest(key, there)}")
        if not 1 <= count <= there[key]:
            raise UserError(f"cut: {key} is {count}, and the tower has {there[key]}; give 1 to {there[key]}")
    if freeze:
        raise UserError("cut: a smaller tower has to learn; set freeze to false")
    heads = cut.get("heads", there["heads"])
    config.num_hidden_layers, config.num_attention_heads = cut.get("layers", there["layers"]), heads
    config.hidden_size = config.hidden_size // there["heads"] * heads
    config.intermediate_size = max(1, config.intermediate_size * heads // there["heads"])
    return type(tower)(config)


def own_scale(folder: Path) -> dict[str, float]:
    """Return the scale that a checkpoint of one embedding space was trained with.

    ``logit_scale``, and ``logit_bias`` if there is one, of CLIP and SigLIP; of CLAP, which has two scales, that of its
    audio (``logit_scale_a``).
    """
    file, found = folder / "model.safetensors", {}
    if file.is_file():
        with safe_open(file, framework="pt") as tensors:
            names = {"logit_scale", "logit_bias", "logit_scale_a"}.intersection(tensors.keys())
            found = {name.removesuffix("_a"): float(tensors.get_tensor(name)) for name in names}
    if "logit_scale" in found:
        found["logit_scale"] = math.exp(found["logit_scale"])
    return found


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
        projected: give the checkpoint's own text embedding, as its one token and pooled vector: CLIP, SigLIP and
            CLAP.
        cut: see :func:`cut_tower`.
        lora: see :func:`teachers.lora.adapt`.
    """

    reads = "text"
    word_table = "tower"  # where in it, each knows

    def __init__(
        self,
        *,
        weights: str | Sequence[str],
        sha256: str | None = None,
        freeze: bool = True,
        max_length: int = 32,
        layers: Sequence[int] = (),
        dropout: float = 0.0,
        projected: bool = False,
        cut: dict[str, int] | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        tower = cut_tower(load_tower(folder, "text", projected=projected), cut, freeze=freeze)
        self.tower = adapt(tower, lora, freeze=freeze, cut=bool(cut))
        whole: Any = self.tower
        words = whole.get_input_embeddings()
        self.word_table = next((path for path, module in self.named_modules() if module is words), "")
        self.projected, self.own_scale = projected, own_scale(folder) if projected else {}
        self.frozen, self.max_length = freeze, max_length
        self.dropout = Dropout(dropout)
        self.tokenizer_file = folder / "tokenizer.json"
        if not self.tokenizer_file.is_file():
            raise UserError(f"{folder}: no tokenizer.json; save the tokenizer in its fast form first")
        config: Any = self.tower.config
        self.pad_id = int(config.pad_token_id or 0)
        self.causal, self.whole_length = config.model_type.startswith("clip"), 0
        siglip = config.model_type.startswith("siglip")
        if projected:
            if layers:
                raise UserError(f"{folder}: 'projected' reads the last layer; leave 'layers' out")
            if siglip:
                self.whole_length = int(config.max_position_embeddings)  # SigLIP learnt from texts padded to this
                if max_length > self.whole_length:
                    raise UserError(
                        f"{folder}: max_length is {max_length}, and its texts have at most {self.whole_length}"
                    )
        self.layers, depth = tuple(layers), int(config.num_hidden_layers)
        if not all(0 <= layer <= depth for layer in self.layers):
            raise UserError(f"{folder}: layers is {list(layers)}, this tower has the layers 0 to {depth}")
        self.out_dim = int(config.hidden_size) * (len(self.layers) or 1)
        if projected:
            self.out_dim = int(getattr(config, "projection_size" if siglip else "projection_dim"))
        if freeze:
            self.tower.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``text`` under ``text_mask``, or take ``text_encoded`` [B, L, D] computed before."""
        mask = inputs["text_mask"]
        tokens = inputs["text_encoded"] if "text_encoded" in inputs else self.encode(inputs["text"], mask)
        if self.projected:
            return Encoded(tokens, mask[:, :1] | True, self.dropout(tokens[:, 0]))
        weights = mask.to(tokens.dtype)[..., None]
        pooled = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
        return Encoded(tokens, mask, self.dropout(pooled))

    def encode(self, text: Tensor, mask: Tensor) -> Tensor:
        """Run the tower alone: int64 [B, L], bool [B, L] -> [B, L, D], or [B, 1, D] of its embedding."""
        if self.whole_length:
            whole = F.pad(text.where(mask, self.pad_id), (0, self.whole_length - text.shape[1]), value=self.pad_id)
            return self.tower(input_ids=whole).pooler_output[:, None]
        # A causal tower adds its own mask; padding sits behind every token that is read. Elsewhere a ready additive
        # 4-D mask gives the same output and exports to every runtime.
        allowed = mask.long() if self.causal else (1.0 - mask.to(torch.float32))[:, None, None, :] * -1e4
        found = self.tower(input_ids=text, attention_mask=allowed, output_hidden_states=bool(self.layers))
        if self.projected:
            return found.text_embeds[:, None]
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
        projected: give the checkpoint's own image embedding, as its one token and pooled vector: CLIP and SigLIP.
        cut: see :func:`cut_tower`.
        lora: see :func:`teachers.lora.adapt`.
    """

    reads = "image"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        weights: str | Sequence[str],
        sha256: str | None = None,
        freeze: bool = True,
        projected: bool = False,
        cut: dict[str, int] | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        tower = cut_tower(load_tower(folder, "vision", projected=projected), cut, freeze=freeze)
        self.tower = adapt(tower, lora, freeze=freeze, cut=bool(cut))
        self.projected, self.own_scale = projected, own_scale(folder) if projected else {}
        self.frozen = freeze
        config: Any = self.tower.config
        self.out_dim, self.size = int(config.hidden_size), int(config.image_size)
        if projected and hasattr(config, "projection_dim"):
            self.out_dim = int(config.projection_dim)
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
        return Encoded(tokens, mask, tokens[:, 0] if self.class_token or self.projected else tokens.mean(1))

    def encode(self, image: Tensor) -> Tensor:
        """Run the tower alone: uint8 [B, 3, H, W], resized and normalised -> [B, T, D], or [B, 1, D] if projected."""
        pixels = image.float() / 255
        if image.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", align_corners=False)
        found = self.tower(pixel_values=(pixels - self.mean) / self.std)
        if self.projected:
            return (found.image_embeds if self.class_token else found.pooler_output)[:, None]
        return found.last_hidden_state

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
