"""How the heads of a task decide together: late fusion, of what each of them answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import ModelConfig, TermConfig
from distill.contracts import UserError

FUSED = "fused"


class Decision(nn.Module):
    """A task's logits from those of its heads, of which absent modalities have no say.

    With z_h the logits of head h, p_h = softmax(z_h), and w_h its weight where it is there:

    - "mean": Σ w_h z_h / Σ w_h; up to a constant a row, the log of the weighted geometric mean of p_h (a logarithmic
      opinion pool; Genest & Zidek 1986).
    - "learned": the same, w_h times a factor that is learned for each task and head, 1 at first. A loss on the task
      itself teaches it.
    - "product": Σ w_h log p_h, a product of experts (Hinton 2002): agreeing heads are surer together than each alone.
    - "mixture": log(Σ w_h p_h / Σ w_h), a linear opinion pool: one head that is sure outweighs others that are not.

    Args:
        kind: one of these.
        tasks: names.
        modalities: those with heads.
        weights: "fused" or a modality -> w; 1 by default. That of "fused" may be 0: then modalities decide alone, but
            for rows that have none of them. Heads of modalities whose weight is 0 learn, and are in no exported graph.
    """

    def __init__(
        self, kind: str, tasks: Iterable[str], modalities: Sequence[str], weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.kind, self.weights = kind, {name: weights.get(name, 1.0) for name in (FUSED, *modalities)}
        learnt = tasks if kind == "learned" else ()
        self.scores = nn.ParameterDict({task: nn.Parameter(torch.zeros(len(self.weights))) for task in learnt})

    def forward(self, task: str, fused: Tensor, alone: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Return the task's logits.

        Args:
            task: which.
            fused: [B, C], logits of the fused head.
            alone: modality -> [B, C], those of its own head.
            present: modality -> bool [B].

        Returns:
            [B, C].
        """
        alone = {name: logits for name, logits in alone.items() if self.weights[name]}
        own: Any = self.weights[FUSED]
        if not alone:
            return fused * (own or 1.0) if self.kind == "product" else fused
        factors: Any = dict.fromkeys(alone, 1.0)
        if task in self.scores:
            first, *others = self.scores[task].exp()
            names = [name for name in self.weights if name != FUSED]
            own, factors = own * first, dict(zip(names, others, strict=True))
        weights = {name: present[name][:, None] * (self.weights[name] * factors[name]) for name in alone}
        if not self.weights[FUSED]:
            own = ~torch.stack([present[name] for name in alone]).any(0)[:, None] * 1.0
        if self.kind == "mixture":
            return _mixture([fused, *alone.values()], [torch.zeros_like(fused[:, :1]) + own, *weights.values()])
        if self.kind == "product":
            fused, alone = fused.log_softmax(1), {name: logits.log_softmax(1) for name, logits in alone.items()}
        total = own * fused + torch.stack([weights[name] * logits for name, logits in alone.items()]).sum(0)
        return total if self.kind == "product" else total / (own + torch.stack(list(weights.values())).sum(0))


def _mixture(logits: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Log of the weighted mean of probabilities; a weight of 0 counts for nothing."""
    together = torch.stack(list(weights))  # [heads, B, 1]
    logs = torch.stack([one.log_softmax(1) for one in logits]) + together.clamp_min(1e-30).log()
    return torch.logsumexp(logs, dim=0) - together.sum(0).log()


def check_decision(config: ModelConfig, objectives: Mapping[str, Sequence[TermConfig]], tasks: Iterable[str]) -> None:
    """Refuse learned weights that no term teaches.

    Args:
        config: of the model.
        objectives: dotted name -> the terms that train it.
        tasks: of the data.

    Raises:
        UserError: no term reads a task itself, but at most one of its heads.
    """
    if config.decision != "learned":
        return
    for where, terms in objectives.items():
        for task in config.heads or tasks:
            if terms and not any(term.task == task for term in terms):
                raise UserError(
                    f"{where}: no term reads task {task!r} itself, and so none teaches how its heads are weighted; "
                    f"add one with task: {task}, or set decision to mean"
                )
