"""Pretrained audio towers in transformers format: wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, AST and CLAP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import UserError
from distill.multimodal import Encoded, Encoder
from distill.runs import read_json
from teachers.lora import adapt
from teachers.pretrained import checkpoint_config, load_checkpoint, own_scale, refuse_missing
from teachers.spectrograms import AstMel, ClapMel, Normalized, WhisperMel, convolved
from teachers.weights import resolve_weights

FULL_SCALE = 32768.0  # int16 samples to [-1, 1), as decoders of audio files give them
WHISPER_STRIDE = 2  # of its second convolution
AST_SPECIAL = 2  # class and distillation token, before the patches


class Kind(NamedTuple):
    """How checkpoints of a kind are read.

    Attributes:
        builder: transformers' name of the model.
        extractor: transformers' name of its feature extractor.
        front_end: (extractor, samples) -> what makes the tower's input.
        part: of the model that is the tower; all of it if empty.
    """

    builder: str
    extractor: str
    front_end: Callable[[Any, int], nn.Module]
    part: str = ""


WAVEFORMS = ("wav2vec2", "hubert", "wavlm")
KINDS = {
    "wav2vec2": Kind("Wav2Vec2Model", "Wav2Vec2FeatureExtractor", Normalized),
    "hubert": Kind("HubertModel", "Wav2Vec2FeatureExtractor", Normalized),
    "wavlm": Kind("WavLMModel", "Wav2Vec2FeatureExtractor", Normalized),
    "whisper": Kind("WhisperModel", "WhisperFeatureExtractor", WhisperMel, "encoder"),
    "audio-spectrogram-transformer": Kind("ASTModel", "ASTFeatureExtractor", AstMel),
    "clap": Kind("ClapAudioModelWithProjection", "ClapFeatureExtractor", ClapMel, "audio_model"),
}


class PretrainedAudio(Encoder):
    """A transformers audio model; tokens are its last hidden states, pooled is the mean of those that hold sound.

    The tower's input (a log-mel spectrogram, or a normalised waveform) is made from the samples inside the module, as
    the checkpoint's ``preprocessor_config.json`` says. AST's pooled vector is the mean of its class and distillation
    token. Whisper's tokens behind the longest clip are left out; CLAP repeats a short clip, so all its tokens count.

    Args:
        weights: see :func:`teachers.weights.resolve_weights`.
        sha256: pinned hash of ``model.safetensors``.
        freeze: fix the tower's parameters; its outputs are then computed once for each distinct input.
        projected: give the checkpoint's own audio embedding, as its one token and pooled vector: CLAP.
        lora: see :func:`teachers.lora.adapt`.
        sample_rate: samples a second of the data.
        num_samples: S, samples of the data's longest clip.

    Raises:
        UserError: an architecture of another kind, weights or ``preprocessor_config.json`` missing or unreadable,
            another sampling rate than the tower's, or clips that it cannot read.
    """

    reads = "audio"

    def __init__(
        self,
        *,
        weights: str | Sequence[str],
        sha256: str | None = None,
        freeze: bool = True,
        projected: bool = False,
        lora: dict[str, Any] | None = None,
        sample_rate: int,
        num_samples: int,
    ) -> None:
        super().__init__()
        folder = resolve_weights(weights, sha256)
        self.kind = checkpoint_config(folder)["model_type"]
        if self.kind not in KINDS:
            raise UserError(f"{folder}: a {self.kind!r} is no audio tower known here; {nearest(self.kind, KINDS)}")
        if projected and self.kind != "clap":
            raise UserError(
                f"{folder}: a {self.kind!r} shares no embedding space with another tower; leave 'projected' out, or "
                "name a CLAP checkpoint"
            )
        extractor = read_extractor(folder, KINDS[self.kind].extractor)
        wanted = int(extractor.sampling_rate)
        if sample_rate != wanted:
            raise UserError(
                f"{folder}: this tower reads {wanted} samples a second, and the data has {sample_rate}; set "
                f"data.audio.sample_rate to {wanted}"
            )
        try:
            self.front_end = KINDS[self.kind].front_end(extractor, num_samples)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        self.tower = adapt(load_audio_tower(folder, self.kind, projected=projected), lora, freeze=freeze)
        self.projected, self.own_scale = projected, own_scale(folder) if projected else {}
        self.frozen, self.masked = freeze, bool(extractor.return_attention_mask)
        config: Any = self.tower.config
        self.hop = int(getattr(extractor, "hop_length", 1)) * WHISPER_STRIDE
        self.num_tokens, self.shortest = self._count_tokens(num_samples), 1
        if self.kind in WAVEFORMS:
            self.shortest = _receptive_field(config.conv_kernel, config.conv_stride)
            if num_samples < self.shortest:
                raise UserError(
                    f"{folder}: clips have {num_samples} samples, and this tower needs {self.shortest}; lengthen them"
                )
        self.out_dim = int(config.projection_dim if projected else config.hidden_size)
        if freeze:
            self.tower.requires_grad_(False)

    def _count_tokens(self, num_samples: int) -> int:
        """Tokens of clips of a length that are kept; 0 where the tower gives as many for any."""
        config: Any = self.tower.config
        if self.kind in WAVEFORMS:
            return convolved(num_samples, config.conv_kernel, config.conv_stride)
        return -(-num_samples // self.hop) if self.kind == "whisper" else 0

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``audio`` int16 [B, S] of ``audio_length``, or take ``audio_encoded`` [B, T, D] computed before."""
        length = inputs["audio_length"]
        tokens = inputs["audio_encoded"] if "audio_encoded" in inputs else self.encode(inputs["audio"], length)
        mask = self._mask(tokens, length)
        if self.projected:
            return Encoded(tokens, mask, tokens[:, 0])
        if self.kind == "audio-spectrogram-transformer":
            return Encoded(tokens, mask, tokens[:, :AST_SPECIAL].mean(1))
        weights = mask.to(tokens.dtype)[..., None]
        return Encoded(tokens, mask, (tokens * weights).sum(1) / weights.sum(1).clamp(min=1))

    def encode(self, audio: Tensor, audio_length: Tensor) -> Tensor:
        """Run the tower alone: int16 [B, S], int64 [B] -> [B, T, D], or [B, 1, D] of its embedding."""
        features = self.front_end(audio.float() / FULL_SCALE, audio_length)
        if self.kind in WAVEFORMS:
            return self._encode_waveform(features, audio_length)
        found = self.tower(features)
        if self.projected:
            return found.audio_embeds[:, None]
        tokens = found.last_hidden_state
        if self.kind == "clap":
            return tokens.flatten(2).transpose(1, 2)
        return tokens[:, : self.num_tokens] if self.num_tokens else tokens

    def _encode_waveform(self, features: Tensor, length: Tensor) -> Tensor:
        """Run a tower of waveforms; those that learned with a mask get it, the others read zeros behind a clip."""
        if not self.masked:
            return self.tower(features).last_hidden_state
        samples = torch.arange(features.shape[1], device=features.device)
        there = samples < length.clamp(min=self.shortest)[:, None]  # a clip without a token has nothing to attend to
        return self.tower(features, attention_mask=there.long()).last_hidden_state

    def _mask(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Which tokens hold sound of a clip: bool [B, T]."""
        config: Any = self.tower.config
        position, length = torch.arange(tokens.shape[1], device=tokens.device), length[:, None]
        if self.kind in WAVEFORMS:
            return position < convolved(length, config.conv_kernel, config.conv_stride)
        if self.kind == "whisper":
            return position * self.hop < length
        if self.kind == "clap":
            return (position >= 0) & (length >= 0)
        front: Any = self.front_end
        columns = (front.max_length - config.patch_size) // config.time_stride + 1
        frame = (position - AST_SPECIAL) % columns * config.time_stride
        return (position < AST_SPECIAL) | (frame < front.num_frames(length))

    def train(self, mode: bool = True) -> PretrainedAudio:
        """Switch mode; a frozen tower stays in eval mode, so that its dropout is off."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self


def read_extractor(folder: Path, name: str) -> Any:
    """Return transformers' feature extractor of a checkpoint, for its parameters.

    Args:
        folder: the checkpoint.
        name: class of the extractor.

    Raises:
        UserError: ``preprocessor_config.json`` is missing or unreadable, or of another extractor.
    """
    import transformers

    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no preprocessor_config.json, which says how the tower's audio is prepared")
    try:
        content = read_json(file)
        written = content.get("feature_extractor_type", name)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not readable as JSON: {error}") from error
    if written != name:
        raise UserError(f"{file} is of a {written}, and this tower's is a {name}; name the checkpoint's own file")
    try:
        return getattr(transformers, name).from_dict(content)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())[:200]}") from error


def load_audio_tower(folder: Path, kind: str, *, projected: bool = False) -> nn.Module:
    """Load the audio tower of a local transformers checkpoint, from safetensors only.

    Args:
        folder: the checkpoint.
        kind: key of ``KINDS``.
        projected: with what brings its pooled output into the space of the text tower's.

    Raises:
        UserError: unreadable files, or weights that are missing.
    """
    import transformers

    name, _, _, part = KINDS[kind]
    options: dict[str, Any] = {}
    if kind in WAVEFORMS:  # SpecAugment draws from numpy's global random numbers, which no run could repeat
        options = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    if kind == "clap":  # what joins the parts of a clip that is longer than the window, which is refused
        options = {"enable_fusion": False}
        content = checkpoint_config(folder)
        options |= {key: content[key] for key in ("projection_dim",) if key in content}
    model, missing = load_checkpoint(folder, getattr(transformers, name), **options)
    if part and not projected:
        missing = [entry for entry in missing if entry.startswith(f"{part}.")]
        model = model.get_submodule(part)
    refuse_missing(folder, missing, "audio")
    return model


def _receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that the first position behind a stack of convolutions reads."""
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field
