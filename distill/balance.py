"""On-the-fly gradient modulation: what the modalities' own heads say decides how fast each encoder may learn.

In joint training the modality that learns fastest lowers the loss that all share, and the encoders of the others stop
improving. OGM-GE measures in each step how sure every modality is of the right class on its own, slows down those
that are ahead, and adds the noise that smaller gradients have lost.

Source: Peng, Wei, Deng, Wang, Hu (2022), "Balanced Multimodal Learning via On-the-fly Gradient Modulation",
arXiv 2203.15332.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import inf, tanh
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from distill.config import BalanceConfig, ModelConfig, Recipe, TermConfig, TrainConfig
from distill.contracts import IGNORE, Batch, Outputs, UserError
from distill.data.hashing import mix
from distill.losses.terms import LOSSES
from distill.multimodal import MultimodalModel, by_member
from distill.ranks import Ranks
from distill.targets import CLASSIFICATION

TIE = 1e-9  # a ratio this near to 1 is rounding, and the rule jumps there


def balance_factors(scores: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The factor on each modality's gradients: 1 - tanh(alpha · rho_u) where rho_u > 1, else 1.

    rho_u is the score of u divided by the mean of the others' scores; of two modalities that is the paper's ratio.

    Args:
        scores: modality -> its mean probability of the true class, of those that any row has.
        alpha: how hard the leading ones are slowed down; 0 leaves all as they are.

    Returns:
        Modality -> factor in [0, 1], of the same modalities.
    """
    factors = dict.fromkeys(scores, 1.0)
    for name, score in scores.items():
        others = [other for modality, other in scores.items() if modality != name]
        if not alpha or not others:
            continue
        mean = fmean(others)
        if score > mean * (1 + TIE):
            factors[name] = 1 - tanh(alpha * (score / mean if mean else inf))
    return factors


def scored_tasks(terms: Sequence[TermConfig], modalities: Sequence[str]) -> list[str]:
    """The tasks with classes of which every modality's own head has a term: a head that learns nothing has no score."""
    names = dict.fromkeys(str(term.task) for term in terms if CLASSIFICATION in LOSSES[term.loss].tasks)
    tasks = dict.fromkeys(task for task, dot, _ in (name.partition(".") for name in names) if dot)
    return [task for task in tasks if all(f"{task}.{modality}" in names for modality in modalities)]


class Balance:
    """Scores of modalities over one step, and what they do to the gradients of its encoders.

    A score is the mean, over rows that have the modality and a label, of softmax(logits ``TASK.modality``)[label], and
    then over tasks and members of an ensemble. Modulated are the parameters of ``encoders.M``, ``necks.M`` and
    ``token_necks.M``, not heads and fusion: g becomes k·g + n, where n is normal with the standard deviation of g.

    Differences to the paper, whose scores come from one linear classifier of both modalities, each part with half of
    its bias: here they come from heads with losses of their own, which balance too. Its code modulates two encoders'
    weights of four dimensions alone; here it is all that belongs to one of any number of modalities, as encoders of
    texts and records have no convolutions. Entries of a gradient that are exactly 0, such as words that no row has, get
    no noise. The paper trains with SGD: Adam and its kin divide gradients by their usual size, so that a factor which
    stays is divided out again, and what changes from step to step, and the noise, are left.

    Args:
        model: what is trained.
        terms: of its objective.
        config: how hard, and until when.
        seed: the run's, for the noise, which depends on nothing but this seed and the step.
    """

    def __init__(self, model: MultimodalModel, terms: Sequence[TermConfig], config: BalanceConfig, seed: int) -> None:
        self.modalities, self._config, self._seed = list(model.encoders), config, seed
        self.tasks = scored_tasks(terms, self.modalities)
        self._parameters = {name: _parameters(model, name) for name in self.modalities}
        self._sums: Tensor | None = None  # [2, tasks, modalities]: of probabilities, and of rows
        self._step, self._acts = 0, True

    def advance(self, step: int, total: int) -> None:
        """Begin a step, from 0, of all."""
        self._step, self._acts = step, bool(self._config.alpha) and step < self._config.until * total

    def forget(self) -> None:
        """Drop what was seen of a step."""
        self._sums = None

    def see(self, outputs: Outputs, batch: Batch) -> None:
        """Add rows of the present step: all of this rank's, or one of its parts after another."""
        found = torch.zeros(2, len(self.tasks), len(self.modalities), dtype=torch.float64, device=batch.ids.device)
        for answer in by_member(outputs):
            for place, task in enumerate(self.tasks):
                labels = batch.targets[task]
                if labels.is_floating_point():  # no classes
                    continue
                for column, name in enumerate(self.modalities):
                    counted = (labels != IGNORE) & batch.present[name]
                    shares = answer.logits[f"{task}.{name}"].detach().double().softmax(dim=1)
                    true = shares.gather(1, labels.clamp(min=0)[:, None])[:, 0]
                    found[0, place, column] += true.where(counted, 0).sum()
                    found[1, place, column] += counted.sum()
        self._sums = found if self._sums is None else self._sums + found

    def modulate(self, ranks: Ranks) -> dict[str, float]:
        """Change the gradients, which are the sums over all ranks; every rank calls it.

        Returns:
            ``balance/score/M``, ``balance/share/M`` of the sum of scores, and ``balance/factor/M``, of each modality M
            that any row of the step has.
        """
        scores = self._scores(ranks)
        factors = balance_factors(scores, self._config.alpha if self._acts else 0.0)
        total = sum(scores.values())
        if self._acts:
            self._change(factors)
        values = {f"balance/score/{name}": score for name, score in scores.items()}
        values |= {f"balance/share/{name}": score / total for name, score in scores.items() if total}
        return values | {f"balance/factor/{name}": factor for name, factor in factors.items()}

    def _scores(self, ranks: Ranks) -> dict[str, float]:
        assert self._sums is not None
        found, rows = ranks.sum(self._sums).cpu()
        means = {name: (found[:, c] / rows[:, c])[rows[:, c] > 0].tolist() for c, name in enumerate(self.modalities)}
        return {name: fmean(values) for name, values in means.items() if values}

    def _change(self, factors: Mapping[str, float]) -> None:
        """Scale the gradients of each modality, and add noise."""
        generator: torch.Generator | None = None
        for name, parameters in self._parameters.items():
            for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
                generator = generator or noise_generator(self._seed, self._step, gradient.device)
                noise = _noise(gradient, generator) if self._config.noise else None
                gradient.mul_(factors.get(name, 1.0))
                if noise is not None:
                    gradient.add_(noise)


