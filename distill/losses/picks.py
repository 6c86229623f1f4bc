"""What a term reads of the models' outputs and of the batch, before its loss is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import TermConfig, nearest, of_teacher
from distill.contracts import Batch, Outputs, UserError
from distill.layouts import arranged
from distill.losses.numeric import unit, upcast
from distill.losses.rows import Reads, readable
from distill.losses.terms import FEATURES, LABELS, LOSSES, Loss, mixes, one_modality, reads_text_tokens


def need(term: TermConfig, teacher: Outputs | None) -> Outputs:
    """Return the teachers' outputs.

    Raises:
        UserError: there are none.
    """
    if teacher is None:
        raise UserError(f"term {term.name!r} reads a teacher, and this stage has none")
    return teacher


def read_models(term: TermConfig, loss: Loss, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, ...]:
    """Return what a term reads of the models: logits, embeddings or features, the student's first.

    Raises:
        UserError: a model does not give it.
    """
    kind = loss.kind
    if kind in ("labels", "labels+counts"):
        return (_pick(student.logits, str(term.task), term.name),)
    if kind == "pair":
        return _pair(term, student)
    theirs = need(term, teacher)
    if kind in ("pair+teacher", "pair+teachers"):
        return *_pair(term, student), *(tensor for name in term.teachers for tensor in _pair(term, theirs, name))
    if kind == "stages" or kind in FEATURES:
        return *_features(term, student, "student"), *_features(term, theirs, "teacher")
    task = str(term.task)
    names = [of_teacher(task, teacher) for teacher in term.teachers]
    return _pick(student.logits, task, term.name), *(_pick(theirs.logits, name, term.name) for name in names)


def read_batch(term: TermConfig, loss: Loss, batch: Batch, given: Sequence[Tensor], reads: Reads) -> list[Tensor]:
    """Return what a term reads of the batch: labels, ids or masks.

    Args:
        term: the term.
        loss: its loss.
        batch: the rows.
        given: what it reads of the models.
        reads: teacher -> the modalities that it reads.

    Raises:
        UserError: the batch has another number of tokens than a tap.
    """
    if mixes(term):
        everything = torch.ones_like(batch.ids, dtype=torch.bool)
        found = [readable(teacher, batch, reads) for teacher in term.teachers]
        masks = torch.stack([everything if mask is None else mask for mask in found], dim=1)
        return [batch.targets[str(term.task).split(".")[0]], masks]
    if loss.kind in LABELS:
        return [batch.targets[str(term.task).split(".")[0]]]
    if loss.kind == "features+ids":
        return [batch.ids]
    return _mask(term, batch, given) if loss.kind == "tokens" else []


def keys_of(table: Tensor, ids: Tensor) -> Tensor:
    """Return the keys of rows [B, K], of unknown ones any, from a table of ids and keys [N, 1 + K] in order of id."""
    known = table[:, 0].contiguous()
    return table[torch.searchsorted(known, ids).clamp(max=len(table) - 1), 1:]


def read_head(term: TermConfig, classifiers: Mapping[str, Tensor], given: Tensor) -> Tensor:
    """Return the weights [C, D] of the teacher's classifier, which reads what the tap gives.

    Raises:
        UserError: it is of another width, or no classifier is known.
    """
    head = _pick(dict(classifiers), str(term.task), term.name)
    if given.ndim != 2 or head.shape[1] != given.shape[1]:
        raise UserError(
            f"term {term.name!r}: the teacher's classifier reads {head.shape[1]} numbers, and its tap gives "
            f"{list(given.shape[1:])} a row; tap what it reads ('fusion', or 'necks.image' for TASK.image)"
        )
    return head


def check_tokens(term: TermConfig, student: Tensor, teacher: Tensor) -> None:
    """Check that taps give tokens, or attentions of them.

    Raises:
        UserError: they do not, or of another number.
    """
    shapes, scores = (list(student.shape[1:]), list(teacher.shape[1:])), term.loss == "attention_transfer"
    fits = LOSSES[term.loss].one_width and not reads_text_tokens(term)  # by a projector
    alike = student.ndim == teacher.ndim if fits else shapes[0][:-1] == shapes[1][:-1]
    if student.ndim != (4 if scores else 3) or not alike:
        layout = "as many heads and tokens, [B, A, L, L]" if scores else "as many tokens, [B, L, D]"
        raise UserError(
            f"term {term.name!r} reads taps of {layout}, got {shapes[0]} and {shapes[1]} a row; choose others"
        )


def check_widths(term: TermConfig, student: Outputs, teacher: Outputs) -> None:
    """Check that a pair of embeddings has the teacher's width.

    Raises:
        UserError: it has another.
    """
    for name, own, given in zip(
        str(term.embedding).split(","), _pair(term, student), _pair(term, teacher, term.teachers[0]), strict=True
    ):
        if own.shape[-1] != given.shape[-1]:
            raise UserError(
                f"term {term.name!r} compares embeddings of one width, and {name!r} has {own.shape[-1]} in the student "
                f"and {given.shape[-1]} in the teacher; give both one width, or use a relational loss "
                "(clip_relational_ce, clip_relational_kl, siglip_relational)"
            )


def _mask(term: TermConfig, batch: Batch, given: Sequence[Tensor]) -> list[Tensor]:
    """The mask [B, L] of a text's tokens; none for those of an image, all of which count."""
    if not reads_text_tokens(term):
        return []
    mask = batch.inputs["text_mask"]
    lengths = [tensor.shape[-2] if tensor.ndim > 2 else None for tensor in given]
    if any(length != mask.shape[1] for length in lengths):
        raise UserError(
            f"term {term.name!r} compares token by token, and {mask.shape[1]} tokens of the student's text meet "
            f"{lengths} in the taps; both models need the same tokenizer and max_length, and taps of whole sequences"
        )
    return [F.pad(mask, (0, 0, 0, len(batch.ids) - len(mask)))]  # inputs may end before the batch


def _features(term: TermConfig, outputs: Outputs, side: Literal["student", "teacher"]) -> list[Tensor]:
    teacher = term.teachers[0] if side == "teacher" else None
    if term.taps is not None:
        found = [_pick(outputs.features, of_teacher(path, teacher), term.name) for path in term.tapped(side)]
        return [arranged(feature, LOSSES[term.loss].arrangement, one_modality(term)) for feature in found]
    return [_pick(outputs.embeddings, of_teacher(str(term.embedding), teacher), term.name)]


def _pair(term: TermConfig, outputs: Outputs, teacher: str | None = None) -> tuple[Tensor, ...]:
    """The term's two embeddings, normalised in float32 at least: halves have a norm of 1 within 1e-3 only.

    One of zeros stays so and gets no gradient.
    """
    names = [of_teacher(name, teacher) for name in str(term.embedding).split(",")]
    return tuple(unit(upcast(_pick(outputs.embeddings, name, term.name))) for name in names)


def _pick(tensors: dict[str, Tensor], name: str, term: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"term {term!r}: the model gives no {name!r}; {nearest(name, tensors)}")
    return tensors[name]
