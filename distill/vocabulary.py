"""Cutting a run's student to the tokens that its training rows have, once its channels are gone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from distill import prune
from distill.build import Model, input_spec
from distill.contracts import TRAIN, UserError
from distill.data.class_names import spoken
from distill.data.loader import Loader
from distill.data.texts import Texts
from distill.data.tokens import count_tokens
from distill.formats import TEXT
from distill.losses.terms import reads_text_tokens
from distill.preprocess import Tokenizer
from distill.prune.measuring import answers
from distill.prune.vocabulary import plan_vocabulary
from distill.workspace import Workspace

PATH = f"encoders.{TEXT}"
CHECKED, LOOKED_AT = 32, 1024
"""Training rows on which the smaller model has to say the same, and among how many they are looked for."""


def cut_vocabulary(work: Workspace, model: Model, made: prune.PrunePlan) -> prune.PrunePlan:
    """Return a plan that does what another has done, and takes the rows of rare tokens out of the text encoder's table.

    Args:
        work: with the stage ``data``; its recipe says how rare.
        model: the student as the plan has left it; it is not changed.
        made: the plan.

    Raises:
        UserError: the tokens cannot be cut: see :func:`distill.prune.vocabulary.plan_vocabulary`; or texts would lose
            tokens that a term compares one by one.
    """
    config = work.recipe.prune.vocabulary
    if config is None:
        return made
    data, spec = work.data(), input_spec(model)
    assert spec.tokenizer is not None and isinstance(data.texts, Texts)
    encoder: Any = model.get_submodule(PATH)
    size = model.get_submodule(f"{PATH}.{encoder.word_table}").num_embeddings
    tokenizer = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id)
    special, unknown = tokenizer.roles()
    _check_unknown(work, special, unknown)
    counts = count_tokens(data.texts, data.rows(TRAIN), tokenizer, size, data.folder)
    ids, mask = tokenizer(_prompts(work))
    counts[ids[mask]] += config.min_count  # the recipe's own words are read too
    part = plan_vocabulary(model, PATH, counts, config.min_count, special, unknown)
    _check_same(work, model, part, tokenizer)
    return prune.compose(made, part)


def _check_unknown(work: Workspace, special: list[int], unknown: int | None) -> None:
    """Where no token stands for unknown ones, texts get shorter."""
    if unknown is None and not special:
        raise UserError(
            "prune.vocabulary: the student's tokenizer has neither an unknown token nor tokens around a text, so a "
            "text of dropped tokens would have none; leave prune.vocabulary out"
        )
    for number, term in enumerate(work.recipe.student.objective if unknown is None else []):
        if reads_text_tokens(term):
            raise UserError(
                f"prune.vocabulary: the student's tokenizer has no unknown token: texts lose those that are dropped, "
                f"and student.objective[{number}] compares token by token; leave one out"
            )


def _prompts(work: Workspace) -> list[str]:
    """The texts that a recipe itself has the student read."""
    config = work.recipe.retrieval
    labels = work.data().labels
    return [
        template.replace("{}", spoken(name))
        for task, templates in ({} if config is None else config.prompts).items()
        for name in labels[task]
        for template in templates
    ]


def _check_same(work: Workspace, model: Model, part: prune.PrunePlan, tokenizer: Tokenizer) -> None:
    """Compare the smaller model with the whole one on training rows of kept tokens, whose inputs have other numbers.

    Raises:
        UserError: they do not say the same, to the bit: the tower does with ids what is not known here.
    """
    smaller: Any = prune.apply(copy.deepcopy(model), part)
    models = {"whole": copy.deepcopy(model), "smaller": smaller}
    specs = {name: input_spec(each) for name, each in models.items()}
    options: dict[str, Any] = {"batch_size": CHECKED, "seed": work.recipe.seed, "augment": None, "shuffle": False}
    loader = Loader(work.data(), TRAIN, specs, **options)
    some = loader.row_positions[:LOOKED_AT]
    ids, mask = tokenizer([loader.data.texts[int(row)] for row in some])
    rows = some[(~mask | np.isin(ids, smaller.get_submodule(PATH).kept_tokens)).all(axis=1)][:CHECKED]
    if not len(rows) or not part.tensors:
        return
    batches = loader.batch(rows, loader.clean_views(len(rows)))
    whole, cut = (answers(each.cpu().eval(), [batches[name]]) for name, each in models.items())
    for name, value in whole.items():
        if not torch.equal(value, cut[name]):
            raise UserError(
                f"prune.vocabulary: {PATH} does more with token ids than look up rows, as {name} of training rows "
                "changes with their numbers; leave prune.vocabulary out"
            )