def noise_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Where a step's noise comes from: the same for the same seed and step, whatever was drawn before."""
    key = mix(mix(np.array([seed], np.uint64)) ^ np.uint64(step))
    return torch.Generator(device).manual_seed(int(key[0]))


def check_balance(
    train: TrainConfig,
    model: ModelConfig,
    objectives: Mapping[str, Sequence[TermConfig]],
    where: str,
    classes: Collection[str],
) -> None:
    """Check that a model's modalities can be told apart by what their heads say.

    Args:
        train: the budget.
        model: what it trains.
        objectives: dotted path -> terms, of each training that has this budget.
        where: dotted path of the budget.
        classes: tasks that have classes.

    Raises:
        UserError: they cannot, or the weights are split over the ranks.
    """
    if train.balance is None:
        return
    place = f"{where}.balance"
    if len(model.encoders) < 2:
        raise UserError(f"{place}: there is one encoder, {min(model.encoders)!r}, and nothing to balance; leave it out")
    if model.fusion is None or not model.unimodal_heads:
        raise UserError(
            f"{place}: modalities are compared by heads of their own, and this model has none; set unimodal_heads to "
            "true and add a term on TASK.MODALITY for each, or leave it out"
        )
    if train.shard:
        raise UserError(f"{place}: its noise needs whole gradients, which {where}.shard splits; leave one of them out")
    for objective, terms in objectives.items():
        if not set(classes).intersection(scored_tasks(terms, list(model.encoders))):
            on = {str(term.task).partition(".")[2] for term in terms}
            missing = next((name for name in model.encoders if name not in on), min(model.encoders))
            raise UserError(
                f"{place}: {objective} has no task of classes with a term on each modality's head, and what a head "
                f"says that learns nothing means nothing; add a term on TASK.{missing}"
            )


def check_balances(recipe: Recipe) -> None:
    """Check that modalities are balanced in joint training alone, by heads that learn in each training of the budget.

    Raises:
        UserError: as :func:`check_balance`, or an encoder that learns alone is to be balanced.
    """
    for modality, train in recipe.teacher.pretrain.items():
        if train.balance is not None:
            raise UserError(
                f"teacher.pretrain.{modality}.balance: an encoder learns alone there; leave it out, and set it in "
                "teacher.train"
            )
    teacher, student = recipe.teacher, recipe.student
    classes = [task for task, target in recipe.data.targets.items() if target.kind == CLASSIFICATION]
    distilled = {"student.objective": student.objective}
    check_balance(teacher.train, teacher, {"teacher.objective": teacher.objective}, "teacher.train", classes)
    check_balance(student.train, student, {"student.baseline": student.baseline, **distilled}, "student.train", classes)
    check_balance(recipe.prune.train, student, distilled, "prune.train", classes)


def _parameters(model: MultimodalModel, name: str) -> list[nn.Parameter]:
    """What belongs to one modality before it meets the others, of all members."""
    parts: list[nn.Module] = [model.encoders[name]]
    for member in model.members:
        parts.append(member.necks[name])
        parts += [member.token_necks[name]] if name in member.token_necks else []
    return [parameter for part in parts for parameter in part.parameters()]


def _noise(gradient: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty_like(gradient).normal_(generator=generator)
    return noise.mul_(gradient.std(correction=0)).mul_(gradient != 0)
