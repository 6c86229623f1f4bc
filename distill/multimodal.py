"""Encoders + fusion + heads = one model, and taps that read its inner features.

Logits are the mean of the fused head's and of one head a modality: attention fusion alone overfits small data, while
single-modality heads keep each encoder useful on its own and let any subset of modalities answer. Train each head with
a loss of its own: under a loss on the mean alone, the fused head learns only to correct the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import nearest
from distill.contracts import Batch, Outputs, UserError
from distill.dropout import Dropout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Encoded(NamedTuple):
    """What an encoder gives.

    Attributes:
        tokens: [B, T, D].
        mask: bool [B, T], True where there is a token.
        pooled: [B, D].
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class Encoder(nn.Module):
    """Base of all encoders: reads its own entries of ``Batch.inputs``.

    Attributes:
        out_dim: D, the width of tokens and pooled vector.
        frozen: whether its parameters are fixed; its outputs may then be computed once and kept.
    """

    out_dim: int
    frozen: bool = False

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode a batch."""
        raise NotImplementedError

    def thaw(self) -> None:
        """Let all parameters learn, those of a frozen tower too."""
        self.frozen = False
        self.requires_grad_(True)


class Neck(nn.Module):
    """Bring an encoder's width to the fusion's: normalise, project, activate."""

    def __init__(self, in_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.linear = nn.Linear(in_dim, dim)
        self.activation = nn.ReLU()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_dim] to [..., dim]."""
        return self.dropout(self.activation(self.project(x)))

    def project(self, x: Tensor) -> Tensor:
        """The linear part alone: [..., in_dim] to [..., dim]."""
        return self.linear(self.norm(x))


