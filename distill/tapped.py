"""Inner features of a model, read by hooks where its modules give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import Batch, Outputs, UserError
from distill.layouts import arranged, modality_of
from distill.multimodal import Encoded, spread

if TYPE_CHECKING:
    from collections.abc import Callable


class Tapped:
    """Calls a model and adds the outputs of some of its modules to what it returns.

    A tap is a module path such as ``encoders.image.stages.3``; of an encoder itself (``encoders.image``) it gives the
    tokens. A trailing ``:mean`` averages a feature over its positions ([B, C, H, W] or [B, T, C] -> [B, C]), which
    keeps caches small.

    Args:
        model: any ``Batch -> Outputs`` module; hooks are registered on it.
        paths: the taps.

    Raises:
        UserError: the model has no such module; when called, what it gives is no tensor.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model = model
        self._features: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for path in paths:
            name, _, reduction = path.partition(":")
            if name not in modules:
                raise UserError(
                    f"tap {path!r}: the model has no module {name!r}; {nearest(name, filter(None, modules))}"
                )
            if reduction not in ("", "mean"):
                raise UserError(f"tap {path!r}: the only reduction is ':mean'")
            modules[name].register_forward_hook(self._reader(path, bool(reduction)))

    def _reader(self, path: str, mean: bool) -> Callable[[nn.Module, object, object], None]:
        modality = modality_of(path)

        def read(module: nn.Module, args: object, output: object) -> None:
            feature = tapped_tensor(output)
            if feature is None:
                raise UserError(
                    f"tap {path!r}: this module gives a {type(output).__name__} and no tensor; tap a part of it "
                    "(`distill inspect` lists them)"
                )
            # a copy: later modules may write into what this one gave
            self._features[path] = arranged(feature, "mean", modality) if mean else feature.clone()

        return read

    def __call__(self, batch: Batch) -> Outputs:
        """Run the model; the features are the taps' values of this call."""
        outputs = self.model(batch)
        features, self._features = self._features, {}
        for path, value in features.items():
            owner, _, inner = path.partition(":")[0].partition(".")
            rows = batch.present[inner.split(".")[0]] if owner == "encoders" else None
            if rows is not None and not (len(rows) and bool(rows.all())):  # it read only the rows that have it, or one
                here = value if len(value) == int(rows.sum()) else value[: len(rows)][rows[: len(value)]]
                features[path] = spread(here, rows)
        return outputs._replace(features=features)


def tapped_tensor(output: object) -> Tensor | None:
    """What a tap makes of a module's output: a tensor, the tokens of an encoder, or nothing."""
    found = output.tokens if isinstance(output, Encoded) else output
    return found if isinstance(found, Tensor) else None
