"""What a bundle may cost and must keep, and which of several bundles no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from distill.contracts import UserError
from distill.report import formats

MEGABYTE = 1e6
LATENCY, SIZE, RETENTION = "latency", "size", "retention"


class Figures(NamedTuple):
    """What is known of a bundle.

    Attributes:
        latency_ms: median latency of one row.
        size_bytes: of the model file.
        retention: its measure on the validation rows over the teacher's; None where nobody has trained it.
    """

    latency_ms: float
    size_bytes: int
    retention: float | None = None

    @property
    def said(self) -> str:
        """The figures as people read them."""
        cost = f"{formats.milliseconds(self.latency_ms)}, {formats.size(self.size_bytes)}"
        return cost if self.retention is None else f"{cost}, retention {self.retention:.3f}"


@dataclass(frozen=True)
class Budget:
    """Limits of a bundle; None is no limit."""

    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    min_retention: float | None = None

    def check(self) -> None:
        """Check that the limits can be met.

        Raises:
            UserError: there is none, or one that nothing meets.
        """
        options = {f"--{name.replace('_', '-')}": value for name, value in asdict(self).items() if value is not None}
        if not options:
            raise UserError("there is no budget to fit; give --max-latency-ms, --max-size-mb or --min-retention")
        for option, value in options.items():
            if not math.isfinite(value) or value <= 0:
                raise UserError(f"{option} is {value:g}, which no bundle meets; give a number above 0")
        if self.min_retention is not None and self.min_retention > 1:
            raise UserError(f"--min-retention is {self.min_retention:g}; give a share of the teacher's, at most 1")

    @property
    def limits_costs(self) -> bool:
        """Whether latency or size has a limit: then the most retained is wanted, and else the fastest."""
        return self.max_latency_ms is not None or self.max_size_mb is not None

    def excess(self, found: Figures) -> dict[str, float]:
        """By how much each limit is exceeded, relative to the limit; 0 or less where it holds.

        A retention that nobody knows exceeds nothing.
        """
        over: dict[str, float] = {}
        if self.max_latency_ms is not None:
            over[LATENCY] = found.latency_ms / self.max_latency_ms - 1
        if self.max_size_mb is not None:
            over[SIZE] = found.size_bytes / (self.max_size_mb * MEGABYTE) - 1
        if self.min_retention is not None and found.retention is not None:
            over[RETENTION] = 1 - found.retention / self.min_retention
        return over

    def misses(self, found: Figures, *names: str) -> list[str]:
        """Why figures are outside, a few words a limit; of all limits, or of some."""
        said = {
            LATENCY: f"latency {formats.milliseconds(found.latency_ms)} > {self.max_latency_ms} ms",
            SIZE: f"size {formats.size(found.size_bytes)} > {self.max_size_mb} MB",
            RETENTION: f"retention {found.retention or 0:.3f} < {self.min_retention}",
        }
        return [said[name] for name, over in self.excess(found).items() if over > 0 and name in (names or said)]

    @property
    def said(self) -> str:
        """The limits as people read them."""
        limits = {
            f"latency ≤ {self.max_latency_ms} ms": self.max_latency_ms,
            f"size ≤ {self.max_size_mb} MB": self.max_size_mb,
            f"retention ≥ {self.min_retention}": self.min_retention,
        }
        return ", ".join(text for text, value in limits.items() if value is not None)


def dominates(ours: Figures, theirs: Figures) -> bool:
    """Whether a bundle is at least as good in all respects, and better in one."""
    costs = [(one.latency_ms, one.size_bytes, -(one.retention or 0.0)) for one in (ours, theirs)]
    return all(a <= b for a, b in zip(*costs, strict=True)) and costs[0] != costs[1]


def front(found: Sequence[Figures]) -> list[int]:
    """The Pareto front: indices of those that no other one dominates, by rising latency."""
    kept = [index for index, one in enumerate(found) if not any(dominates(other, one) for other in found)]
    return sorted(kept, key=lambda index: found[index])
