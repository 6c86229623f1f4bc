"""Image models of timm and torchvision as encoders, without their classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import UserError
from distill.multimodal import Encoded, Encoder, evaluating


class MapEncoder(Encoder):
    """Base of image models whose tokens are the positions of their last feature map, pooled their mean."""

    reads = "image"

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W], or take ``image_encoded`` [B, T, D] computed before."""
        tokens = inputs["image_encoded"] if "image_encoded" in inputs else self.encode(inputs["image"])
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens.mean(1))

    def encode(self, image: Tensor) -> Tensor:
        """Resize, normalise and encode: uint8 [B, 3, H, W] -> [B, T, D]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Switch mode; a frozen model stays in eval mode, so that BatchNorm keeps its statistics."""
        return super().train(mode and not self.frozen)


class TimmEncoder(MapEncoder):
    """A timm model without its classifier; tokens are the positions of its last feature map.

    Args:
        name: timm's model name.
        pretrained: load timm's weights from the Hub (stops when they are not there).
        size: pixels to which images are resized inside the graph; the model's own size where None.
        freeze: fix the parameters.
        drop_path: stochastic depth rate.
        classifier: of pretrained weights, the model's head begins with theirs. Classes of the data are in the order of
            their names, which fits ImageNet's folders ``n01440764``...

    Attributes:
        own_classifier: "weight" [C, D] and "bias" [C] of the pretrained classifier, until a head has taken them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = False,
        size: int | None = None,
        freeze: bool = False,
        drop_path: float = 0.0,
        classifier: bool = False,
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
            raise UserError(f"timm has no model {name!r}; similar: {close or 'none'}")
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        takes = classifier and pretrained
        try:
            self.net = timm.create_model(
                name, pretrained=pretrained, **options, **({} if takes else {"num_classes": 0})
            )
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm model {name!r} cannot be created: {reason}") from error
        config = timm.data.resolve_model_data_config(self.net)
        self.size = size or int(config["input_size"][-1])
        self.own_classifier = self._without_classifier(name) if takes else None
        self.out_dim = int(self.net.num_features)
        self.frozen = freeze
        self.register_buffer("mean", _channels(config["mean"]), persistent=False)
        self.register_buffer("std", _channels(config["std"]), persistent=False)
        if freeze:
            self.requires_grad_(False)

    def _without_classifier(self, name: str) -> dict[str, Tensor]:
        """Take the classifier off the net; it has to read what this encoder gives, the mean of the tokens."""
        net: Any = self.net
        layer = net.get_classifier()
        net.reset_classifier(0)
        with evaluating(net):
            pixels = torch.linspace(-1, 1, 3 * self.size**2).view(1, 3, self.size, self.size)
            features = net.forward_features(pixels)
            read = net.forward_head(features, pre_logits=True)
            pooled = self._tokens(features).mean(1)
        same = read.shape == pooled.shape and torch.allclose(read, pooled, rtol=1e-3, atol=1e-4)
        if not same or not isinstance(layer, nn.Linear):
            raise UserError(
                f"timm model {name!r} has more than a mean over positions before its classifier; set classifier to "
                "false, and let a head learn"
            )
        return dict(layer.state_dict())

    def encode(self, image: Tensor) -> Tensor:
        """Resize, normalise and encode: uint8 [B, 3, H, W] -> [B, T, D]."""
        pixels = image.float() / 255
        if image.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return self._tokens(self.net.forward_features((pixels - self.mean) / self.std))

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features
        last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)


RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
TORCHVISION: dict[str, tuple[str, ...]] = {
    "alexnet": ("features",),
    "convnext": ("features",),
    "densenet": ("features", "relu"),
    "efficientnet": ("features",),
    "mnasnet": ("layers",),
    "mobilenet": ("features",),
    "regnet": ("stem", "trunk_output"),
    "resnet": RESNET,
    "resnext": RESNET,
    "shufflenet": ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    "squeezenet": ("features",),
    "swin": ("features", "norm", "permute"),
    "vgg": ("features",),
    "wide_resnet": RESNET,
}
"""How the names of a torchvision family begin -> its parts, one after the other, up to the last map [B, C, H, W]."""
IMAGENET_SIZE = 224


class TorchvisionEncoder(MapEncoder):
    """A torchvision classification model up to its last feature map, whose positions are the tokens.

    VGG, ResNet (ResNeXt and wide ones too), AlexNet, ConvNeXt, DenseNet, EfficientNet, MNASNet, MobileNetV2 and V3,
    RegNet, ShuffleNetV2, SqueezeNet, Swin. Weights have torchvision's names (``net.features.0.weight``).

    Args:
        name: torchvision's model name, such as vgg19_bn.
        weights: name of torchvision's weights, such as IMAGENET1K_V1, downloaded when they are not in torch's cache;
            ``path:FILE``, the model's state dict as safetensors; random where None.
        size: pixels to which images are resized inside the graph; those of the weights (224 without any) where None.
        freeze: fix the parameters.

    Raises:
        UserError: an unknown name, a model of another family, or weights that are not there or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, name: str, weights: str | None = None, size: int | None = None, freeze: bool = False) -> None:
        super().__init__()
        from torchvision import models

        known = models.list_models(module=models)
        usable = [model for model in known if model.startswith(tuple(TORCHVISION))]
        if name not in usable:
            reason = "gives no feature map that is read here" if name in known else "is no classification model of it"
            raise UserError(f"torchvision: {name!r} {reason}; {nearest(name, usable)}")
        entries: Any = models.get_model_weights(name)
        chosen = None if weights is None or weights.startswith("path:") else _entry(name, weights, entries)
        self.net = _up_to_map(models.get_model(name, weights=None), name)
        if weights is not None:
            state = _downloaded(name, chosen) if chosen else _read(weights)
            self._load(state, f"torchvision model {name!r}: weights {weights}")
        shown = (chosen or entries.DEFAULT).transforms()
        self.size = size or (int(shown.crop_size[0]) if chosen else IMAGENET_SIZE)
        self.frozen = freeze
        self.register_buffer("mean", _channels(shown.mean), persistent=False)
        self.register_buffer("std", _channels(shown.std), persistent=False)
        try:
            with evaluating(self):
                self.out_dim = int(self.encode(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)).shape[2])
        except RuntimeError as error:
            raise UserError(f"torchvision model {name!r}: size {self.size} leaves no feature map; give more") from error
        if freeze:
            self.requires_grad_(False)

    def _load(self, state: Mapping[str, Tensor], where: str) -> None:
        """Take the weights of the parts that are here; those of the classifier are left."""
        own = self.net.state_dict()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise UserError(f"{where}: lacks {len(missing)} of the model's weights, first {missing[0]!r}")
        other = sorted(key for key in own if own[key].shape != state[key].shape)
        if other:
            raise UserError(f"{where}: {len(other)} weights have another shape than the model's, first {other[0]!r}")
        self.net.load_state_dict({key: state[key] for key in own})

    def encode(self, image: Tensor) -> Tensor:
        """Resize, normalise and encode: uint8 [B, 3, H, W] -> [B, T, D]."""
        pixels = image.float() / 255
        if image.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return self.net((pixels - self.mean) / self.std).flatten(2).transpose(1, 2)


def _up_to_map(model: nn.Module, name: str) -> nn.Sequential:
    """The parts of a torchvision model up to its last feature map, under their own names."""
    parts = next(parts for family, parts in TORCHVISION.items() if name.startswith(family))
    net = nn.Sequential()
    for part in parts:  # DenseNet's last activation is a function of its forward
        net.add_module(part, getattr(model, part) if hasattr(model, part) else nn.ReLU())
    return net


def _entry(name: str, weights: str, entries: Any) -> Any:
    """The weights of torchvision that have a name."""
    if weights not in entries.__members__:
        raise UserError(
            f"torchvision model {name!r} has no weights {weights!r}; {nearest(weights, entries.__members__)}, or "
            "path:FILE"
        )
    return entries[weights]


def _downloaded(name: str, entry: Any) -> Mapping[str, Tensor]:
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"torchvision model {name!r}: weights {entry.name} could not be downloaded and are not in torch's cache "
            f"({reason})"
        ) from error


def _read(weights: str) -> Mapping[str, Tensor]:
    file = Path(weights.removeprefix("path:")).expanduser()
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"weights {weights!r} cannot be read as safetensors ({' '.join(str(error).split())[:200]}); save the "
            "model's state dict with safetensors"
        ) from error


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
