"""The objective: a weighted sum of terms, each of which picks rows and tensors and calls one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import EMA, MixConfig, TermConfig
from distill.contracts import SHARE, Batch, Outputs
from distill.layouts import layout_of
from distill.losses.mixing import Mixed
from distill.losses.numeric import unit, upcast, within_half
from distill.losses.parts import Known, Part, need_vectors
from distill.losses.picks import check_tokens, check_widths, keys_of, need, read_batch, read_head, read_models
from distill.losses.projectors import build_projector
from distill.losses.rows import Reads, num_rows, term_ids, term_rows, with_others
from distill.losses.scales import learned_numbers
from distill.losses.terms import (
    FEATURES,
    LABELS,
    LEARNED,
    LOSSES,
    Loss,
    as_schedule,
    check_terms,
    mixes,
    one_modality,
    settings,
)
from distill.losses.tokens import scores_of
from distill.multimodal import MEMBER, by_member
from distill.ranks import Ranks
from distill.schedules import Schedule, at
from distill.sharding import whole

__all__ = ["Objective"]


class Objective(nn.Module):
    """A weighted sum of terms, with the projectors that pairs of unequal shape need and the parts of losses that learn.

    Projectors and parts belong to the objective: trained and checkpointed with the student, and left behind when the
    student is kept.

    Args:
        terms: what to sum.
        student: example outputs of the student, from one forward.
        teacher: example outputs of the teachers; None when no term needs one. Those of a teacher of another run have
            ``@NAME`` behind their names.
        class_counts: task -> int64 [C], the training rows of each class; None when no term
            :func:`~distill.losses.terms.counts_classes`.
        reads: teacher (None is the run's own) -> the modalities that it reads: of rows with none of these it has
            nothing to say, and its terms leave them out. Under EMA, those of the student: all terms leave out what it
            cannot read. Who is not named answers all rows.
        seed: the run's, for what parts draw.
        classifiers: task -> float [C, D], the weights of the teacher's linear heads; None when no term reads
            :func:`~distill.losses.terms.classifiers`.
        rows: all rows that training reads, of which ids and presence are asked for; None when no term
            :func:`~distill.losses.terms.stores_rows`.
        row_keys: "id", rising, and "text", "image" and "group" -> int64 [N], of all rows that training reads with an
            image; equal where those are. None when no term :func:`~distill.losses.terms.compares_keys`.

    Raises:
        UserError: a term names a task, embedding or tap that a model does not give, or no projector or part fits.
    """

    def __init__(
        self,
        terms: Sequence[TermConfig],
        student: Outputs,
        teacher: Outputs | None,
        class_counts: Mapping[str, Tensor] | None = None,
        reads: Reads | None = None,
        *,
        seed: int = 0,
        rows: Batch | None = None,
        classifiers: Mapping[str, Tensor] | None = None,
        row_keys: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_terms(terms, "objective")
        self.terms = tuple(terms)
        self.class_counts, self._reads = dict(class_counts or {}), dict(reads or {})
        self.projectors, self.parts, self.learned = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self._names, self._weights = _names(self.terms), [term.weight for term in self.terms]
        self._params = [_moving(term) for term in self.terms]
        self._progress = 0.0
        self._attentions: dict[int, list[bool]] = {}  # term on tokens -> whether student and teacher give probabilities
        for index, term in enumerate(self.terms):
            loss = LOSSES[term.loss]
            numbers = learned_numbers(term)
            if numbers:
                self.learned[str(index)] = numbers
            if term.positives:
                assert row_keys is not None
                keys = torch.stack([row_keys[name] for name in ("id", *term.positives)], dim=1)
                self.register_buffer(f"keys{index}", keys, persistent=False)
            if loss.kind == "pair+teacher" and loss.one_width:
                check_widths(term, student, need(term, teacher))
            if loss.kind == "tokens":
                examples = read_models(term, loss, student, teacher)
                check_tokens(term, *examples)
                self._attentions[index] = [layout_of(tap, one_modality(term)) == "attention" for tap in examples]
            if loss.unit:
                need_vectors(Known(term.name), *read_models(term, loss, student, teacher))
            if loss.kind in FEATURES and loss.one_width:
                own, theirs = read_models(term, loss, student, teacher)
                projector = build_projector(term.name, own, theirs, one_modality(term))
                if projector is not None:
                    self.projectors[str(index)] = projector
            if loss.kind == "features+head":
                head = read_head(term, classifiers or {}, read_models(term, loss, student, teacher)[1])
                self.register_buffer(f"head{index}", head, persistent=False)
            if loss.part is not None:
                with torch.no_grad():
                    examples = self._given(index, term, loss, student, teacher)
                fixed = {name: value for name, value in term.params.items() if name in settings(loss)[0]}
                known = Known(term.name, seed, None if rows is None else term_ids(term, rows, self._reads))
                self.parts[str(index)] = loss.part(known, *examples, **fixed)
            if mixes(term):
                examples = read_models(term, loss, student, teacher)
                self.parts[str(index)] = _mixed(term, loss, len(examples) - 1)

    @property
    def relational(self) -> list[bool]:
        """Of each term, whether it compares rows with each other."""
        return [LOSSES[term.loss].relational for term in self.terms]

    @property
    def reads_average(self) -> bool:
        """Whether a term reads the average of the student's own weights."""
        return any(EMA in term.teachers for term in self.terms)

    def advance(self, step: int, total: int) -> None:
        """Take weights and parameters that have a schedule as they are at a step, from 0, of all."""
        self._progress = step / total
        for part in self._parts():
            part.step = step

    def settle(self, ranks: Ranks) -> None:
        """Let parts store what a finished step leaves behind; every rank calls it."""
        for part in self._parts():
            part.settle(ranks)
        for number in self._learned().values():
            number.settle()

    def forget(self) -> None:
        """Drop what a step that is not finished would leave behind."""
        for part in self._parts():
            part.forget()

    def moving(self) -> dict[str, float]:
        """``weight/NAME`` -> the present weight of a term with a schedule; ``mix/NAME/TEACHER`` -> a learned one."""
        found = zip(self._names, self._weights, strict=True)
        now = {f"weight/{name}": at(weight, self._progress) for name, weight in found if isinstance(weight, Schedule)}
        for index, part in self.parts.items():
            if isinstance(part, Mixed) and part.learns and part.shares is not None:
                name, teachers = self._names[int(index)], self.terms[int(index)].teachers
                shares = zip(teachers, part.shares.tolist(), strict=True)
                now |= {f"mix/{name}/{teacher or 'teacher'}": share for teacher, share in shares}
        return now

    def learned_values(self) -> dict[str, float]:
        """``PARAMETER/NAME`` -> the present value of each number that is learned; every rank calls it."""
        found = whole({name: number() for name, number in self._learned().items()})
        return {name: value.item() for name, value in found.items()}

    def without_unread(self, student: Outputs) -> Outputs:
        """The student's outputs, of which those that no term reads are detached."""
        read = [
            {str(term.task) for term in self.terms if LOSSES[term.loss].kind != "features+head"},
            {name for term in self.terms for name in str(term.embedding).split(",")},
            {path for term in self.terms for path in term.tapped("student")},
        ]
        return Outputs(
            *(
                {name: value if name.partition(MEMBER)[0] in names else value.detach() for name, value in part.items()}
                for part, names in zip(student, read, strict=True)
            )
        )

    def num_rows(self, batch: Batch) -> Tensor:
        """How many rows each term is about (those with a label, or with the modality): int64 [terms]."""
        return torch.tensor([num_rows(term, batch, self._reads) for term in self.terms])

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        shares: Sequence[float] | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum (a scalar) and each term's unweighted value by its name.

        Args:
            student: the student's outputs for ``batch``; of an ensemble in training, terms are means over its members.
            teacher: the teachers', or None.
            batch: the rows.
            shares: of a part of a batch, each term's share in the whole's value: those of all parts add up to 1, so
                that the values of all parts add up to the whole's. Parts may be those of ranks; others must not have
                relational terms. None for a batch that is no part.
            ranks: who holds the other parts; relational terms compare the rows of all ranks.
        """
        values: dict[str, Tensor] = {}
        answers = by_member(student)
        total = batch.ids.new_zeros((), dtype=torch.float32)
        for index, term in enumerate(self.terms):
            each = [self._value(index, term, answer, teacher, batch, ranks) for answer in answers]
            value = torch.stack(each).mean() if len(each) > 1 else each[0]
            if shares is not None:
                value = value * shares[index]
            total = total + at(self._weights[index], self._progress) * value
            values[self._names[index]] = value
        return total, values

    def _value(
        self,
        index: int,
        term: TermConfig,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        ranks: Ranks | None,
    ) -> Tensor:
        """A term's value; of labels beside mixed images, those of both rows count by their share of the image."""
        if not batch.mixed or LOSSES[term.loss].kind not in LABELS:
            return self._plain(index, term, student, teacher, batch, ranks)
        own, other = (
            self._plain(index, term, student, teacher, some, ranks)
            for some in (batch._replace(mixed={}), with_others(batch))
        )
        return torch.lerp(other, own, batch.mixed[SHARE][0].to(own.dtype)) if len(batch.ids) else own

    def _plain(
        self,
        index: int,
        term: TermConfig,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        ranks: Ranks | None,
    ) -> Tensor:
        loss = LOSSES[term.loss]
        part = self.parts[str(index)] if loss.part is not None or mixes(term) else None
        arguments = list(self._given(index, term, loss, student, teacher))
        arguments += read_batch(term, loss, batch, arguments, self._reads)
        if term.positives:
            arguments.append(keys_of(self.get_buffer(f"keys{index}"), batch.ids))
        rows = term_rows(term, batch, self._reads)
        if rows is not None:
            arguments = [tensor[rows] for tensor in arguments]
        if loss.relational and ranks is not None:
            arguments = [ranks.gather(tensor) for tensor in arguments]
        if arguments[0].shape[0] == 0:
            modules = [*(number for _, number in self._learned_by(index)), *([] if part is None else [part])]
            learnt = [parameter.flatten()[:0] for module in modules for parameter in module.parameters()]
            return _zero([*arguments, *learnt])
        if loss.kind == "labels+counts":
            arguments.append(self.class_counts[str(term.task).split(".")[0]])
        if loss.kind == "features+head":
            arguments.append(self.get_buffer(f"head{index}"))
        params = {name: at(value, self._progress) for name, value in self._params[index].items()}
        params |= {name: number() for name, number in self._learned_by(index)}
        if part is not None and not torch.is_autocast_enabled(arguments[0].device.type):
            return within_half(term.loss, part, arguments, params)
        found: Tensor = (part or loss.function)(*arguments, **params)  # type: ignore[assignment]
        return found

    def _given(
        self, index: int, term: TermConfig, loss: Loss, student: Outputs, teacher: Outputs | None
    ) -> tuple[Tensor, ...]:
        """What both models say, behind the projector if there is one."""
        found = read_models(term, loss, student, teacher)
        if str(index) in self.projectors:
            found = (self.projectors[str(index)](found[0]), *found[1:])
        if any(self._attentions.get(index, [])):
            sides = zip(found, self._attentions[index], strict=True)
            found = tuple(scores_of(tap) if attention else tap for tap, attention in sides)
        return tuple(unit(upcast(tensor)) for tensor in found) if loss.unit else found

    def _learned_by(self, index: int) -> list[tuple[str, Any]]:
        """The numbers that one term learns, by the parameter that each stands for."""
        learned: Any = self.learned
        return list(learned[str(index)].items()) if str(index) in learned else []

    def _learned(self) -> dict[str, Any]:
        """``PARAMETER/NAME`` -> each number that is learned."""
        return {
            f"{key}/{self._names[int(index)]}": number
            for index in self.learned
            for key, number in self._learned_by(int(index))
        }

    def _parts(self) -> list[Part]:
        return [part for part in self.parts.values() if isinstance(part, Part)]


def _names(terms: Sequence[TermConfig]) -> list[str]:
    """The names under which terms are logged, no two alike."""
    names: list[str] = []
    for index, term in enumerate(terms):
        names.append(term.name if term.name not in names else f"{term.name}#{index}")
    return names


def _moving(term: TermConfig) -> dict[str, Any]:
    """The parameters that a term's loss is called with, schedules among them."""
    moving = settings(LOSSES[term.loss])[1]
    given = {name: value for name, value in term.params.items() if name in moving and value != LEARNED}
    return {name: as_schedule(value, name) if isinstance(value, dict) else value for name, value in given.items()}


def _mixed(term: TermConfig, loss: Loss, num_teachers: int) -> Mixed:
    function: Any = loss.function
    options = {"relational": loss.relational, "reads_labels": loss.kind in LABELS}
    return Mixed(function, term.mix or MixConfig(), num_teachers, **options)


def _zero(arguments: list[Tensor]) -> Tensor:
    """The sum over no rows, with the graph of the rows that other ranks may have."""
    learning = [upcast(tensor).sum() for tensor in arguments if tensor.requires_grad]
    return torch.stack(learning).sum() if learning else arguments[0].new_zeros(())
