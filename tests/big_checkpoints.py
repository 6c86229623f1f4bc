"""Random audio checkpoints in transformers' own format, small enough for milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

RATE = 16000
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 8],
    "conv_stride": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.05,
}
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 20}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
AST = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SWIN = {
    "spec_size": 64,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "num_mel_bins": 16,
    "window_size": 2,
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
}
CLAP_TEXT = {
    "pad_token_id": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def write_audio(folder: Path, kind: str) -> Path:
    """A random checkpoint of a kind: one of ``CHECKPOINTS``."""
    torch.manual_seed(0)
    model, extractor = CHECKPOINTS[kind]()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def _speech(name: str, norm: str) -> tuple:
    config = getattr(transformers, f"{name}Config")(**SPEECH, feat_extract_norm=norm)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    return getattr(transformers, f"{name}Model")(config), extractor


def _whisper() -> tuple:
    config = transformers.WhisperConfig(**WHISPER, **DECODER, **TOKENS, max_source_positions=50, num_mel_bins=80)
    return transformers.WhisperForConditionalGeneration(config), transformers.WhisperFeatureExtractor(chunk_length=1)


def _ast() -> tuple:
    config = transformers.ASTConfig(**AST, max_length=98, num_mel_bins=32)
    extractor = transformers.ASTFeatureExtractor(max_length=98, num_mel_bins=32)
    return transformers.ASTForAudioClassification(config), extractor


def _clap(fused: bool, padding: str = "repeatpad") -> tuple:
    audio = {**SWIN, "enable_fusion": fused, "fusion_type": "aff_2d" if fused else None}
    text = {**CLAP_TEXT, "vocab_size": 20, "max_position_embeddings": 12}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=160,
        max_length_s=1,
        fft_window_size=512,
        frequency_min=50,
        frequency_max=7000,
        truncation="fusion" if fused else "rand_trunc",
        padding=padding,
    )
    return transformers.ClapModel(config), extractor


CHECKPOINTS = {
    "wav2vec2": lambda: _speech("Wav2Vec2", "layer"),
    "wav2vec2_group": lambda: _speech("Wav2Vec2", "group"),
    "hubert": lambda: _speech("Hubert", "layer"),
    "wavlm": lambda: _speech("WavLM", "layer"),
    "whisper": _whisper,
    "ast": _ast,
    "clap": lambda: _clap(fused=False),
    "clap_fused": lambda: _clap(fused=True, padding="repeat"),
}
