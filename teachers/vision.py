"""Any convolutional or transformer image model of timm as an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import UserError
from distill.multimodal import Encoded, Encoder, evaluating


class TimmEncoder(Encoder):
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

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode ``image`` uint8 [B, 3, H, W], or take ``image_encoded`` [B, T, D] computed before."""
        tokens = inputs["image_encoded"] if "image_encoded" in inputs else self.encode(inputs["image"])
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens.mean(1))

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

    def train(self, mode: bool = True) -> TimmEncoder:
        """Switch mode; a frozen model stays in eval mode, so that BatchNorm keeps its statistics."""
        super().train(mode and not self.frozen)
        return self


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
