"""Numbers that a contrastive loss learns: the inverse temperature of a softmax, and the bias of a sigmoid.

They belong to one term of an objective, are trained and checkpointed with the student, and are left behind with it: a
cosine is ranked alike at any scale.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distill.config import TermConfig
from distill.contracts import UserError
from distill.losses.terms import LEARNED, LOSSES, OWN

LARGEST = 100.0
"""The scale that CLIP allows."""
FIRST = 1 / 0.07
"""Where CLIP's begins; SigLIP's begins at the default of its loss."""


class LearnedScale(nn.Module):
    """exp of a parameter, so above 0 (Radford et al. 2021, arXiv 2103.00020).

    Args:
        first: the number that it begins with.
    """

    def __init__(self, first: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1,), math.log(first)))  # of one dimension, as parts of it can be split

    def forward(self) -> Tensor:
        """The scale, [1]."""
        return self.log.exp()

    @torch.no_grad()
    def settle(self) -> None:
        """Bring it back to 100 after a step that left it above: an ever colder softmax would end the training."""
        self.log.clamp_(max=math.log(LARGEST))


class LearnedBias(nn.Module):
    """A parameter (Zhai et al. 2023, arXiv 2303.15343).

    Args:
        first: the number that it begins with.
    """

    def __init__(self, first: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), first))

    def forward(self) -> Tensor:
        """The bias, [1]."""
        return self.bias.clone()

    def settle(self) -> None:
        """Do nothing: any number is a bias."""


def learned_numbers(term: TermConfig) -> nn.ModuleDict:
    """The parameters of a term's loss that its recipe wants learned, by name."""
    found = nn.ModuleDict()
    for name, value in term.params.items():
        if value == LEARNED:
            default = inspect.signature(LOSSES[term.loss].function).parameters[name].default
            bias = name.endswith("bias")
            found[name] = LearnedBias(default) if bias else LearnedScale(default if "siglip" in term.loss else FIRST)
    return found


def own_name(name: str) -> str:
    """Return what a teacher's parameter is called in a loss of its own: ``logit_scale`` of ``teacher_scale``."""
    return name.replace("teacher", "logit")


def with_own(terms: Sequence[TermConfig], scale: Mapping[str, float]) -> list[TermConfig]:
    """Put a teacher's own scale and bias where terms ask for them.

    Args:
        terms: of the student's objective.
        scale: ``logit_scale``, ``logit_bias`` -> number.

    Raises:
        UserError: the teacher has no such number.
    """
    found = []
    for number, term in enumerate(terms):
        asked = [name for name, value in term.params.items() if value == OWN]
        for name in asked:
            if own_name(name) not in scale:
                raise UserError(
                    f"student.objective[{number}].params.{name}: the teacher's weights come without a "
                    f"{own_name(name)}; give a number"
                )
        params = {**term.params, **{name: scale[own_name(name)] for name in asked}}
        found.append(term.model_copy(update={"params": params}))
    return found
