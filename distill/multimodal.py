"""Encoders + fusion + heads = one model, and taps that read its inner features.

Logits are decided by the fused head and one head a modality, by default as their mean: attention fusion alone
overfits small data, while single-modality heads keep each encoder useful on its own and let any subset of modalities
answer. Train each head with a loss of its own: under a loss on the mean alone, the fused head learns only to correct
the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.contracts import Batch, Outputs
from distill.decision import Decision
from distill.dropout import Dropout
from distill.exchange import HIDDEN, HIDDEN_MASK, Exchange, Hidden, excited, squeezed

if TYPE_CHECKING:
    from collections.abc import Iterator


MEMBER = "@"  # "TASK@1" is what the ensemble's second member answers in training, when no teacher answers "TASK@NAME"


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
        frozen: whether its parameters are fixed; outputs may then be computed once and kept.
        projected: whether its pooled vector lies in an embedding space that it shares with another encoder.
        unprunable: why it has no channels that pruning could remove; empty where it has some.
        keep_float: its modules that int8 would spoil, such as a spectrogram.
        stage_widths: channels behind each of its stages; empty where it cannot stop between them for an exchange.
        own_scale: ``logit_scale``, and ``logit_bias`` where there is one, that its weights were trained with.
    """

    reads: str  # its modality
    out_dim: int
    frozen: bool = False
    projected: bool = False
    unprunable: str = ""
    keep_float: tuple[str, ...] = ()
    stage_widths: tuple[int, ...] = ()
    own_scale: Mapping[str, float] = {}

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Encode a batch; one that has stages goes on behind the last where it is given ``HIDDEN``."""
        raise NotImplementedError

    def begin(self, inputs: dict[str, Tensor]) -> Hidden:
        """What the first stage reads."""
        raise NotImplementedError

    def advance(self, stage: int, hidden: Hidden) -> Hidden:
        """Run one stage, counted from 0."""
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
                everything = torch.cat(list(tokens.values()), dim=1), torch.cat(list(there.values()), dim=1)
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


def encode_present(encoder: Any, name: str, batch: Batch) -> Encoded:
    """Encode the rows that have a modality; the others get zeros, take no time and enter no batch statistics.

    An exported graph has no such choice: it encodes blank inputs, and the masks of ``present`` keep them out of logits.

    Args:
        encoder: the modality's encoder.
        name: the modality.
        batch: may lack the modality's inputs where no row has it.
    """
    present, inputs = batch.present[name], batch.inputs_of(name)
    if not inputs:
        nothing = torch.zeros(len(present), 1, encoder.out_dim, device=present.device)
        return Encoded(nothing, torch.zeros_like(present)[:, None], nothing[:, 0])
    if torch.compiler.is_exporting():
        return encoder(inputs)
    given = present[: len(next(iter(inputs.values())))]
    if len(given) and bool(given.all()):
        return Encoded(*(_lengthened(part, len(present)) for part in encoder(inputs)))
    if bool(given.any()):
        return Encoded(*(spread(part, present) for part in encoder({k: v[given] for k, v in inputs.items()})))
    rows, training = len(given), encoder.training  # nobody has it: shapes for taps, and no batch statistics
    blank = inputs if rows else {k: v.new_ones((1, *v.shape[1:])) for k, v in inputs.items()}  # transformers want one
    encoded = encoder.eval()(blank)
    encoder.train(training)
    return Encoded(*(spread(part[:rows][given], present) for part in encoded))


def encode_exchanging(
    encoders: Mapping[str, Encoder], exchange: Exchange, batch: Batch, present: Mapping[str, Tensor]
) -> dict[str, Encoded]:
    """Encode the rows that have a modality, stage by stage, with an exchange in between.

    Args:
        encoders: modality -> encoder with ``stage_widths``.
        exchange: what is told behind which stages.
        batch: may lack a modality's inputs where no row has it.
        present: modality -> bool [B], what others are told of.

    Returns:
        As :func:`encode_present` of each.
    """
    everywhere = torch.compiler.is_exporting()
    given = {name: inputs for name in encoders if (inputs := batch.inputs_of(name))}
    rows = {name: batch.present[name][: len(next(iter(inputs.values())))] for name, inputs in given.items()}
    if not everywhere:
        rows = {name: here for name, here in rows.items() if bool(here.any())}
        given = {name: {k: v[here] for k, v in given[name].items()} for name, here in rows.items()}
    hidden, done = {name: encoders[name].begin(given[name]) for name in rows}, dict.fromkeys(rows, 0)
    size = len(batch.ids)

    def whole(name: str, values: Tensor) -> Tensor:
        if everywhere:
            return values
        here = torch.nn.functional.pad(rows[name], (0, size - len(rows[name])))
        return spread(values, here)

    def advance(name: str, until: int) -> None:
        for stage in range(done[name], until):
            hidden[name] = encoders[name].advance(stage, hidden[name])
        done[name] = until

    for number, until in enumerate(exchange.at):
        for name in rows:
            advance(name, until)
        told = {name: whole(name, squeezed(hidden[name])) for name in rows}
        gates = exchange(number, told, present)
        for name, here in rows.items():
            own = gates[name] if everywhere else gates[name][: len(here)][here]
            hidden[name] = excited(hidden[name], own)
    encoded = {}
    for name, encoder in encoders.items():
        if name not in rows:
            encoded[name] = encode_present(encoder, name, batch)
            continue
        advance(name, len(encoder.stage_widths))
        last = encoder({HIDDEN: hidden[name].values, HIDDEN_MASK: hidden[name].mask})
        encoded[name] = Encoded(*(whole(name, part) for part in last))
    return encoded


def spread(values: Tensor, rows: Tensor) -> Tensor:
    """Put values [M, ...] at the M rows that are True in bool [B], zeros elsewhere: [B, ...]."""
    return values.new_zeros((len(rows), *values.shape[1:])).index_put((rows,), values)


def _lengthened(values: Tensor, rows: int) -> Tensor:
    """Values with zeros behind them, up to a number of rows."""
    missing = rows - len(values)
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))]) if missing else values


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
