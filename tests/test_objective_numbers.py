"""Terms on targets that are numbers, some of them missing."""

import pytest
import torch
from tiny import terms

from distill import losses
from distill.batch_parts import take
from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.losses.objective import Objective
from distill.losses.terms import labelled_alone, learns_unlabelled, needs_teacher

ROWS = 6
TERM = {"loss": "regression_kd", "task": "pose", "params": {"margin": 0.5}}


def said(seed):
    return Outputs({"pose": torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(seed))}, {}, {})


def batch(targets=None):
    """Row 0 has no target, row 1 one of two."""
    if targets is None:
        targets = torch.zeros(ROWS, 2)
        targets[0], targets[1, 1] = float("nan"), float("nan")
    present = {"image": torch.ones(ROWS, dtype=torch.bool)}
    return Batch(torch.arange(ROWS), torch.full((ROWS,), CLEAN_VIEW), {}, present, {"pose": targets})


def test_a_term_on_numbers_gives_what_the_function_does_and_counts_rows_with_a_target():
    student, teacher, rows = said(0), said(1), batch()
    student.logits["pose"].requires_grad_()
    objective = Objective(terms(TERM), student, teacher)
    value, _ = objective(student, teacher, rows)
    expected = losses.regression_kd(student.logits["pose"], teacher.logits["pose"], rows.targets["pose"], margin=0.5)
    torch.testing.assert_close(value, expected)
    assert value > 0 and objective.num_rows(rows).tolist() == [ROWS - 1]
    value.backward()
    gradient = student.logits["pose"].grad
    assert gradient.isfinite().all() and not gradient[0].any() and not gradient[1, 1]


def test_the_parts_of_a_batch_add_up_to_the_whole():
    student, teacher, rows = said(0), said(1), batch()
    objective = Objective(terms(TERM), student, teacher)
    total = objective.num_rows(rows)
    parts = []
    for places in (torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([3, 4, 5])):
        some, one, other = take(rows, places), take(student, places), take(teacher, places)
        shares = (objective.num_rows(some) / total).tolist()
        parts.append(objective(one, other, some, shares)[0])
    torch.testing.assert_close(torch.stack(parts).sum(), objective(student, teacher, rows)[0])


def test_such_a_term_reads_a_teacher_and_learns_from_rows_with_a_target_alone():
    items = terms(TERM)
    assert needs_teacher(items) and labelled_alone(items) and not learns_unlabelled(items)


def test_outputs_may_imitate_the_teacher_without_a_target():
    student, teacher = said(0), said(1)
    value, _ = Objective(terms({"loss": "mse_logits", "task": "pose"}), student, teacher)(student, teacher, batch())
    torch.testing.assert_close(value, (student.logits["pose"] - teacher.logits["pose"]).square().mean())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.arange(ROWS), r"reads targets that are numbers, NaN where missing, got torch.int64 \[6\]; use kd"),
        (torch.zeros(ROWS), r"compares values of one shape, got \[6, 2\] .*, \[6, 2\] .* and targets \[6\]; give each"),
    ],
)
def test_classes_and_targets_of_another_shape_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        Objective(terms(TERM), said(0), said(1))(said(0), said(1), batch(targets))


def test_several_teachers_are_no_bound():
    with pytest.raises(UserError, match="regression_kd reads one teacher, got a list"):
        Objective(terms({**TERM, "teacher": ["teacher", "other"]}), said(0), said(1))
