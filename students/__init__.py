"""Small encoders, and what a student inherits from its teacher."""

from collections.abc import Callable
from typing import Any

from students.audio import AudioConvNet
from students.embedded import AudioPatches, ImagePatches, SeriesPatches, TabularTokens, TextTokens
from students.inherit import encoder_weights, token_embeddings, tower_weights, word_vectors
from students.recurrent import RecurrentText
from students.resnet import CifarResNet
from students.series import SeriesConvNet, SeriesRecurrent, SeriesTransformer
from students.tabular import TabularMLP
from students.text import StaticEmbeddings
from students.text_cnn import TextCNN
from students.transformer import SmallTransformer
from students.video import FrameConvNet
from students.vision import ConvNet

ENCODERS = {
    "audio_convnet": AudioConvNet,
    "audio_patches": AudioPatches,
    "convnet": ConvNet,
    "frame_convnet": FrameConvNet,
    "image_patches": ImagePatches,
    "recurrent_text": RecurrentText,
    "resnet_cifar": CifarResNet,
    "series_convnet": SeriesConvNet,
    "series_patches": SeriesPatches,
    "series_recurrent": SeriesRecurrent,
    "series_transformer": SeriesTransformer,
    "small_transformer": SmallTransformer,
    "static_embeddings": StaticEmbeddings,
    "tabular_mlp": TabularMLP,
    "tabular_tokens": TabularTokens,
    "text_cnn": TextCNN,
    "text_tokens": TextTokens,
}

INHERITANCES: dict[str, Callable[..., Any]] = {
    "encoder_weights": encoder_weights,
    "token_embeddings": token_embeddings,
    "tower_weights": tower_weights,
    "word_vectors": word_vectors,
}

__all__ = [
    "ENCODERS",
    "INHERITANCES",
    "AudioConvNet",
    "AudioPatches",
    "CifarResNet",
    "ConvNet",
    "FrameConvNet",
    "ImagePatches",
    "RecurrentText",
    "SeriesConvNet",
    "SeriesPatches",
    "SeriesRecurrent",
    "SeriesTransformer",
    "SmallTransformer",
    "StaticEmbeddings",
    "TabularMLP",
    "TabularTokens",
    "TextCNN",
    "TextTokens",
    "encoder_weights",
    "token_embeddings",
    "tower_weights",
    "word_vectors",
]
