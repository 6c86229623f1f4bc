"""Small encoders, and what a student inherits from its teacher."""

from collections.abc import Callable
from typing import Any

from students.inherit import encoder_weights, token_embeddings, tower_weights
from students.resnet import CifarResNet
from students.text import StaticEmbeddings
from students.vision import ConvNet

ENCODERS = {
    "convnet": ConvNet,
    "resnet_cifar": CifarResNet,
    "static_embeddings": StaticEmbeddings,
}

INHERITANCES: dict[str, Callable[..., Any]] = {
    "encoder_weights": encoder_weights,
    "token_embeddings": token_embeddings,
    "tower_weights": tower_weights,
}

__all__ = [
    "ENCODERS",
    "INHERITANCES",
    "CifarResNet",
    "ConvNet",
    "StaticEmbeddings",
    "encoder_weights",
    "token_embeddings",
    "tower_weights",
]
