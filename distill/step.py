"""One optimizer step on one global batch: its micro-batches, the sums over all ranks, and its guards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.averaging import join_teachers
from distill.batch_parts import take
from distill.config import TrainConfig
from distill.contracts import Batch, Outputs
from distill.gradient_cache import backward_in_parts
from distill.ranks import Ranks
from distill.resources import first_line, out_of_memory
from distill.runs import write_json
from distill.sharding import whole
from distill.trainee import Trainee

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
NOT_FINITE = "not_finite.json"
MOST_SKIPPED = 10  # steps in a row
MOST_OVERFLOWN = 40  # steps in a row; by then fp16's scale has fallen from 2^16 to 2^-24, where 1e12 fits

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class Stepper:
    """Makes the steps of one training run.

    Args:
        accelerator: gives the device, the precision and the scaler of fp16.
        ranks: who trains together.
        trainee: the trained module, on the device.
        optimizer: of its parameters.
        config: clipping, micro-batches, and what to do about values that are not finite.
        folder: where the rows of such steps are listed.
        own_teacher: answers the trained model's batch beside the teacher.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        ranks: Ranks,
        trainee: Trainee,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        folder: Path,
        own_teacher: Callable[[Batch], Outputs] | None = None,
    ) -> None:
        self.ranks, self.trainee, self.optimizer, self.config, self.folder = ranks, trainee, optimizer, config, folder
        self.device, self.scaler = accelerator.device, accelerator.scaler
        self.parameters = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
        self._own_teacher = own_teacher
        self.micro_batches = config.accumulate  # more once the memory did not suffice
        self.skipped = self.overflown = 0  # steps in a row
        self._buffers = list(trainee.model.buffers())
        self._statistics = [*self._buffers, *_batch_statistics(trainee.objective)]  # what a forward pass changes
        self._compares_ranks = ranks.count > 1 and any(trainee.objective.relational)
        if config.accumulate > 1 and _has_batch_norm(trainee.model):
            log.warning(
                "train.accumulate: BatchNorm sees each of the %d parts alone, so results differ from the whole batch's",
                config.accumulate,
            )

    def __call__(
        self, batches: dict[str, Batch], reads: str, ask: Callable[[dict[str, Batch]], Outputs] | None
    ) -> tuple[int, dict[str, float]]:
        """Make a step.

        Args:
            batches: this rank's slice of the global batch, for each model that reads it.
            reads: name of the trained model's batch.
            ask: the teacher.

        Returns:
            The rows of the global batch, and "loss" and each term's value over it, and those of
            :meth:`distill.balance.Balance.modulate` where modalities are balanced; no values if the step was skipped.

        Raises:
            TrainingError: the loss or its gradient is not finite, or the memory does not suffice for single rows.
        """
        batches = {name: batch.to(self.device) for name, batch in batches.items()}
        with self.trainee.watch("teacher"):
            teacher = ask(batches) if ask else None
            if self._own_teacher is not None:
                teacher = join_teachers(teacher, self._own_teacher(batches[reads]))
        before = [buffer.clone() for buffer in self._statistics] if self.config.not_finite != "raise" else []
        rows, values = self._gradients(batches[reads], teacher)
        with self.trainee.watch("optimizer"):
            return self._update(batches[reads], teacher, rows, values, before)

    def _update(
        self, batch: Batch, teacher: Outputs | None, rows: int, values: dict[str, float], before: list[Tensor]
    ) -> tuple[int, dict[str, float]]:
        """Balance, check, clip and apply the gradients."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        balanced = {} if self.trainee.balance is None else self.trainee.balance.modulate(self.ranks)
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        total_norm = self._total_norm(gradients)
        norm = float(total_norm)
        overflow = self.scaler is not None and not math.isfinite(norm)  # the scaler skips such a step and goes on
        if not math.isfinite(values["loss"]) or not (math.isfinite(norm) or overflow):
            self._refuse(batch, teacher, values, before)
            return 0, {}
        self.skipped = 0
        if self.config.clip_norm and norm > self.config.clip_norm and not overflow:
            torch._foreach_mul_(gradients, (self.config.clip_norm / (total_norm + 1e-6)).to(self.device))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.overflown = self.overflown + 1 if overflow else 0
        if overflow:
            self.trainee.objective.forget()
        else:
            self.trainee.objective.settle(self.ranks)
        if self.overflown == MOST_OVERFLOWN:
            raise TrainingError(
                f"gradients are beyond what fp16 holds for the {MOST_OVERFLOWN}th step in a row, however small their "
                "scale; weights are unchanged since; set train.precision to bf16, or lower the weights of terms on taps"
            )
        return rows, values | balanced

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients as one vector."""
        if self.trainee.shards or len({gradient.dtype for gradient in gradients}) != 1:
            return whole({"norm": torch.nn.utils.get_total_norm(gradients)})["norm"]
        return torch.stack(torch._foreach_norm(gradients)).norm()  # the same without sorting them in each step

    def _gradients(self, batch: Batch, teacher: Outputs | None) -> tuple[int, dict[str, float]]:
        """Leave the global batch's gradients at the parameters; split it further where the memory does not suffice."""
        together = self.ranks.count > 1
        whole = self.ranks.sum(self.trainee.objective.num_rows(batch).to(self.device)).cpu() if together else None
        while True:
            for parameter in self.parameters:  # what optimizer.zero_grad does, in a third of its time
                parameter.grad = None
            self.trainee.forget()
            try:
                logged = self._forward_backward(batch, teacher, whole)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._split(len(batch.ids), error)
        if self.trainee.shards:
            self.trainee.shards.settle_gradients()
        else:
            self.ranks.sum_gradients(self.parameters)
        rows = self.ranks.sum(batch.ids.new_tensor(len(batch.ids))).item() if together else len(batch.ids)
        return int(rows), self._over_ranks(logged)

    def _over_ranks(self, logged: dict[str, Tensor]) -> dict[str, float]:
        """The sum of each value over the ranks."""
        if self.ranks.count == 1 and self.device.type == "cpu":  # one by one three times as fast as stacked
            return {name: value.item() for name, value in logged.items()}
        together = torch.stack([value.detach().to(logged["loss"].dtype) for value in logged.values()])
        return dict(zip(logged, self.ranks.sum(together).tolist(), strict=True))

    def _forward_backward(self, batch: Batch, teacher: Outputs | None, whole: Tensor | None) -> dict[str, Tensor]:
        """Add up this rank's gradients, and its share in each logged value."""
        rows = self._micro_batches(batch)
        parts = [batch] if len(rows) == 1 else [take(batch, some) for some in rows]
        if len(parts) > 1 and any(self.trainee.objective.relational):
            ((share,), student) = self._shares([batch], whole), self._precisely(self.trainee.answer)

            def loss_backward(outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
                return self._backward(*self._precisely(self.trainee.loss)(outputs, teacher, batch, share, self.ranks))

            return _logged(*backward_in_parts(parts, rows, student, loss_backward, self._buffers))
        logged: dict[str, Tensor] = {}
        for part, some, share in zip(parts, rows, self._shares(parts, whole), strict=True):
            answer = teacher if len(rows) == 1 or teacher is None else take(teacher, some)
            loss, terms = self._backward(*self._precisely(self.trainee)(part, answer, share, self.ranks))
            values = {"loss": loss, **terms} if len(rows) == 1 else _logged(loss, terms)
            logged = {name: logged[name] + value for name, value in values.items()} if logged else values
        return logged

    def _precisely(self, call: Callable[..., Result]) -> Callable[..., Result]:
        """The same call in the precision asked for."""
        if self.config.precision == "no":
            return call
        return torch.autocast(self.device.type, PRECISIONS[self.config.precision])(call)

    def _backward(self, loss: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with self.trainee.watch("backward"):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss, values

    def _micro_batches(self, batch: Batch) -> list[Tensor]:
        """The rows of each micro-batch."""
        count = min(self.micro_batches, max(1, len(batch.ids)))
        if self.trainee.shards:  # weights are gathered once a part; some ranks may have empty ones
            count = self.ranks.largest([count], self.device)[0]
        everything = torch.arange(len(batch.ids), device=batch.ids.device)
        return [everything[first::count] for first in range(count)]  # both kinds of rows of a mixed batch in each

    def _shares(self, parts: list[Batch], whole: Tensor | None) -> list[list[float] | None]:
        """What each term of each part of this rank counts in the global batch; None where that is all of it."""
        if len(parts) == 1 and self.ranks.count == 1:
            return [None]
        objective = self.trainee.objective
        own = torch.stack([objective.num_rows(part) for part in parts]).double()
        together = self.ranks.sum(own.to(self.device)).cpu() / self.ranks.count if self._compares_ranks else own
        total = own.sum(dim=0) if whole is None else whole
        return (torch.where(torch.tensor(objective.relational), together, own) / total.clamp(min=1)).tolist()

    def _split(self, rows: int, error: Exception) -> None:
        if self._compares_ranks or self.trainee.shards:  # the others wait for this rank
            advice = "lower train.batch_size or raise train.accumulate"
            raise TrainingError(f"out of memory ({first_line(error)}); {advice}") from error
        if self.micro_batches >= rows:
            message = f"out of memory with one row at a time ({first_line(error)}); use a smaller model"
            raise TrainingError(message) from error
        self.micro_batches *= 2
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: batches are now read in %d parts; the effective batch stays%s",
            self.micro_batches,
            "" if not _has_batch_norm(self.trainee) else ", but BatchNorm sees the parts alone, so results may differ",
        )

    def _refuse(self, batch: Batch, teacher: Outputs | None, values: dict[str, float], before: list[Tensor]) -> None:
        """List the rows of a step whose loss or gradient is not finite; raise, or leave everything as it was."""
        what = "gradient" if math.isfinite(values["loss"]) else _culprit(teacher) or "loss"
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        path = self.folder / (NOT_FINITE if self.ranks.first else f"not_finite.{self.ranks.rank}.json")
        write_json(path, {"what": what, "ids": batch.ids.tolist(), "terms": shown})
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update(
                self.scaler.get_scale()
            )  # it would refuse to begin the next step; its scale is not at fault
        for buffer, value in zip(self._statistics, before, strict=bool(before)):
            buffer.copy_(value)
        self.skipped += 1
        if self.config.not_finite == "raise" or self.skipped >= MOST_SKIPPED:
            often = f" for the {self.skipped}th step in a row" if self.skipped > 1 else ""
            raise TrainingError(
                f"the {what} is not finite{often} ({shown}); weights are unchanged, the rows are listed in "
                f"{path}; lower train.lr or check those rows"
            )
        log.warning("the %s is not finite (%s): this step is left out, its rows are listed in %s", what, shown, path)


def _logged(loss: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values without their graph: of the loss, then of each term."""
    return {name: value.detach() for name, value in {"loss": loss, **values}.items()}


def _culprit(teacher: Outputs | None) -> str | None:
    """Name the first teacher output that is not finite."""
    for part in teacher or ():
        for name, value in part.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"teacher's {name!r}"
    return None


def _batch_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers of its BatchNorms."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