class MultimodalModel(nn.Module):
    """Several encoders whose tokens meet in a fusion block, with heads for each task.

    Args:
        encoders: modality -> encoder.
        fusion: the fusion block.
        heads: task -> head on the fused vector.
        unimodal_heads: task -> modality -> head on that modality's pooled vector; may be empty.
        dim: width of the fusion.
        embedding_dim: width of the shared embedding space.
        modality_dropout: probability, in training, that a row loses one of its present modalities.
        dropout: probability of dropping a feature of a pooled vector or token on its way to the fusion, in training.
    """

    def __init__(
        self,
        encoders: dict[str, Encoder],
        fusion: nn.Module,
        heads: dict[str, nn.Module],
        unimodal_heads: dict[str, dict[str, nn.Module]],
        *,
        dim: int,
        embedding_dim: int,
        modality_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.necks = nn.ModuleDict({name: Neck(e.out_dim, dim, dropout) for name, e in encoders.items()})
        readers = encoders if fusion.reads_tokens else {}
        self.token_necks = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(e.out_dim, dim), Dropout(dropout)) for name, e in readers.items()}
        )
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads)
        self.unimodal_heads = nn.ModuleDict({task: nn.ModuleDict(by) for task, by in unimodal_heads.items()})
        self.embedders = nn.ModuleDict({name: nn.Linear(dim, embedding_dim) for name in [*encoders, "fused"]})
        self.modality_dropout = modality_dropout

    def forward(self, batch: Batch) -> Outputs:
        """Return logits of every task (and of its single heads) and embeddings.

        Args:
            batch: inputs and presence of the model's modalities.

        Returns:
            logits ``task``, ``task.fused`` and ``task.modality``, each [B, C]; embeddings of each modality and
            "fused", each [B, E].
        """
        encoded = {name: encode_present(encoder, name, batch) for name, encoder in self.encoders.items()}
        present = self._dropped({name: batch.present[name] for name in self.encoders})
        pooled = {name: self.necks[name](item.pooled) for name, item in encoded.items()}
        tokens = {name: neck(encoded[name].tokens) for name, neck in self.token_necks.items()}
        masks = {name: item.mask for name, item in encoded.items()}
        fused = self.fusion(tokens, masks, pooled, present)

        logits: dict[str, Tensor] = {}
        for task, head in self.heads.items():
            logits |= self._logits(task, head(fused), pooled, present)
        vectors = {**pooled, "fused": fused}
        embeddings = {name: embed(vectors[name]) for name, embed in self.embedders.items()}
        return Outputs(logits, embeddings, {})

    def _logits(
        self, task: str, fused: Tensor, pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A task's logits: the mean of the fused head's and those of the heads of the modalities that are there."""
        if task not in self.unimodal_heads:
            return {task: fused}
        heads: Any = self.unimodal_heads[task]
        alone = {name: head(pooled[name]) for name, head in heads.items()}
        there = {name: present[name][:, None].to(fused.dtype) for name in alone}
        total = fused + torch.stack([logits * there[name] for name, logits in alone.items()]).sum(0)
        count = 1 + torch.stack(list(there.values())).sum(0)
        return {f"{task}.fused": fused, **{f"{task}.{m}": logits for m, logits in alone.items()}, task: total / count}

    def _dropped(self, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """In training, let some rows that have every modality lose one at random."""
        if not self.training or not self.modality_dropout or len(present) < 2:
            return present
        stacked = torch.stack(list(present.values()), dim=1)
        lost = torch.rand(len(stacked), device=stacked.device) < self.modality_dropout
        which = torch.randint(stacked.shape[1], (len(stacked),), device=stacked.device)
        drop = torch.nn.functional.one_hot(which, stacked.shape[1]).bool() & (lost & stacked.all(1))[:, None]
        return dict(zip(present, (stacked & ~drop).unbind(1), strict=True))


class OneModality(nn.Module):
    """One encoder of a model with its neck and heads: shares their parameters, and answers from them alone.

    Args:
        model: the model; it has single-modality heads.
        modality: which encoder.
    """

    def __init__(self, model: MultimodalModel, modality: str) -> None:
        super().__init__()
        self.modality = modality
        self.encoders = nn.ModuleDict({modality: model.encoders[modality]})
        self.neck = model.necks[modality]
        self.heads = nn.ModuleDict({task: heads[modality] for task, heads in model.unimodal_heads.items()})  # type: ignore[index]

    def forward(self, batch: Batch) -> Outputs:
        """Return logits ``task.modality``, [B, C], and the same as ``task``."""
        pooled = self.neck(encode_present(self.encoders[self.modality], self.modality, batch).pooled)
        logits = {task: head(pooled) for task, head in self.heads.items()}
        return Outputs({**logits, **{f"{task}.{self.modality}": value for task, value in logits.items()}}, {}, {})


def encode_present(encoder: Any, name: str, batch: Batch) -> Encoded:
    """Encode the rows that have a modality; the others get zeros, take no time and enter no batch statistics.

    An exported graph has no such choice: it encodes blank inputs, and the masks of ``present`` keep them out of logits.

    Args:
        encoder: the modality's encoder.
        name: the modality.
        batch: may lack the modality's inputs where no row has it.
    """
    present = batch.present[name]
    inputs = {key: value for key, value in batch.inputs.items() if key == name or key.startswith(f"{name}_")}
    if not inputs:
        nothing = torch.zeros(len(present), 1, encoder.out_dim, device=present.device)
        return Encoded(nothing, torch.zeros_like(present)[:, None], nothing[:, 0])
    if torch.compiler.is_exporting() or bool(present.all()):
        return encoder(inputs)
    if bool(present.any()):
        return Encoded(*(spread(part, present) for part in encoder({k: v[present] for k, v in inputs.items()})))
    training = encoder.training  # nobody has it: shapes for taps, and no batch statistics
    encoded = encoder.eval()(inputs)
    encoder.train(training)
    return Encoded(*(spread(part[present], present) for part in encoded))


def spread(values: Tensor, rows: Tensor) -> Tensor:
    """Put values [M, ...] at the M rows that are True in bool [B], zeros elsewhere: [B, ...]."""
    return values.new_zeros((len(rows), *values.shape[1:])).index_put((rows,), values)


class Tapped:
    """Calls a model and adds the outputs of some of its modules to what it returns.

    A tap is a module path such as ``encoders.image.stages.3``; a trailing ``:mean`` averages a feature map over
    its positions ([B, C, H, W] or [B, T, C] -> [B, C]), which keeps caches small.

    Args:
        model: any ``Batch -> Outputs`` module; hooks are registered on it.
        paths: the taps.

    Raises:
        UserError: the model has no such module.
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

    def _reader(self, path: str, mean: bool) -> Callable[[nn.Module, object, Tensor], None]:
        def read(module: nn.Module, args: object, output: Tensor) -> None:
            if mean and output.ndim > 2:
                output = output.mean(dim=(2, 3) if output.ndim == 4 else 1)
            self._features[path] = output

        return read

    def __call__(self, batch: Batch) -> Outputs:
        """Run the model; the features are the taps' values of this call."""
        outputs = self.model(batch)
        features, self._features = self._features, {}
        for path, value in features.items():
            owner, _, inner = path.partition(":")[0].partition(".")
            rows = batch.present[inner.split(".")[0]] if owner == "encoders" else None
            if rows is not None and not bool(rows.all()):  # the encoder read only the rows that have its modality
                features[path] = spread(value[rows] if len(value) == len(rows) else value, rows)
        return outputs._replace(features=features)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


def only(batch: Batch, modality: str) -> Batch:
    """The same rows with just one modality present."""
    present = {name: mask if name == modality else torch.zeros_like(mask) for name, mask in batch.present.items()}
    return batch._replace(present=present)
