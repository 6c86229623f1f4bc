"""Small encoders, and what a student inherits from its teacher."""

from collections.abc import Callable
from typing import Any

from students.inherit import encoder_weights, token_embeddings, tower_weights, word_vectors
from students.recurrent import RecurrentText
from students.resnet import CifarResNet
from students.text import StaticEmbeddings
from students.text_cnn import TextCNN
from students.transformer import SmallTransformer
from students.vision import ConvNet

ENCODERS = {
    "convnet": ConvNet,
    "recurrent_text": RecurrentText,
    "resnet_cifar": CifarResNet,
    "small_transformer": SmallTransformer,
    "static_embeddings": StaticEmbeddings,
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
    "CifarResNet",
    "ConvNet",
    "RecurrentText",
    "SmallTransformer",
    "StaticEmbeddings",
    "TextCNN",
    "encoder_weights",
    "token_embeddings",
    "tower_weights",
    "word_vectors",
]
