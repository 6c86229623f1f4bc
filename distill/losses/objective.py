"""The objective: a weighted sum of terms, each of which picks rows and tensors and calls one pure loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import TermConfig, nearest, of_teacher
from distill.contracts import IGNORE, Batch, Outputs, UserError
from distill.losses import contrastive, features, logits, maps, outputs, relations
from distill.losses.numeric import upcast
from distill.multimodal import by_member
from distill.ranks import Ranks

Kind = Literal["labels", "labels+counts", "teacher", "teacher+labels", "features", "pair", "pair+teacher"]


@dataclass(frozen=True)
class Loss:
    """A loss and the arguments it takes.

    Attributes:
        function: the pure function.
        kind: "labels" (logits, labels), "labels+counts" (and the training rows of each class), "teacher" (logits of
            both), "teacher+labels", "features" (an embedding or a pair of taps, of both), "pair" (two embeddings of the
            model's own, normalised), "pair+teacher" (and the same two of the teacher).
        relational: True where rows are compared with each other, so that splitting a batch changes the value.
        one_width: True where the student's numbers are compared with the teacher's one by one. Features of other widths
            then get a projector; embeddings of a pair have none and are refused.
    """

    function: Callable[..., Tensor]
    kind: Kind
    relational: bool = False
    one_width: bool = True


LOSSES = {
    "cross_entropy": Loss(logits.cross_entropy, "labels"),
    "logit_adjusted": Loss(logits.logit_adjusted, "labels+counts"),
    "kd": Loss(logits.kd, "teacher"),
    "mse_logits": Loss(logits.mse_logits, "teacher"),
    "logit_standardized_kd": Loss(logits.logit_standardized_kd, "teacher"),
    "multilabel_kd": Loss(outputs.multilabel_kd, "teacher"),
    "dist": Loss(logits.dist, "teacher", relational=True),
    "dkd": Loss(logits.dkd, "teacher+labels"),
    "nkd": Loss(logits.nkd, "teacher+labels"),
    "cosine": Loss(features.cosine, "features"),
    "fitnet": Loss(features.fitnet, "features"),
    "at": Loss(maps.at, "features", one_width=False),
    "nst": Loss(maps.nst, "features", one_width=False),
    "hcl": Loss(maps.hcl, "features"),
    "cwd": Loss(maps.cwd, "features"),
    "rkd": Loss(relations.rkd, "features", relational=True, one_width=False),
    "sp": Loss(relations.sp, "features", relational=True, one_width=False),
    "pkt": Loss(relations.pkt, "features", relational=True, one_width=False),
    "clip_infonce": Loss(contrastive.clip_infonce, "pair", relational=True),
    "siglip": Loss(contrastive.siglip, "pair", relational=True),
    "clip_relational_ce": Loss(contrastive.clip_relational_ce, "pair+teacher", relational=True, one_width=False),
    "clip_relational_kl": Loss(contrastive.clip_relational_kl, "pair+teacher", relational=True, one_width=False),
    "siglip_relational": Loss(contrastive.siglip_relational, "pair+teacher", relational=True, one_width=False),
    "clip_fd": Loss(contrastive.clip_fd, "pair+teacher"),
    "clip_icl": Loss(contrastive.clip_icl, "pair+teacher", relational=True),
    "clip_gd": Loss(contrastive.clip_gd, "pair+teacher", relational=True),
}

LABELS: tuple[Kind, ...] = ("labels", "labels+counts", "teacher+labels")
TEACHING: tuple[Kind, ...] = ("teacher", "teacher+labels", "features", "pair+teacher")
PAIRS: tuple[Kind, ...] = ("pair", "pair+teacher")
TASKS: tuple[Kind, ...] = (*LABELS, "teacher")
NEEDS = dict.fromkeys(TASKS, "task") | dict.fromkeys(PAIRS, "embedding")


def check_terms(terms: Sequence[TermConfig], where: str) -> None:
    """Check names, targets and parameters of terms without building anything.

    Raises:
        UserError: an unknown loss or parameter, or a term without the target that its loss needs.
    """
    for index, term in enumerate(terms):
        place = f"{where}[{index}]"
        if term.loss not in LOSSES:
            raise UserError(f"{place}: unknown loss {term.loss!r}; {nearest(term.loss, LOSSES)}")
        loss = LOSSES[term.loss]
        allowed = [p.name for p in inspect.signature(loss.function).parameters.values() if p.kind == p.KEYWORD_ONLY]
        for name in term.params:
            if name not in allowed:
                raise UserError(f"{place}: {term.loss} has no parameter {name!r}; {nearest(name, allowed)}")
        given = [key for key in ("task", "embedding", "taps") if getattr(term, key) is not None]
        expected = [NEEDS[loss.kind]] if loss.kind in NEEDS else ["embedding", "taps"]
        if len(given) != 1 or given[0] not in expected:
            raise UserError(f"{place}: {term.loss} needs exactly one of {' or '.join(expected)}, got {given or 'none'}")
        if loss.kind in PAIRS and len(str(term.embedding).split(",")) != 2:
            raise UserError(f'{place}: {term.loss} needs two embeddings, write "image,text"; got {term.embedding!r}')
        if term.taps is not None and set(term.taps) != {"student", "teacher"}:
            raise UserError(f"{place}: taps needs both 'student' and 'teacher'")
        if term.teacher is not None and loss.kind not in TEACHING:
            raise UserError(f"{place}: {term.loss} reads no teacher; leave out its key 'teacher'")


def needs_teacher(terms: Sequence[TermConfig]) -> bool:
    """Whether any term reads a teacher."""
    return any(LOSSES[term.loss].kind in TEACHING for term in terms)


def counts_classes(terms: Sequence[TermConfig]) -> bool:
    """Whether any term reads how many rows each class has."""
    return any(LOSSES[term.loss].kind == "labels+counts" for term in terms)


def tap_paths(
    terms: Sequence[TermConfig], side: Literal["student", "teacher"], teacher: str | None = None
) -> list[str]:
    """The module paths whose outputs the terms read of the student or of one teacher, without repetition."""
    read = [term.taps for term in terms if term.taps and (side == "student" or term.teacher == teacher)]
    return list(dict.fromkeys(taps[side] for taps in read))


class Objective(nn.Module):
    """A weighted sum of terms, with the projectors that pairs of unequal width need.

    Projectors are parameters of the objective: trained and checkpointed with the student, and left behind when the
    student is kept.

    Args:
        terms: what to sum.
        student: example outputs of the student, from one forward.
        teacher: example outputs of the teachers; None when no term needs one. Those of a teacher of another run have
            ``@NAME`` behind their names.
        class_counts: task -> int64 [C], the training rows of each class; None when no term :func:`counts_classes`.
        reads: teacher (None is the run's own) -> the modalities that it reads: of rows with none of these it has
            nothing to say, and its terms leave them out. A teacher that is not named answers all rows.

    Raises:
        UserError: a term names a task, embedding or tap that a model does not give, or no projector fits.
    """

    def __init__(
        self,
        terms: Sequence[TermConfig],
        student: Outputs,
        teacher: Outputs | None,
        class_counts: Mapping[str, Tensor] | None = None,
        reads: Mapping[str | None, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        check_terms(terms, "objective")
        self.terms = tuple(terms)
        self.class_counts, self._reads = dict(class_counts or {}), dict(reads or {})
        self.projectors = nn.ModuleDict()
        for index, term in enumerate(self.terms):
            loss = LOSSES[term.loss]
            if loss.kind not in ("features", "pair+teacher") or not loss.one_width:
                continue
            if teacher is None:
                raise UserError(f"term {term.name!r} reads a teacher, and this stage has none")
            if loss.kind == "pair+teacher":
                _check_widths(term, student, teacher)
                continue
            projector = _projector(term.name, _feature(term, student, "student"), _feature(term, teacher, "teacher"))
            if projector is not None:
                self.projectors[str(index)] = projector

    @property
    def relational(self) -> list[bool]:
        """Of each term, whether it compares rows with each other."""
        return [LOSSES[term.loss].relational for term in self.terms]

    def num_rows(self, batch: Batch) -> Tensor:
        """How many rows each term is about (those with a label, or with the modality): int64 [terms]."""
        return torch.tensor([_num_rows(term, batch, self._reads) for term in self.terms])

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
            total = total + term.weight * value
            name = term.name if term.name not in values else f"{term.name}#{index}"
            values[name] = value
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
        loss = LOSSES[term.loss]
        arguments = list(self._arguments(index, term, loss.kind, student, teacher, batch))
        rows = _rows(term, batch, self._reads)
        if rows is not None:
            arguments = [tensor[rows] for tensor in arguments]
        if loss.relational and ranks is not None:
            arguments = [ranks.gather(tensor) for tensor in arguments]
        if arguments[0].shape[0] == 0:
            return _zero(arguments)
        if loss.kind == "labels+counts":
            arguments.append(self.class_counts[str(term.task).split(".")[0]])
        return loss.function(*arguments, **term.params)

    def _arguments(
        self, index: int, term: TermConfig, kind: Kind, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[Tensor, ...]:
        if kind == "pair":
            return _pair(term, student)
        if kind in ("labels", "labels+counts"):
            return _pick(student.logits, str(term.task), term.name), batch.targets[str(term.task).split(".")[0]]
        if teacher is None:
            raise UserError(f"term {term.name!r} reads a teacher, and this stage has none")
        if kind == "pair+teacher":
            return *_pair(term, student), *_pair(term, teacher, term.teacher)
        if kind == "features":
            feature = _feature(term, student, "student")
            if str(index) in self.projectors:
                feature = self.projectors[str(index)](feature)
            return feature, _feature(term, teacher, "teacher")
        task = str(term.task)
        theirs = _pick(teacher.logits, of_teacher(task, term.teacher), term.name)
        pair = _pick(student.logits, task, term.name), theirs
        return pair if kind == "teacher" else (*pair, batch.targets[task.split(".")[0]])


def _rows(term: TermConfig, batch: Batch, reads: Mapping[str | None, Sequence[str]]) -> Tensor | None:
    """The rows a term is about: those that have its modalities, and one that its teacher reads; None for all."""
    names: list[str] = []
    if term.task and "." in term.task:
        names = [term.task.split(".")[1]]
    elif term.embedding:
        names = term.embedding.split(",")
    elif term.taps:
        paths = [path.partition(":")[0].split(".") for path in dict.fromkeys(term.taps.values())]
        names = [path[1] for path in paths if path[0] in ("encoders", "necks", "token_necks")]
    masks = [batch.present[name] for name in dict.fromkeys(names) if name in batch.present]
    theirs = reads.get(term.teacher, ()) if needs_teacher([term]) else ()
    if theirs and not batch.present.keys() <= set(theirs):  # else every row has one of them
        masks.append(torch.stack([batch.present[name] for name in theirs]).any(dim=0))
    if not masks:
        return None
    keep = torch.stack(masks).all(dim=0)
    return None if bool(keep.all()) else keep


def _num_rows(term: TermConfig, batch: Batch, reads: Mapping[str | None, Sequence[str]]) -> int:
    """How many rows a term averages over."""
    rows = _rows(term, batch, reads)
    counted = torch.ones_like(batch.ids, dtype=torch.bool) if rows is None else rows
    if LOSSES[term.loss].kind in LABELS:
        counted = counted & (batch.targets[str(term.task).split(".")[0]] != IGNORE)
    return int(counted.sum())


def _feature(term: TermConfig, outputs: Outputs, side: Literal["student", "teacher"]) -> Tensor:
    teacher = term.teacher if side == "teacher" else None
    if term.taps is not None:
        return _pick(outputs.features, of_teacher(term.taps[side], teacher), term.name)
    return _pick(outputs.embeddings, of_teacher(str(term.embedding), teacher), term.name)


def _pair(term: TermConfig, outputs: Outputs, teacher: str | None = None) -> tuple[Tensor, ...]:
    """The term's two embeddings, normalised in float32 at least: halves have a norm of 1 within 1e-3 only."""
    names = [of_teacher(name, teacher) for name in str(term.embedding).split(",")]
    return tuple(F.normalize(upcast(_pick(outputs.embeddings, name, term.name)), dim=-1) for name in names)


def _check_widths(term: TermConfig, student: Outputs, teacher: Outputs) -> None:
    for name, own, given in zip(
        str(term.embedding).split(","), _pair(term, student), _pair(term, teacher, term.teacher), strict=True
    ):
        if own.shape[-1] != given.shape[-1]:
            raise UserError(
                f"term {term.name!r} compares embeddings of one width, and {name!r} has {own.shape[-1]} in the student "
                f"and {given.shape[-1]} in the teacher; give both one width, or use a relational loss "
                "(clip_relational_ce, clip_relational_kl, siglip_relational)"
            )


def _pick(tensors: dict[str, Tensor], name: str, term: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"term {term!r}: the model gives no {name!r}; {nearest(name, tensors)}")
    return tensors[name]


def _projector(name: str, student: Tensor, teacher: Tensor) -> nn.Module | None:
    """The projector from the student's feature to the teacher's: none, linear, or a 1x1 convolution."""
    if student.shape[1:] == teacher.shape[1:]:
        return None
    if student.ndim == teacher.ndim == 4 and student.shape[2:] == teacher.shape[2:]:
        return nn.Conv2d(student.shape[1], teacher.shape[1], kernel_size=1)
    if student.ndim == teacher.ndim and student.shape[1:-1] == teacher.shape[1:-1]:
        return nn.Linear(student.shape[-1], teacher.shape[-1])
    shapes = f"{list(student.shape[1:])} and {list(teacher.shape[1:])}"
    raise UserError(f"term {name!r}: no projector fits features of shapes {shapes}; choose taps of equal layout")


def _zero(arguments: list[Tensor]) -> Tensor:
    """The sum over no rows, with the graph of the rows that other ranks may have."""
    learning = [upcast(tensor).sum() for tensor in arguments if tensor.requires_grad]
    return torch.stack(learning).sum() if learning else arguments[0].new_zeros(())
