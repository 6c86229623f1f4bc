"""What numbers of a recipe's losses may be, beside being finite: signatures of losses and parts name these."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

AtLeastZero = Annotated[float, Field(ge=0)]
AtLeastOne = Annotated[float, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Temperature = Positive
Share = Annotated[float, Field(ge=0, le=1)]
PartShare = Annotated[float, Field(ge=0, lt=1)]
"""A share that leaves something."""
Count = Annotated[int, Field(ge=1)]
Scale = Positive | Tensor
"""An inverse temperature: a number, or what a model learns."""
Bias = float | Tensor
