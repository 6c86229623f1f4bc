"""Small encoders, and what a student inherits from its teacher."""

from students.inherit import token_embeddings
from students.text import StaticEmbeddings
from students.vision import ConvNet

ENCODERS = {
    "convnet": ConvNet,
    "static_embeddings": StaticEmbeddings,
}

INHERITANCES = {"token_embeddings": token_embeddings}

__all__ = ["ENCODERS", "INHERITANCES", "ConvNet", "StaticEmbeddings", "token_embeddings"]
