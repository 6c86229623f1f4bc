"""The processes that train one model together: what they add up, gather and wait for.

Under ``torchrun`` or ``accelerate launch`` each process is a rank with its slice of every global batch. Sums and
gathered rows are such that K ranks compute what one would on the joined batch. Alone, all of this costs nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from distill.contracts import UserError

PATIENCE = timedelta(hours=12)  # the others wait while the first exports and measures
BUCKET = 25_000_000  # bytes of gradients that are added up at once

log = logging.getLogger(__name__)


class Ranks:
    """This process among ``count``.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return PartialState().device

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.count > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' tensors, which have one shape; detached."""
        if self.count == 1:
            return values.detach()
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def largest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """Element by element the largest of all ranks' numbers."""
        if self.count == 1:
            return list(values)
        found = torch.tensor(list(values), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in order of rank: [B_0 + B_1 + ..., ...] from this rank's [B_r, ...].

        Gradients flow back into this rank's rows, from the losses of all ranks.
        """
        return rows if self.count == 1 else _Gather.apply(rows)

    def gather_bytes(self, data: bytes, device: torch.device) -> list[bytes]:
        """Every rank's bytes, in order of rank."""
        if self.count == 1:
            return [data]
        own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)].to(device)  # it refuses none
        return [bytes(part.cpu().numpy()) for part in gather_uneven(own)]

    def average(self, values: Iterable[Tensor]) -> None:
        """Replace tensors in place by their mean over the ranks."""
        if self.count > 1:
            for value in values:
                dist.all_reduce(value)
                value.div_(self.count)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sum over the ranks; a parameter without one on any rank stays without."""
        if self.count == 1:
            return
        trained = list(parameters)
        has = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32)
        used = self.sum(has.to(trained[0].device)).tolist()
        for parameter, number in zip(trained, used, strict=True):
            if number and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))


def join() -> Ranks:
    """Join the process group of a launcher, if there is one, and return this process's place in it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(timeout=PATIENCE)
    return Ranks()


def leave() -> None:
    """Leave the process group at the end of all work: a process that just ends may abort in the group's threads.

    Not after a failure, where the others may never answer.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def accelerator_for(precision: str) -> Accelerator:
    """What gives a training its device, and fp16 its scaler.

    Raises:
        UserError: the device cannot compute in that precision, or the launcher wants what is not supported.
    """
    _check_launcher(precision)
    AcceleratorState._reset_state()  # one process trains several stages, each in a precision of its own
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"train.precision: {precision!r} cannot be used here: {error}") from error
    if precision == "fp16" and accelerator.scaler is None:  # Accelerate would compute in float32 without a word
        raise UserError(f"train.precision: 'fp16' needs a GPU, this is {accelerator.device.type}; use 'no' or 'bf16'")
    return accelerator


def _check_launcher(precision: str) -> None:
    """Tell what `accelerate launch` was asked for and a recipe decides."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "DeepSpeed is not supported; launch without it, and set train.shard to split weights over ranks"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        log.warning("the launcher's FSDP settings are not read; train.shard splits weights")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        log.warning("the launcher asks for %s; the recipe's train.precision, %s, is what counts", asked, precision)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = gather_uneven(rows)
        ctx.sizes = [len(part) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()]


def gather_uneven(rows: Tensor) -> list[Tensor]:
    """Every rank's rows, which may differ in number but not in shape and type; without gradients."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one type, up to a number of bytes."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size + tensor.nbytes > BUCKET or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.nbytes
    return buckets
