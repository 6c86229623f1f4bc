"""A text encoder of LSTM or GRU layers, without packed sequences, so that its graph takes any batch and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.dropout import Dropout
from distill.fusion.base import masked_mean
from distill.multimodal import Encoded
from students.sizes import check_sizes
from students.text import TextEncoder, cleared

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""Where ONNX's gates stand in torch's weights: input, output, forget, cell; update, reset, hidden."""
Cell = Literal["lstm", "gru"]
Pooling = Literal["mean", "last", "attention"]


class RecurrentLayer(nn.Module):
    """A recurrence from the first token on and, beside it, one from each row's last token back."""

    def __init__(self, cell: Cell, in_dim: int, hidden: int, bidirectional: bool) -> None:
        super().__init__()
        self.cell, self.hidden = cell, hidden
        self.ahead = CELLS[cell](in_dim, hidden, batch_first=True)
        self.back = CELLS[cell](in_dim, hidden, batch_first=True) if bidirectional else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map [B, L, in] to states [B, L, hidden · directions].

        Args:
            x: each row's tokens first, then padding, where states mean nothing.
            lengths: int64 [B], tokens of each row.
        """
        if torch.onnx.is_in_onnx_export():
            return self._as_operator(x, lengths)
        ahead = self.ahead(x)[0]
        if self.back is None:
            return ahead
        back = self.back(reversed_within(x, lengths))[0]
        return torch.cat([ahead, reversed_within(back, lengths)], dim=2)

    def _as_operator(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The same by ONNX's own operator, since torch traces a recurrence for the length of its example alone."""
        order = GATES[self.cell]
        modules = [self.ahead] if self.back is None else [self.ahead, self.back]
        weights, recurrent, biases = zip(*(_of_gates(module, order) for module in modules), strict=True)
        direction = "forward" if self.back is None else "bidirectional"
        attributes: dict[str, Any] = {"hidden_size": self.hidden, "direction": direction}
        if self.cell == "gru":
            attributes["linear_before_reset"] = 1
        rows, length, directions = x.shape[0], x.shape[1], len(modules)
        states = torch.onnx.ops.symbolic(
            self.cell.upper(),
            [x.transpose(0, 1), *map(torch.stack, (weights, recurrent, biases)), lengths.clamp(min=1).int()],
            attributes,
            dtype=x.dtype,
            shape=(length, directions, rows, self.hidden),
            version=14,
        )
        return states.permute(2, 0, 1, 3).flatten(2)


class AttentionPool(nn.Module):
    """``sum_t softmax_t(u · tanh(W h_t + b)) h_t`` (the word attention of Yang et al. 2016, ACL N16-1174)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Weigh states [B, L, D] under mask bool [B, L]: [B, D]."""
        bias = (~mask).to(states.dtype) * -1e4
        weights = (self.score(states)[..., 0] + bias).softmax(1)
        return (states * weights[..., None]).sum(1)


class RecurrentText(TextEncoder):
    """LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014, arXiv 1406.1078) over token embeddings.

    Tokens are the last layer's states, both directions side by side (Schuster & Paliwal 1997), zero at padding. The
    direction back reads each row reversed within its own length, so states do not depend on the padding. A text without
    tokens gives zeros.

    Args:
        tokenizer_file: the ``tokenizer.json`` whose ids index the table.
        vocab_size: rows of the table.
        dim: width of the table.
        max_length: tokens a text is cut to, closing token included.
        cell: "lstm" or "gru".
        hidden: width of one direction's states; D is that times the directions.
        layers: how many follow one another.
        bidirectional: whether each layer also reads from the last token back.
        pooling: "mean" of the states; "last", each direction's after its last token; "attention", a learned mean.
        dropout: probability of dropping a feature between layers, and of the pooled vector, in training.

    Raises:
        ValueError: a size is not positive.
    """

    unprunable = "gates and states of a recurrence have one width, which pruning does not cut"

    def __init__(
        self,
        *,
        tokenizer_file: str | Path,
        vocab_size: int,
        dim: int,
        max_length: int = 32,
        cell: Cell = "lstm",
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = True,
        pooling: Pooling = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(tokenizer_file, vocab_size, dim, max_length)
        check_sizes(hidden=hidden, layers=layers)
        self.hidden, self.pooling, self.bidirectional = hidden, pooling, bidirectional
        self.out_dim = hidden * (2 if bidirectional else 1)
        widths = [dim, *[self.out_dim] * (layers - 1)]
        self.layers = nn.ModuleList(RecurrentLayer(cell, width, hidden, bidirectional) for width in widths)
        self.attention = AttentionPool(self.out_dim) if pooling == "attention" else None
        self.dropout = Dropout(dropout)

    def forward(self, inputs: dict[str, Tensor]) -> Encoded:
        """Read ``text`` int64 [B, L] under ``text_mask`` bool [B, L], tokens first; tokens [B, L, D], pooled [B, D]."""
        mask = inputs["text_mask"]
        states, lengths = self.table(inputs["text"]), mask.sum(1)
        for number, layer in enumerate(self.layers):
            states = layer(self.dropout(states) if number else states, lengths)
        states = cleared(states, mask)
        return Encoded(states, mask, self.dropout(self._pooled(states, mask, lengths)))

    def _pooled(self, states: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        if self.attention is not None:
            return self.attention(states, mask)
        if self.pooling == "mean":
            return masked_mean(states, mask)
        end = (lengths - 1).clamp(min=0)[:, None, None]
        ahead = states[..., : self.hidden].gather(1, end.expand(-1, 1, self.hidden))[:, 0]
        return torch.cat([ahead, states[:, 0, self.hidden :]], dim=1) if self.bidirectional else ahead


def reversed_within(x: Tensor, lengths: Tensor) -> Tensor:
    """Rows of x [B, L, D], each with its first lengths int64 [B] tokens reversed, and its padding where it was."""
    places, ends = torch.arange(x.shape[1], device=x.device)[None], lengths[:, None]
    order = torch.where(places < ends, ends - 1 - places, places)
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _of_gates(module: nn.RNNBase, order: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of inputs and of states and both biases of a recurrence, gates in an order."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    parts = [getattr(module, name).chunk(len(order)) for name in names]
    of_inputs, of_states, *biases = (torch.cat([gates[place] for place in order]) for gates in parts)
    return of_inputs, of_states, torch.cat(biases)
