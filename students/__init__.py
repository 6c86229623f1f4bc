"""Small encoders, and what a student inherits from its teacher."""

from collections.abc import Callable
from typing import Any

from students.audio import AudioConvNet
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
    "convnet": ConvNet,
    "frame_convnet": FrameConvNet,
    "recurrent_text": RecurrentText,
    "resnet_cifar": CifarResNet,
    "series_convnet": SeriesConvNet,
    "series_recurrent": SeriesRecurrent,
    "series_transformer": SeriesTransformer,
    "small_transformer": SmallTransformer,
    "static_embeddings": StaticEmbeddings,
    "tabular_mlp": TabularMLP,
    "text_cnn": TextCNN,
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
    "CifarResNet",
    "ConvNet",
    "FrameConvNet",
    "RecurrentText",
    "SeriesConvNet",
    "SeriesRecurrent",
    "SeriesTransformer",
    "SmallTransformer",
    "StaticEmbeddings",
    "TabularMLP",
    "TextCNN",
    "encoder_weights",
    "token_embeddings",
    "tower_weights",
    "word_vectors",
]
