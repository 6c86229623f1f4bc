"""What an encoder is, and how a batch is encoded: its rows that have a modality, in one go or stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.contracts import Batch
from distill.exchange import HIDDEN, HIDDEN_MASK, Exchange, Hidden, excited, squeezed


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
        word_table: path in it of the embedding whose rows token ids name; empty where it reads no tokens.
        token_rows: the row there of each of the tokenizer's ids, after rows were pruned; empty where they are the ids.
    """

    reads: str  # its modality
    out_dim: int
    frozen: bool = False
    projected: bool = False
    unprunable: str = ""
    keep_float: tuple[str, ...] = ()
    stage_widths: tuple[int, ...] = ()
    own_scale: Mapping[str, float] = {}
    word_table: str = ""
    token_rows: tuple[int, ...] = ()

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
    halfway = {name: half for name, encoder in encoders.items() if (half := _halfway(encoder, name, batch))}
    for number, until in enumerate(exchange.at):
        told = {name: half.tell(until) for name, half in halfway.items()}
        for name, gates in exchange(number, told, present).items():
            halfway[name].hear(gates)
    return {
        name: halfway[name].finish() if name in halfway else encode_present(encoder, name, batch)
        for name, encoder in encoders.items()
    }


class _Halfway:
    """An encoder between two of its stages, on the rows of a batch that have its modality; on all where None."""

    def __init__(self, encoder: Encoder, inputs: dict[str, Tensor], rows: Tensor | None) -> None:
        self.encoder, self.rows, self.stage = encoder, rows, 0
        self.hidden = encoder.begin(inputs if rows is None else {k: v[rows[: len(v)]] for k, v in inputs.items()})

    def tell(self, until: int) -> Tensor:
        """Run on through a stage, counted from 1, and return what it made, squeezed: [B, C], zeros in other rows."""
        for stage in range(self.stage, until):
            self.hidden = self.encoder.advance(stage, self.hidden)
        self.stage = until
        return self._whole(squeezed(self.hidden))

    def hear(self, gates: Tensor) -> None:
        """Multiply channels with gates [B, C]."""
        self.hidden = excited(self.hidden, gates if self.rows is None else gates[self.rows])

    def finish(self) -> Encoded:
        """Run on to the end."""
        for stage in range(self.stage, len(self.encoder.stage_widths)):
            self.hidden = self.encoder.advance(stage, self.hidden)
        encoded = self.encoder({HIDDEN: self.hidden.values, HIDDEN_MASK: self.hidden.mask})
        return Encoded(*(self._whole(part) for part in encoded))

    def _whole(self, values: Tensor) -> Tensor:
        return values if self.rows is None else spread(values, self.rows)


def _halfway(encoder: Encoder, name: str, batch: Batch) -> _Halfway | None:
    """The beginning of an encoder; nothing where no row has its modality."""
    inputs, present = batch.inputs_of(name), batch.present[name]
    if inputs and torch.compiler.is_exporting():
        return _Halfway(encoder, inputs, None)
    if not inputs or not bool(present.any()):
        return None
    return _Halfway(encoder, inputs, present)


def spread(values: Tensor, rows: Tensor) -> Tensor:
    """Put values [M, ...] at the M rows that are True in bool [B], zeros elsewhere: [B, ...]."""
    return values.new_zeros((len(rows), *values.shape[1:])).index_put((rows,), values)


def _lengthened(values: Tensor, rows: int) -> Tensor:
    """Values with zeros behind them, up to a number of rows."""
    missing = rows - len(values)
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))]) if missing else values
