"""One call of every loss, on random tensors of any size, precision and scale, for tests that hold of all of them."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from distill import losses

HELPERS = {"crd_constant", "reverse_gradient", "review_fusion"}  # exported, and not a loss


@dataclass
class Draw:
    """Random inputs of a call. Each remembers whose it is: what the student learns, or what the teacher said."""

    rows: int = 6
    classes: int = 5
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    alike: bool = False  # all rows are the same
    constant: float | None = None  # all that the student says is this number
    student: list[torch.Tensor] = field(default_factory=list)
    teacher: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.rows + 10 * self.classes)

    def _random(self, *shape):
        values = 2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64) - 1
        return values[:1].expand(shape).clone() if self.alike else values

    def own(self, *shape):
        values = self._random(*shape) if self.constant is None else torch.full(shape, self.constant)
        return self._leaf(self.scale * values, self.student)

    def given(self, *shape):
        return self._leaf(self.scale * self._random(*shape), self.teacher)

    def own_unit(self, *shape):
        return self._leaf(F.normalize(self._random(*shape), dim=-1), self.student)

    def given_unit(self, *shape):
        return self._leaf(F.normalize(self._random(*shape), dim=-1), self.teacher)

    def weight(self, *shape):
        values = torch.rand(*shape, generator=self.generator, dtype=torch.float64) - 0.5
        return self._leaf(values, self.student)

    def labels(self):
        """Labels of all classes but the last, one of them missing where there are rows enough."""
        found = torch.arange(self.rows) % max(1, self.classes - 1)
        found[3:4] = -100
        return found

    def _leaf(self, values, side):
        leaf = values.to(self.dtype).requires_grad_()
        side.append(leaf)
        return leaf


def logits(d):
    return d.own(d.rows, d.classes), d.given(d.rows, d.classes)


def maps(d, teacher=4):
    return d.own(d.rows, 4, 6, 5), d.given(d.rows, teacher, 6, 5)


def vectors(d):
    return d.own(d.rows, 8), d.given(d.rows, 12)


def pairs(d, teacher=8):
    return *(d.own_unit(d.rows, 8) for _ in range(2)), *(d.given_unit(d.rows, teacher) for _ in range(2))


def tokens(d):
    mask = torch.ones(d.rows, 4, dtype=torch.bool)
    mask[0, 2:] = False
    return d.own(d.rows, 4, 8), d.given(d.rows, 4, 8), mask


def scores(d):
    return d.own(d.rows, 2, 4, 4), d.given(d.rows, 2, 4, 4), tokens(Draw(d.rows))[2]


def multilabel(d):
    known = torch.zeros(d.rows, d.classes)
    known[:, -1:] = float("nan")
    return *logits(d), known


def targets(d):
    given = torch.zeros(d.rows, 3)
    given[0] = float("nan")
    return d.own(d.rows, 3), d.given(d.rows, 3), given


def bank(d):
    vec = d.own_unit(d.rows, 8), d.given_unit(d.rows, 8)
    stored = d.given_unit(d.rows, 5, 8), d.given_unit(d.rows, 5, 8)
    return (*vec, *stored), {"num_rows": 50, "student_constant": 60.0, "teacher_constant": 70.0}


def fusing(d):
    return *pairs(d, 12), d.weight(8, 20), d.weight(8), d.weight(8, 20), d.weight(8)


def generation(d):
    mask = (torch.arange(30) % 3 > 0).reshape(1, 1, 6, 5).double()
    return *maps(d), mask.to(d.dtype), d.weight(4, 4, 3, 3), d.weight(4), d.weight(4, 4, 3, 3), d.weight(4)


def several(d):
    """Labels of which some hold; the last is unknown everywhere, and a row's all are where there are rows enough."""
    found = (torch.arange(d.rows)[:, None] + torch.arange(d.classes)) % 2.0
    found[:, -1:] = float("nan")
    found[3:4] = float("nan")
    return d.own(d.rows, d.classes), found


def captions(d):
    """Tokens of which the last is behind the end, and a row's all are missing where there are rows enough."""
    found = (torch.arange(d.rows)[:, None] + torch.arange(4)) % d.classes
    found[:, -1:] = -100
    found[3:4] = -100
    return found


def numbers(d):
    own, _, given = targets(d)
    return own, given


