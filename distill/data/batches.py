"""What the engine reads: batches of which any can be asked for, and how they are made ahead of the steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from distill.contracts import Batch

PREFETCH = 2  # batches made ahead by each worker
AT_ONCE, SECONDS_AT_ONCE = 8, 0.02

Made = TypeVar("Made")
Done = TypeVar("Done")


class Batches(ABC):
    """The batches of each epoch, by name of the model that reads them.

    Attributes:
        workers: threads that make batches ahead; without any, a few at a time are made when one is asked for.
    """

    workers: int

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    @abstractmethod
    def at(self, epoch: int, number: int) -> dict[str, Batch]:
        """Return a batch of an epoch; several threads may ask at once."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        """Yield the batches of an epoch from batch ``start`` on, made ahead."""
        return ahead(partial(self.at, epoch), range(start, len(self)), self.workers)


def ahead(make: Callable[[int], Made], numbers: range, workers: int) -> Iterator[Made]:
    """Yield ``make(number)`` for each number in order.

    Workers end with the iterator; exceptions of ``make`` are raised here. Without workers up to eight are made when one
    is asked for, unless they take long: after a training step all that makes a batch has left the processor's caches,
    and so comes back once for all of them.

    Args:
        make: makes one; with workers, in their threads.
        numbers: of what to make.
        workers: threads.
    """
    return made_and_finished(make, list, numbers, workers)


def made_and_finished(
    make: Callable[[int], Made], finish: Callable[[list[Made]], list[Done]], numbers: range, workers: int
) -> Iterator[Done]:
    """As :func:`ahead`, with a second step that takes less time for several at once.

    Args:
        make: makes one.
        finish: takes what was made, and returns as much, in the same order.
        numbers: of what to make.
        workers: threads; each finishes one at a time.
    """
    if not workers:
        return _some_at_once(make, finish, numbers)
    return _by_threads(lambda number: finish([make(number)])[0], numbers, workers)


def _some_at_once(
    make: Callable[[int], Made], finish: Callable[[list[Made]], list[Done]], numbers: range
) -> Iterator[Done]:
    pending: list[Made] = []
    began = 0.0
    for number in numbers:
        if not pending:
            began = time.perf_counter()
        try:
            pending.append(make(number))
        except Exception:
            yield from _finished(
                finish, pending
            )  # those before it are whole: a training may save its state behind them
            raise
        if len(pending) == AT_ONCE or time.perf_counter() - began > SECONDS_AT_ONCE:
            yield from _finished(finish, pending)
            pending = []
    yield from _finished(finish, pending)


def _finished(finish: Callable[[list[Made]], list[Done]], made: list[Made]) -> Iterator[Done]:
    """All at once; one by one if that fails, so that those before a bad one are there."""
    try:
        done = deque(finish(made) if made else [])
    except Exception:
        for one in made:
            yield from finish([one])
        raise
    while done:
        yield done.popleft()


def _by_threads(make: Callable[[int], Made], numbers: range, workers: int) -> Iterator[Made]:
    pending: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > PREFETCH * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
