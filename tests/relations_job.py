"""Every loss that compares rows, on the rows of several processes and on those of one; test_ranks.py starts it.

Usage: ``relations_job.py FILE``; the first rank writes, of each case, the value and gradients of one process, and how
far those of all ranks together are from them.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from tiny import terms

from distill.batch_parts import take
from distill.contracts import CLEAN_VIEW, Batch, Outputs
from distill.losses.objective import Objective
from distill.losses.terms import LOSSES
from distill.ranks import Ranks, join

ROWS, NO_TEXT = 11, [2, 10]
SPLITS = {"7 and 4": 7, "10 and none with a text": 10, "11 and none": 11}
ON = {
    "teacher": {"task": "kind"},
    "features": {"embedding": "text"},
    "pair": {"embedding": "image,text"},
    "pair+teacher": {"embedding": "image,text"},
    "pair+teachers": {"embedding": "image,text", "teacher": ["teacher", "other"]},
}
"""Kind of a loss -> what a term of it is on; a relational loss of another kind is to be added here."""
PARAMS = {"clip_ensemble_ce": {"teacher_scales": [50.0, 30.0]}}
"""Of losses that have no default."""


def item_of(name: str) -> dict:
    """A term of a loss."""
    return {"loss": name, **ON[LOSSES[name].kind], "params": PARAMS.get(name, {})}


def cases() -> dict[str, dict]:
    """A term of each relational loss, and with positives of those that take them."""
    found = {}
    for name in [name for name, loss in LOSSES.items() if loss.relational]:
        found[name] = item_of(name)
        if LOSSES[name].keys:
            found[f"{name} with positives"] = {**found[name], "positives": ["text"]}
    return found


def said(seed: int, suffix: str = "") -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def random(width):
        return torch.randn(ROWS, width, generator=generator, dtype=torch.float64)

    return Outputs({f"kind{suffix}": random(5)}, {f"{name}{suffix}": random(8) for name in ("image", "text")}, {})


def teachers() -> Outputs:
    return Outputs(*(own | other for own, other in zip(said(1), said(2, "@other"), strict=True)))


def batch() -> Batch:
    present = {name: torch.ones(ROWS, dtype=torch.bool) for name in ("image", "text")}
    present["text"][NO_TEXT] = False
    return Batch(torch.arange(ROWS), torch.full((ROWS,), CLEAN_VIEW), {}, present, {"kind": torch.arange(ROWS) % 5})


def measured(objective, rows: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
    """The value, the gradients of the student's rows (zero elsewhere) and of what the term learns, of all ranks."""
    student = take(said(0), rows)
    leaves = [tensor.requires_grad_() for kind in student for tensor in kind.values()]
    objective.zero_grad()
    shares = None if ranks.count == 1 else [1 / ranks.count]
    value, _ = objective(student, take(teachers(), rows), take(batch(), rows), shares, ranks)
    value.backward()
    placed = []
    for leaf in leaves:
        whole = torch.zeros(ROWS, *leaf.shape[1:], dtype=leaf.dtype)
        whole[rows] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        placed.append(ranks.sum(whole))
    return [ranks.sum(value), *placed, *(ranks.sum(parameter.grad) for parameter in objective.parameters())]


def main() -> None:
    ranks, everything = join(), torch.arange(ROWS)
    alone = Ranks()
    alone.rank, alone.count = 0, 1
    keys = {"id": everything, "text": everything // 2}
    results = {}
    for (name, item), (split, first) in itertools.product(cases().items(), SPLITS.items()):
        torch.manual_seed(0)
        objective = Objective(terms(item), said(0), teachers(), row_keys=keys).double()
        expected = [tensor.clone() for tensor in measured(objective, everything, alone)]
        own = everything[:first] if ranks.first else everything[first:]
        found = measured(objective, own, ranks)
        results[f"{name}, {split}"] = {
            "value": expected[0].item(),
            "gradient": max(tensor.abs().max().item() for tensor in expected[1:]),
            "apart": [(one - other).abs().max().item() for one, other in zip(expected, found, strict=True)],
        }
    if ranks.first:
        Path(sys.argv[1]).write_text(json.dumps(results))
    if ranks.count > 1:
        torch.distributed.destroy_process_group()  # or its threads may abort the process while it ends


if __name__ == "__main__":
    main()