CALLS = {
    "cross_entropy": lambda d: ((d.own(d.rows, d.classes), d.labels()), {}),
    "logit_adjusted": lambda d: ((d.own(d.rows, d.classes), d.labels(), 3 * torch.arange(d.classes)), {}),
    "weighted_cross_entropy": lambda d: ((d.own(d.rows, d.classes), d.labels(), 3 * torch.arange(d.classes)), {}),
    "bce": lambda d: ((*several(d), 1 + torch.arange(2 * d.classes).view(2, -1)), {"positive_weight": "balanced"}),
    "token_cross_entropy": lambda d: ((d.own(d.rows, 4, d.classes), captions(d)), {}),
    "token_kd": lambda d: ((d.own(d.rows, 4, d.classes), d.given(d.rows, 4, d.classes), captions(d)), {}),
    "asymmetric": lambda d: (several(d), {}),
    "mse": lambda d: (numbers(d), {}),
    "smooth_l1": lambda d: (numbers(d), {}),
    "kd": lambda d: (logits(d), {}),
    "mse_logits": lambda d: (logits(d), {}),
    "dkd": lambda d: ((*logits(d), d.labels()), {}),
    "nkd": lambda d: ((*logits(d), d.labels()), {}),
    "dist": lambda d: (logits(d), {}),
    "logit_standardized_kd": lambda d: (logits(d), {}),
    "multilabel_kd": lambda d: (multilabel(d), {}),
    "regression_kd": lambda d: (targets(d), {"margin": 10.0 * d.scale**2}),
    "ctkd": lambda d: ((*logits(d), torch.tensor([3.0], dtype=d.dtype).requires_grad_()), {}),
    "cosine": lambda d: ((d.own(d.rows, 8), d.given(d.rows, 8)), {}),
    "fitnet": lambda d: (maps(d), {}),
    "simkd": lambda d: (maps(d), {}),
    "srrl": lambda d: ((*maps(d), d.weight(3, 4).detach()), {}),
    "at": lambda d: (maps(d, 7), {}),
    "fsp": lambda d: (
        (d.own(d.rows, 4, 6, 5), d.own(d.rows, 3, 3, 3), d.given(d.rows, 4, 6, 5), d.given(d.rows, 3, 3, 3)),
        {},
    ),
    "nst": lambda d: (maps(d, 7), {}),
    "vid": lambda d: ((*maps(d, 7), d.weight(7, 4, 1, 1), d.weight(7)), {}),
    "ofd": lambda d: ((*maps(d), -d.scale / 4 * torch.ones(4)), {}),
    "hcl": lambda d: (maps(d), {}),
    "cwd": lambda d: (maps(d), {}),
    "mgd": lambda d: (generation(d), {}),
    "token_mse": lambda d: (tokens(d), {}),
    "attention_transfer": lambda d: (scores(d), {}),
    "minilm_relations": lambda d: (tokens(d), {"heads": 2}),
    "rkd": lambda d: (vectors(d), {}),
    "sp": lambda d: (vectors(d), {}),
    "pkt": lambda d: (vectors(d), {}),
    "cckd": lambda d: (pairs(d, 12)[1:3], {}),
    "crd": bank,
    "queue_kl": lambda d: ((d.own_unit(d.rows, 8), d.given_unit(d.rows, 8), d.given_unit(7, 8)), {}),
    "clip_infonce": lambda d: (pairs(d)[:2], {}),
    "siglip": lambda d: (pairs(d)[:2], {}),
    "clip_relational_ce": lambda d: (pairs(d, 12), {}),
    "clip_relational_kl": lambda d: (pairs(d, 12), {}),
    "siglip_relational": lambda d: (pairs(d, 12), {"teacher_bias": -5.0}),
    "clip_fd": lambda d: (pairs(d), {}),
    "clip_icl": lambda d: (pairs(d), {}),
    "clip_gd": lambda d: (pairs(d), {}),
    "clip_afd": lambda d: (fusing(d), {}),
    "clip_ensemble_ce": lambda d: ((*pairs(d), *pairs(d, 12)[2:]), {"teacher_scales": (50.0, 30.0)}),
}
"""A loss's name -> its arguments, made by a Draw."""


def call(name, draw):
    """The value of a loss on what is drawn."""
    arguments, named = CALLS[name](draw)
    used = {id(value) for value in arguments}
    draw.student = [leaf for leaf in draw.student if id(leaf) in used]
    draw.teacher = [leaf for leaf in draw.teacher if id(leaf) in used]
    return getattr(losses, name)(*arguments, **named)
