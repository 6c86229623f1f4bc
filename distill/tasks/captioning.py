"""A decoder that writes a caption word by word, reading the tokens of all modalities and their fusion."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.contracts import IGNORE
from distill.dropout import Dropout
from distill.fusion.attention import CrossAttention
from distill.targets import FIRST, LAST, PAD

LOWEST = -1e4  # in place of minus infinity, which some runtimes do not take


class Memory(NamedTuple):
    """What a decoder reads at every step: of each block the keys and values of the context, and its mask.

    Attributes:
        keys: [B, heads, S, D / heads] a block.
        values: the same.
        bias: [B, 1, 1, S], 0 where the context may be read.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor

    def repeated(self, times: int) -> Memory:
        """Each row so many times, one after the other."""
        keys, values = ([each.repeat_interleave(times, 0) for each in part] for part in (self.keys, self.values))
        return Memory(keys, values, self.bias.repeat_interleave(times, 0))


def sinusoids(places: Tensor, dim: int) -> Tensor:
    """A vector for each place [S] (Vaswani et al. 2017, section 3.5): float32 [S, dim], sines, then cosines."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=places.device) * (-math.log(10000) / half))
    angles = places[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, cross-attention and MLP, all residual."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = CrossAttention(dim, heads, dropout)
        self.cross_attention = CrossAttention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, bias: Tensor, causal: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Update new positions.

        Args:
            x: [B, T, D].
            past: keys and values of earlier positions, [B, heads, P, D / heads]; None at the first.
            keys: those of the context, [B, heads, S, D / heads].
            values: the same.
            bias: [B, 1, 1, S].
            causal: [T, P + T], 0 where a position may read another.

        Returns:
            x, and keys and values of all positions so far.
        """
        y = self.norm_self(x)
        own = self.self_attention.remember(y)
        if past is not None:
            own = (torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2))
        x = x + self.dropout(self.self_attention.attend(y, *own, causal))
        x = x + self.dropout(self.cross_attention.attend(self.norm_cross(x), keys, values, bias))
        return x + self.dropout(self.mlp(self.norm_mlp(x))), own


