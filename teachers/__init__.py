"""Big encoders: pretrained towers in transformers and timm format."""

from teachers.pretrained import PretrainedText, PretrainedVision
from teachers.vision import TimmEncoder

ENCODERS = {
    "pretrained_text": PretrainedText,
    "pretrained_vision": PretrainedVision,
    "timm": TimmEncoder,
}

__all__ = ["ENCODERS", "PretrainedText", "PretrainedVision", "TimmEncoder"]
