"""What losses keep of rows: CRD's banks and the queue of SEED, as buffers of a part.

A memory takes in the rows of a step when the step is done, those of all ranks in order of their ids. So micro-batches
see what was there before the step, and neither their number nor that of the ranks changes what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.contracts import UserError
from distill.data.transforms import hash_uniform
from distill.losses import relations
from distill.losses.bounds import Count, PartShare, Temperature
from distill.losses.numeric import unit, upcast
from distill.losses.parts import Known, Part, like, need_vectors
from distill.ranks import Ranks, gather_uneven

MOST_ROWS = 2**24  # which the numbers of the hash can tell apart


class Memory(Part):
    """Base of parts that store rows."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[list[Tensor]] = []

    def note(self, ids: Tensor, *rows: Tensor) -> None:
        """Remember rows [B, D] of a step in training, to be stored when it is done."""
        if self.training:
            kind = next(self.buffers())
            self._noted.append([ids, *(like(row.detach(), kind) for row in rows)])

    def forget(self) -> None:
        """Drop what was noted."""
        self._noted.clear()

    @torch.no_grad()
    def settle(self, ranks: Ranks) -> None:
        """Store what all ranks have noted."""
        noted = self._noted or [self.nothing()]
        columns = [torch.cat(column) for column in zip(*noted, strict=True)]
        self._noted = []
        if ranks.count > 1:
            columns = [torch.cat(gather_uneven(column)) for column in columns]
        if len(columns[0]):
            order = columns[0].argsort()
            self.store(*(column[order] for column in columns))

    def nothing(self) -> list[Tensor]:
        """What is noted of no rows: ids, and each kind of rows."""
        raise NotImplementedError

    def store(self, ids: Tensor, *rows: Tensor) -> None:
        """Store the rows of all ranks."""
        raise NotImplementedError


class Crd(Memory):
    """The projections and banks of :func:`distill.losses.crd`.

    Banks begin as random directions and then follow the embeddings with the authors' momentum of 0.5. A row's negatives
    are drawn with repetition from all other rows, by a hash of (seed, row id, step). The authors draw them from rows of
    other classes, for which each row needs a label; their positive is the row itself too (``exact``). The constants Z
    are not those of the first batch but of the banks as they begin: a mean over random directions is the same for any
    embedding, so this is what the authors estimate, without depending on how the first batch was split.

    The authors draw 16,384 negatives; a batch holds ``2 · B · negatives · dim`` numbers for them.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    constant: Tensor

    def __init__(
        self,
        known: Known,
        student: Tensor,
        teacher: Tensor,
        *,
        dim: Count = 128,
        negatives: Count = 1024,
        momentum: PartShare = 0.5,
        temperature: Temperature = 0.07,
    ) -> None:
        super().__init__()
        need_vectors(known, student, teacher)
        if known.row_ids is None or not 1 < len(known.row_ids) <= MOST_ROWS:
            count = "an unknown number of" if known.row_ids is None else len(known.row_ids)
            raise UserError(f"term {known.term!r} keeps an entry a training row: 2 to {MOST_ROWS:,}, not {count} rows")
        self.row_ids = known.row_ids.cpu().sort().values  # of the data, so no state
        self.seed, self.negatives, self.momentum, self.temperature = known.seed, negatives, momentum, temperature
        self.student_projection = nn.Linear(student.shape[-1], dim)
        self.teacher_projection = nn.Linear(teacher.shape[-1], dim)
        generator = torch.Generator().manual_seed(known.seed)  # the same on all ranks
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, unit(torch.randn(len(self.row_ids), dim, generator=generator)))
        anchors, entries = self.student_bank[:64], self.teacher_bank[None, :1024]
        constant = relations.crd_constant(anchors, entries, num_rows=len(self.row_ids), temperature=temperature)
        self.register_buffer("constant", constant.reshape(1))

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of vectors [B, D] and [B, D'] of rows with these ids, int64 [B]."""
        own = unit(upcast(self.student_projection(like(student, self.student_projection.weight))))
        given = unit(upcast(self.teacher_projection(like(teacher.detach(), self.teacher_projection.weight))))
        self.note(ids, own, given)
        entries = self.entries(ids.cpu()).to(self.student_bank.device)
        return relations.crd(
            own,
            given,
            self.student_bank[entries],
            self.teacher_bank[entries],
            num_rows=len(self.row_ids),
            student_constant=self.constant,
            teacher_constant=self.constant,
            temperature=self.temperature,
        )

    def entries(self, ids: Tensor) -> Tensor:
        """The banks' entries for rows: their own, then negatives; int64 [B, 1 + K], for ids on the CPU."""
        own = self._places(ids)[:, None]
        step, salts = torch.tensor(self.step), torch.arange(self.negatives)
        others = len(self.row_ids) - 1
        draws = (hash_uniform(self.seed, ids[:, None], step, salts).double() * others).long()
        return torch.cat([own, (own + 1 + draws) % (others + 1)], dim=1)

    def _places(self, ids: Tensor) -> Tensor:
        places = torch.searchsorted(self.row_ids, ids).clamp(max=len(self.row_ids) - 1)
        assert torch.equal(self.row_ids[places], ids), "a row that was not among those of training"
        return places

    def nothing(self) -> list[Tensor]:
        """See :class:`Memory`."""
        none = self.student_bank[:0]
        return [none.new_zeros(0, dtype=torch.int64), none, none]

    def store(self, ids: Tensor, *rows: Tensor) -> None:
        """Move the rows' entries toward their embeddings."""
        places = self._places(ids.cpu()).to(ids.device)
        for bank, now in zip((self.student_bank, self.teacher_bank), rows, strict=True):
            bank[places] = unit(self.momentum * bank[places] + (1 - self.momentum) * now)


class QueueKl(Memory):
    """The queue of :func:`distill.losses.queue_kl`: the teacher's embeddings of the last rows.

    It begins empty, so the first step's loss is 0, and fills up; the authors begin with random directions, which no row
    is like. Of rows of one step the order is that of their ids.
    """

    queue: Tensor
    count: Tensor

    def __init__(self, known: Known, student: Tensor, teacher: Tensor, *, size: Count = 4096) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(size, teacher.shape[-1]))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))  # rows that were ever stored

    @property
    def stored(self) -> Tensor:
        """What is there, [N, D]."""
        return self.queue[: int(self.count)]

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor,
        *,
        student_temperature: Temperature = 0.2,
        teacher_temperature: Temperature = 0.01,
    ) -> Tensor:
        """Return the loss of normalised vectors [B, D] of rows with these ids, int64 [B]."""
        self.note(ids, teacher)
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        return relations.queue_kl(student, teacher, self.stored, **temperatures)

    def nothing(self) -> list[Tensor]:
        """See :class:`Memory`."""
        return [self.count[:0], self.queue[:0]]

    def store(self, ids: Tensor, *rows: Tensor) -> None:
        """Put rows in the place of the oldest ones."""
        newest = rows[0][-len(self.queue) :]
        first = int(self.count) + len(rows[0]) - len(newest)
        places = torch.arange(first, first + len(newest), device=newest.device) % len(self.queue)
        self.queue[places] = newest
        self.count += len(rows[0])
