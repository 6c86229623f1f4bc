"""Small encoders, and what a student inherits from its teacher."""

from collections.abc import Callable
from typing import Any

from students.audio import AudioConvNet
from students.inherit import encoder_weights, token_embeddings, tower_weights
from students.resnet import CifarResNet
from students.series import SeriesConvNet, SeriesRecurrent, SeriesTransformer
from students.tabular import TabularMLP
from students.text import StaticEmbeddings
from students.video import FrameConvNet
from students.vision import ConvNet

ENCODERS = {
    "audio_convnet": AudioConvNet,
    "convnet": ConvNet,
    "frame_convnet": FrameConvNet,
    "resnet_cifar": CifarResNet,
    "series_convnet": SeriesConvNet,
    "series_recurrent": SeriesRecurrent,
    "series_transformer": SeriesTransformer,
    "static_embeddings": StaticEmbeddings,
    "tabular_mlp": TabularMLP,
}

INHERITANCES: dict[str, Callable[..., Any]] = {
    "encoder_weights": encoder_weights,
    "token_embeddings": token_embeddings,
    "tower_weights": tower_weights,
}

__all__ = [
    "ENCODERS",
    "INHERITANCES",
    "AudioConvNet",
    "CifarResNet",
    "ConvNet",
    "FrameConvNet",
    "SeriesConvNet",
    "SeriesRecurrent",
    "SeriesTransformer",
    "StaticEmbeddings",
    "TabularMLP",
    "encoder_weights",
    "token_embeddings",
    "tower_weights",
]