class CaptionHead(nn.Module):
    """A transformer decoder (Vaswani et al. 2017, arXiv 1706.03762) over the fused vector and all modalities' tokens.

    In training it is given the true words before each position (teacher forcing), and gives logits. Without targets it
    writes: at each position the most probable word, or with :meth:`beam_search` the most probable caption. Keys and
    values of what was read and written are kept, so a word costs one position.

    Args:
        in_dim: D, width of fusion and tokens.
        num_outputs: V, tokens of the vocabulary.
        length: L, most tokens of a caption, the closing one included.
        depth: blocks.
        heads: attention heads; divides D.
        dropout: probability of dropping a feature or an attention weight in training.

    Raises:
        ValueError: ``heads`` does not divide ``in_dim``, or there is no block.
    """

    reads_tokens = True
    beams = 1
    """Captions that are continued at each step where it writes."""

    def __init__(
        self, in_dim: int, num_outputs: int, *, length: int, depth: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth} leaves no block; give 1 or more")
        self.length = length
        self.words = nn.Embedding(num_outputs, in_dim)
        self.positions = nn.Embedding(length, in_dim)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=in_dim**-0.5)
        self.norm_context = nn.LayerNorm(in_dim)
        self.blocks = nn.ModuleList(DecoderBlock(in_dim, heads, dropout) for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(in_dim), nn.Linear(in_dim, num_outputs)
        self.dropout = Dropout(dropout)

    def forward(self, fused: Tensor, tokens: Tensor, mask: Tensor, places: Tensor, targets: Tensor | None) -> Tensor:
        """Answer with logits where there are targets, and else with what it writes.

        Args:
            fused: [B, D].
            tokens: [B, S, D], of all modalities.
            mask: bool [B, S].
            places: int64 [S], of each token among those of its modality, from 0 on.
            targets: int64 [B, L], true tokens up to the closing one, IGNORE behind it; or None.

        Returns:
            Logits [B, L, V] of each token under those before it; or int64 [B, L], PAD behind the closing one.
        """
        memory = self.read(fused, tokens, mask, places)
        if targets is None:
            return self.write(memory) if self.beams == 1 else self.beam_search(memory, self.beams)
        begin = torch.full_like(targets[:, :1], FIRST)
        given = torch.cat([begin, targets[:, :-1]], dim=1)
        given = torch.where(given == IGNORE, PAD, given)
        length = given.shape[1]
        written = torch.arange(length, device=given.device)
        causal = (written[:, None] < written).to(fused.dtype) * LOWEST
        return self._continue(given, written, [None] * len(self.blocks), memory, causal)[0]

    def read(self, fused: Tensor, tokens: Tensor, mask: Tensor, places: Tensor) -> Memory:
        """Return what every step reads of [B, D] and [B, S, D], with the places of the tokens.

        The fused vector is a token too, the first one, and always there. Places begin anew with each modality, so that
        padding behind a text moves nothing.
        """
        context = self.norm_context(torch.cat([fused[:, None], tokens], dim=1))
        context = context + sinusoids(F.pad(places + 1, (1, 0)), context.shape[2]).to(context.dtype)
        there = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        blocks: list[DecoderBlock] = list(self.blocks)  # type: ignore[arg-type]
        pairs = [block.cross_attention.remember(context) for block in blocks]
        bias = (~there).to(fused.dtype)[:, None, None, :] * LOWEST
        return Memory([keys for keys, _ in pairs], [values for _, values in pairs], bias)

    def write(self, memory: Memory) -> Tensor:
        """Return the captions whose every next token is the most probable one, int64 [B, L]."""
        first = memory.bias[:, 0, 0, :1].long()
        token, ended = torch.full_like(first, FIRST), torch.zeros_like(first, dtype=torch.bool)
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        written = []
        for place in range(self.length):
            logits, past = self._next(token, place, past, memory)
            token = torch.where(ended, PAD, logits.argmax(dim=-1))
            ended = ended | (token == LAST)
            written.append(token)
        return torch.cat(written, dim=1)

    @torch.no_grad()
    def beam_search(self, memory: Memory, beams: int = 4, penalty: float = 0.6) -> Tensor:
        """Return the best captions of a beam search, int64 [B, L], PAD behind the closing token.

        Captions are compared by ``log p / ((5 + length) / 6)^penalty`` (Wu et al. 2016, arXiv 1609.08144).

        Args:
            memory: of B rows.
            beams: K, captions that are continued at each step; 1 writes as :meth:`write` does.
            penalty: how far a longer caption may be less probable.
        """
        rows, device = len(memory.bias), memory.bias.device
        memory = memory.repeated(beams)
        written = torch.full((rows, beams, 0), PAD, device=device)
        scores = torch.full((rows, beams), float("-inf"), device=device)
        scores[:, 0] = 0  # all beams begin alike
        lengths = torch.zeros_like(scores)
        ended = torch.zeros_like(scores, dtype=torch.bool)
        token = torch.full((rows * beams, 1), FIRST, device=device)
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        for place in range(self.length):
            logits, past = self._next(token, place, past, memory)
            each = logits[:, 0].float().log_softmax(-1).view(rows, beams, -1)
            each = each.masked_fill(ended[..., None], float("-inf"))
            each[..., PAD] = torch.where(ended, 0.0, each[..., PAD])  # what has ended stays, at no cost
            total = scores[..., None] + each
            grown = (lengths + ~ended)[..., None].expand_as(total)
            ranked = total / ((5 + grown) / 6) ** penalty
            best = ranked.flatten(1).topk(beams, dim=1).indices
            beam, word = best // total.shape[-1], best % total.shape[-1]
            scores, lengths = total.flatten(1).gather(1, best), grown.flatten(1).gather(1, best)
            ended = ended.gather(1, beam) | (word == LAST)
            kept = written.gather(1, beam[..., None].expand(-1, -1, place))
            written = torch.cat([kept, word[..., None]], dim=2)
            rows_kept = (beam + beams * torch.arange(rows, device=device)[:, None]).flatten()
            past = [None if pair is None else (pair[0][rows_kept], pair[1][rows_kept]) for pair in past]
            token = word.view(-1, 1)
        return written[:, 0]

    def _next(
        self, token: Tensor, place: int, past: list[tuple[Tensor, Tensor] | None], memory: Memory
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        """Logits [B, 1, V] of the token behind one [B, 1] at a place, and what is remembered by then."""
        places = torch.full((1,), place, device=token.device)
        causal = memory.bias.new_zeros((1, place + 1))
        return self._continue(token, places, past, memory, causal)

    def _continue(
        self,
        given: Tensor,
        places: Tensor,
        past: list[tuple[Tensor, Tensor] | None],
        memory: Memory,
        causal: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        x = self.dropout(self.words(given) + self.positions(places))
        kept: list[tuple[Tensor, Tensor] | None] = []
        for block, before, keys, values in zip(self.blocks, past, memory.keys, memory.values, strict=True):
            x, own = block(x, before, keys, values, memory.bias, causal)
            kept.append(own)
        return self.output(self.norm(x)), kept
