"""Big encoders: pretrained towers in transformers, timm and torchvision format."""

from teachers.audio import PretrainedAudio
from teachers.pretrained import PretrainedText, PretrainedVision
from teachers.vision import TimmEncoder, TorchvisionEncoder

ENCODERS = {
    "pretrained_audio": PretrainedAudio,
    "pretrained_text": PretrainedText,
    "pretrained_vision": PretrainedVision,
    "timm": TimmEncoder,
    "torchvision": TorchvisionEncoder,
}

__all__ = [
    "ENCODERS",
    "PretrainedAudio",
    "PretrainedText",
    "PretrainedVision",
    "TimmEncoder",
    "TorchvisionEncoder",
]
