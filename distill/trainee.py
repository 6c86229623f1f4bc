"""What is trained: a model and its objective as one module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distill import rounding
from distill.balance import Balance
from distill.contracts import Batch, Outputs, UserError
from distill.data.transforms import resize_images
from distill.losses.objective import Objective
from distill.losses.terms import tap_paths
from distill.ranks import Ranks
from distill.sharding import Shards
from distill.tapped import Tapped

Watch = Callable[[str], AbstractContextManager[Any]]
"""Gives a context for a named part of a step, in which its time may be taken."""

log = logging.getLogger(__name__)


class Trainee(nn.Module):
    """The trained model and its objective as one module: what is optimized, averaged and checkpointed.

    Args:
        tapped: the model, with its taps.
        objective: the terms.
        watch: takes the time of their parts.
        compiled: let torch.compile make faster code of the model; names and evaluation stay.
        channels_last: keep weights and inputs of convolutions with the channels innermost.
    """

    def __init__(
        self,
        tapped: Tapped,
        objective: Objective,
        watch: Watch = nullcontext,
        *,
        compiled: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.watch = tapped.model, objective, watch
        self._call: Callable[[Batch], Outputs] = _compiled(tapped) if compiled else tapped
        self._channels_last = channels_last
        self.image_size: int | None = None  # pixels to which training shrinks images
        self.shards: Shards | None = None
        self.balance: Balance | None = None
        if channels_last:
            self.model.to(memory_format=torch.channels_last)

    def forward(
        self, batch: Batch, teacher: Outputs | None, shares: list[float] | None = None, ranks: Ranks | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and each term's value; see :meth:`Objective.forward`."""
        return self.loss(self.answer(batch), teacher, batch, shares, ranks)

    def advance(self, step: int, total: int) -> None:
        """Begin a step, from 0, of all."""
        self.objective.advance(step, total)
        rounding.advance(self.model, step, total)
        if self.balance is not None:
            self.balance.advance(step, total)

    def forget(self) -> None:
        """Drop what a step that is not finished would leave behind."""
        self.objective.forget()
        if self.balance is not None:
            self.balance.forget()

    def shard(self, ranks: Ranks) -> None:
        """Leave this rank's part of all weights here, on the ranks' device.

        Raises:
            UserError: the terms read taps alone.
        """
        if ranks.count == 1:
            log.warning("train.shard: one process has nobody to share weights with; they stay whole")
            return
        if all(term.taps for term in self.objective.terms):
            raise UserError(
                "train.shard needs a term on logits or embeddings beside those on taps; add one or unset it"
            )
        self.shards = Shards(self.model, self.objective, tap_paths(self.objective.terms, "student"), ranks)

    def answer(self, batch: Batch) -> Outputs:
        """The model's outputs and taps; where a batch has no row, or one too few for BatchNorm, with its averages."""
        if self.training and not len(batch.ids):
            return self._with_averages(batch)
        try:
            with self.watch("student"):
                return self._call(self._prepared(batch))
        except ValueError as error:
            if not self.training or "more than 1 value per channel" not in str(error):
                raise
            return self._with_averages(batch)

    def _with_averages(self, batch: Batch) -> Outputs:
        """The same as after training: without dropout, and with the statistics that BatchNorm has gathered."""
        self.eval()
        outputs = self.answer(batch)
        self.train()
        return outputs

    def _prepared(self, batch: Batch) -> Batch:
        """The batch with its images at the size and in the memory format asked for."""
        images = batch.inputs.get("image")
        if images is None or images.ndim != 4:  # none, or what a frozen tower made of them
            return batch
        if self.training and self.image_size:
            images = resize_images(images, self.image_size)
        if self._channels_last:
            images = images.to(memory_format=torch.channels_last)
        return batch._replace(inputs={**batch.inputs, "image": images})

    def loss(
        self, outputs: Outputs, teacher: Outputs | None, batch: Batch, shares: list[float] | None, ranks: Ranks | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of outputs."""
        if self.shards:  # a unit gives a gradient of zero to each of its inputs that it does not read
            outputs = self.objective.without_unread(outputs)
        if self.balance is not None:
            self.balance.see(outputs, batch)
        with self.watch("loss"):
            return self.objective(outputs, teacher, batch, shares, ranks)


def _compiled(tapped: Tapped) -> Callable[[Batch], Outputs]:
    torch.compiler.reset()  # code made for another model has not this one's taps, and nothing would check that
    fast = torch.compile(tapped.__call__)

    def call(batch: Batch) -> Outputs:
        try:
            return fast(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).splitlines()[:2])
            raise UserError(f"train.compile: torch cannot compile the model here ({why}); set it to false") from error

    return call
