"""Big encoders: pretrained towers in transformers, open_clip, timm and torchvision format."""

from teachers.audio import PretrainedAudio
from teachers.openclip import OpenClipImage, OpenClipText
from teachers.pretrained import PretrainedText, PretrainedVision
from teachers.vision import TimmEncoder, TorchvisionEncoder

ENCODERS = {
    "open_clip_image": OpenClipImage,
    "open_clip_text": OpenClipText,
    "pretrained_audio": PretrainedAudio,
    "pretrained_text": PretrainedText,
    "pretrained_vision": PretrainedVision,
    "timm": TimmEncoder,
    "torchvision": TorchvisionEncoder,
}

__all__ = [
    "ENCODERS",
    "OpenClipImage",
    "OpenClipText",
    "PretrainedAudio",
    "PretrainedText",
    "PretrainedVision",
    "TimmEncoder",
    "TorchvisionEncoder",
]
