"""Structured pruning as a plan: what stays of a model, found once, applied anywhere.

:func:`plan` ranks what may go and writes down what remains as JSON. :func:`apply` needs just that JSON: it cuts a
model's tensors, so the same call prunes trained weights, and rebuilds the small architecture before ``load_weights``
reads them.
"""

from distill.prune.checks import check_names, check_pruning, default_modules, judges, settings, younger
from distill.prune.planner import plan, prune
from distill.prune.plans import PrunePlan, apply, compose
from distill.prune.selection import choose

__all__ = [
    "PrunePlan",
    "apply",
    "check_names",
    "check_pruning",
    "choose",
    "compose",
    "default_modules",
    "judges",
    "plan",
    "prune",
    "settings",
    "younger",
]
