"""Rows of batches and outputs, and batches that are read in parts for want of memory."""

import pytest
import torch
from torch import Tensor

from distill.batch_parts import InParts, TeacherMemoryError, join_rows, rows_of, take
from distill.contracts import Batch, Outputs
from distill.resources import out_of_memory


def batch_of(rows: int) -> Batch:
    ids = torch.arange(rows)
    image = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.zeros_like(ids), {"image": image}, {"image": torch.ones(rows, dtype=torch.bool)}, {})


class Teacher:
    """Answers as long as a batch has few enough rows."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, []

    def __call__(self, batch: Batch) -> Outputs:
        self.sizes.append(len(batch.ids))
        if len(batch.ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        image: Tensor = batch.inputs["image"]
        return Outputs({"kind": 2 * image}, {"image": image[:, :1]}, {"tap": image[:, None]})


def asked(in_parts: InParts, teacher: Teacher, batch: Batch) -> Outputs:
    return in_parts(lambda some: teacher(rows_of(batch, some)), len(batch.ids), join_rows)


@pytest.mark.fault
@pytest.mark.parametrize(("most", "rows", "count"), [(8, 8, 1), (7, 8, 2), (3, 8, 4), (1, 8, 8), (1, 5, 8), (2, 7, 4)])
def test_the_answer_is_that_of_the_whole_batch(most, rows, count, caplog):
    teacher, in_parts, batch = Teacher(most), InParts(), batch_of(rows)
    for _ in range(2):  # what was learnt stays
        said, whole = asked(in_parts, teacher, batch), Teacher(rows)(batch)
        for part, other in zip(said, whole, strict=True):
            assert part.keys() == other.keys() and all(torch.equal(part[name], other[name]) for name in part)
    assert in_parts.count == count
    assert sum(size > most for size in teacher.sizes) == len(caplog.records) == count.bit_length() - 1
    assert not caplog.records or f"now reads batches in {count} parts" in caplog.records[-1].message


def test_a_batch_that_fits_is_not_copied():
    batch = batch_of(4)
    assert rows_of(batch, slice(0, 4)) is batch
    assert rows_of(batch, slice(1, 3)).ids.tolist() == [1, 2]


@pytest.mark.fault
def test_single_rows_that_do_not_fit_end_in_a_sentence():
    with pytest.raises(TeacherMemoryError, match=r"one row at a time \(CUDA out of memory.*use a smaller teacher"):
        asked(InParts(), Teacher(0), batch_of(5))


def test_a_rank_without_rows_asks_once():
    teacher = Teacher(3)
    assert asked(InParts(), teacher, batch_of(0)).logits["kind"].shape == (0, 3) and teacher.sizes == [0]


def test_other_errors_are_raised_as_they_are():
    def broken(some: slice) -> Outputs:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        InParts()(broken, 4, join_rows)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("no memory module"), False),
    ],
)
def test_what_says_that_the_memory_does_not_suffice(error, expected):
    assert out_of_memory(error) is expected


def test_rows_are_taken_of_inputs_that_end_before_the_batch_does():
    batch = batch_of(4)._replace(inputs={"image": torch.arange(2)})
    taken = take(batch, torch.tensor([1, 3]))
    assert taken.ids.tolist() == [1, 3] and taken.inputs["image"].tolist() == [1]
