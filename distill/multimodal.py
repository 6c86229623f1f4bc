"""Encoders + fusion + heads = one model, and taps that read its inner features.

Logits are decided by the fused head and one head a modality, by default as their mean: attention fusion alone
overfits small data, while single-modality heads keep each encoder useful on its own and let any subset of modalities
answer. Train each head with a loss of its own: under a loss on the mean alone, the fused head learns only to correct
the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill.contracts import Batch, Outputs
from distill.decision import Decision
from distill.dropout import Dropout
from distill.encoders import Encoded, Encoder, encode_exchanging, encode_present, spread
from distill.exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Iterator


__all__ = [
    "MEMBER",
    "Encoded",
    "Encoder",
    "MultimodalModel",
    "Neck",
    "OneModality",
    "PlainNeck",
    "Reader",
    "by_member",
    "encode_present",
    "evaluating",
    "spread",
]

MEMBER = "@"  # "TASK@1" is what the ensemble's second member answers in training, when no teacher answers "TASK@NAME"


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


class PlainNeck(Dropout):
    """The encoder's own vector, in its own width."""

    def project(self, x: Tensor) -> Tensor:
        """Return [..., in_dim] as it is."""
        return x


class Reader(nn.Module):
    """Necks, a fusion block, heads and embedders: what answers from encoded modalities.

    Args:
        widths: modality -> D of its encoder.
        fusion: the fusion block.
        heads: task -> head on the fused vector.
        unimodal_heads: task -> modality -> head on that modality's pooled vector; may be empty.
        dim: width of the fusion.
        embedding_dim: width of the shared embedding space.
        head_weights: "fused" or a modality -> weight of its head in a task's logits; 1 by default.
        decision: how heads decide together; see :class:`~distill.decision.Decision`.
        modality_dropout: probability, in training, that a row loses one of its present modalities.
        dropout: probability of dropping a feature of a pooled vector or token on its way to the fusion, in training.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        fusion: nn.Module,
        heads: dict[str, nn.Module],
        unimodal_heads: dict[str, dict[str, nn.Module]],
        *,
        dim: int,
        embedding_dim: int,
        head_weights: Mapping[str, float] | None = None,
        decision: str = "mean",
        modality_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.decision = Decision(decision, unimodal_heads, list(widths), head_weights or {})
        own, names = fusion.plain, [*widths, "fused"]
        necks = {name: PlainNeck(dropout) if own else Neck(width, dim, dropout) for name, width in widths.items()}
        self.necks = nn.ModuleDict(necks)
        by_token = widths if fusion.reads_tokens or any(head.reads_tokens for head in heads.values()) else {}
        self.token_necks = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, dim), Dropout(dropout)) for name, width in by_token.items()}
        )
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads)
        self.unimodal_heads = nn.ModuleDict({task: nn.ModuleDict(by) for task, by in unimodal_heads.items()})
        self.embedders = nn.ModuleDict({n: nn.Identity() if own else nn.Linear(dim, embedding_dim) for n in names})
        self.modality_dropout = modality_dropout

    def read(
        self, encoded: Mapping[str, Encoded], present: dict[str, Tensor], targets: Mapping[str, Tensor]
    ) -> Outputs:
        """Answer from what the encoders gave.

        Args:
            encoded: of each modality.
            present: modality -> bool [B]; in training, of :meth:`dropped`.
            targets: task -> int64 [B, L], of heads that write, if they are not to write by themselves.

        Returns:
            logits ``task``, ``task.fused`` and ``task.modality``, each [B, C], of heads that write ``task`` [B, L, V]
            or what they wrote, int64 [B, L]; embeddings of each modality and "fused", each [B, E].
        """
        pooled = {name: self.necks[name](item.pooled) for name, item in encoded.items()}
        tokens = {name: neck(encoded[name].tokens) for name, neck in self.token_necks.items()}
        masks = {name: item.mask for name, item in encoded.items()}
        fused = self.fusion(tokens, masks, pooled, present)

        logits: dict[str, Tensor] = {}
        for task, head in self.heads.items():
            if head.reads_tokens:
                there = {name: mask & present[name][:, None] for name, mask in masks.items()}
                parts = list(tokens.values()), list(there.values())
                places = [torch.arange(part.shape[1], device=part.device) for part in parts[0]]
                everything = (*(torch.cat(part, dim=1) for part in parts), torch.cat(places))
                logits[task] = head(fused, *everything, targets.get(task))
            else:
                logits |= self._logits(task, head(fused), pooled, present)
        vectors = {**pooled, "fused": fused}
        return Outputs(logits, {name: embed(vectors[name]) for name, embed in self.embedders.items()}, {})

    def _logits(
        self, task: str, fused: Tensor, pooled: dict[str, Tensor], present: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A task's logits, and those of its heads."""
        if task not in self.unimodal_heads:
            return {task: fused}
        heads: Any = self.unimodal_heads[task]
        alone = {name: head(pooled[name]) for name, head in heads.items()}
        decided = self.decision(task, fused, alone, present)
        return {f"{task}.fused": fused, **{f"{task}.{m}": logits for m, logits in alone.items()}, task: decided}

    def dropped(self, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """In training, let some rows that have every modality lose one at random."""
        if not self.training or not self.modality_dropout or len(present) < 2:
            return present
        stacked = torch.stack(list(present.values()), dim=1)
        lost = torch.rand(len(stacked), device=stacked.device) < self.modality_dropout
        which = torch.randint(stacked.shape[1], (len(stacked),), device=stacked.device)
        drop = torch.nn.functional.one_hot(which, stacked.shape[1]).bool() & (lost & stacked.all(1))[:, None]
        return dict(zip(present, (stacked & ~drop).unbind(1), strict=True))


class MultimodalModel(Reader):
    """Several encoders whose tokens meet in a fusion block, with heads for each task.

    With ``others`` it is an ensemble whose members share the encoders, which therefore run once. In training each one
    answers for itself, and has a loss of its own; later their logits are averaged.

    Args:
        encoders: modality -> encoder.
        others: further members, beside the one that the other arguments describe.
        exchange: what the encoders tell each other between their stages; for a model of one member.
        arguments: of :class:`Reader`.
    """

    def __init__(
        self,
        encoders: dict[str, Encoder],
        *arguments: Any,
        others: Sequence[Reader] = (),
        exchange: Exchange | None = None,
        **options: Any,
    ) -> None:
        super().__init__({name: encoder.out_dim for name, encoder in encoders.items()}, *arguments, **options)
        self.encoders = nn.ModuleDict(encoders)
        self.others = nn.ModuleList(others)
        self.exchange = exchange

    @property
    def members(self) -> list[Reader]:
        """Itself, and the others."""
        return [self, *self.others]

    def forward(self, batch: Batch) -> Outputs:
        """Return logits of every task (and of its single heads) and embeddings.

        Args:
            batch: inputs and presence of the model's modalities.

        Returns:
            As :meth:`Reader.read`. Embeddings of an ensemble are its members', side by side: [B, members * E]. In
            training it gives each member's answers, under names that :func:`by_member` takes apart.
        """
        present = {name: batch.present[name] for name in self.encoders}
        if self.exchange is not None:
            present = self.dropped(present)
            encoders: Any = dict(self.encoders)
            return self.read(encode_exchanging(encoders, self.exchange, batch, present), present, batch.targets)
        encoded = {name: encode_present(encoder, name, batch) for name, encoder in self.encoders.items()}
        answers = [member.read(encoded, member.dropped(present), batch.targets) for member in self.members]
        if len(answers) == 1:
            return answers[0]
        if self.training:
            return _side_by_side(answers)
        logits = {name: torch.stack([a.logits[name] for a in answers]).mean(0) for name in answers[0].logits}
        embeddings = {name: torch.cat([a.embeddings[name] for a in answers], 1) for name in answers[0].embeddings}
        return Outputs(logits, embeddings, {})

    def project(self, modality: str, pooled: Tensor) -> Tensor:
        """The linear parts of all members' necks, side by side: [V, D] to [V, members * dim]."""
        necks: list[Any] = [member.necks[modality] for member in self.members]
        return torch.cat([neck.project(pooled) for neck in necks], dim=1)


def _side_by_side(answers: Sequence[Outputs]) -> Outputs:
    """Answers of an ensemble's members in one, under names of their own."""
    named: dict[str, dict[str, Tensor]] = {"logits": {}, "embeddings": {}}
    for number, answer in enumerate(answers):
        for part, values in named.items():
            values |= {f"{name}{MEMBER}{number}": value for name, value in getattr(answer, part).items()}
    return Outputs(**named, features={})


def by_member(outputs: Outputs) -> list[Outputs]:
    """The answers of an ensemble's members, from what it gives in training; any other model's as they are."""
    if not any(MEMBER in name for name in outputs.logits):
        return [outputs]
    found: dict[str, Outputs] = {}
    for part in ("logits", "embeddings"):
        for full, value in getattr(outputs, part).items():
            name, _, number = full.partition(MEMBER)
            answer = found.setdefault(number, Outputs({}, {}, outputs.features))
            getattr(answer, part)[name] = value
    return list(found.values())


class OneModality(nn.Module):
    """One encoder of a model with its neck and heads: shares their parameters, and answers from them alone.

    Args:
        model: the model; it has single-modality heads.
        modality: which encoder.
        member: of an ensemble, whose neck and heads; by default the first's.
    """

    def __init__(self, model: MultimodalModel, modality: str, member: Reader | None = None) -> None:
        super().__init__()
        reader = member or model
        self.modality = modality
        self.encoders = nn.ModuleDict({modality: model.encoders[modality]})
        self.neck = reader.necks[modality]
        self.heads = nn.ModuleDict({task: heads[modality] for task, heads in reader.unimodal_heads.items()})  # type: ignore[index]

    def forward(self, batch: Batch) -> Outputs:
        """Return logits ``task.modality``, [B, C], and the same as ``task``."""
        pooled = self.neck(encode_present(self.encoders[self.modality], self.modality, batch).pooled)
        logits = {task: head(pooled) for task, head in self.heads.items()}
        return Outputs({**logits, **{f"{task}.{self.modality}": value for task, value in logits.items()}}, {}, {})


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
