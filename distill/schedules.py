"""Numbers of a recipe that change over a training; no torch, as the schema of recipes imports this."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_serializer


class Schedule(BaseModel):
    """A number that goes from one value to another: a term's weight, or one of its parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    from_: float = Field(alias="from")
    to: float  # from ``until`` on
    until: float = Field(1.0, gt=0, le=1)  # share of all steps
    schedule: Literal["linear", "cosine"] = "linear"  # "cosine" is slow at both ends

    def at(self, progress: float) -> float:
        """The number at a share of all steps, 0 in the first one."""
        done = min(1.0, progress / self.until)
        share = done if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        return self.from_ * (1 - share) + self.to * share

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"from": self.from_, "to": self.to, "until": self.until, "schedule": self.schedule}


def _kind(value: Any) -> str:
    return "=schedule" if isinstance(value, dict | Schedule) else "=number"


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("=number")] | Annotated[Schedule, Tag("=schedule")], Discriminator(_kind)
]
"""A number of at least 0, or a schedule of such (whose ends :func:`distill.losses.terms.check_terms` checks)."""


def at(value: Any, progress: float) -> Any:
    """A schedule's number at a share of all steps; any other value as it is."""
    return value.at(progress) if isinstance(value, Schedule) else value
