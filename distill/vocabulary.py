"""Cutting a run's student to the tokens that its training rows have, once its channels are gone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distill import prune
from distill.build import Model, input_spec
from distill.contracts import TRAIN, UserError
from distill.data.class_names import spoken
from distill.data.loader import Loader
from distill.data.texts import Texts
from distill.data.tokens import count_tokens
from distill.formats import TEXT
from distill.preprocess import Tokenizer
from distill.prune.measuring import answers
from distill.prune.vocabulary import plan_vocabulary
from distill.workspace import STUDENT, Workspace

PATH = f"encoders.{TEXT}"
CHECKED = 32
"""Training rows on which the smaller model has to say the same."""


def cut_vocabulary(work: Workspace, model: Model, made: prune.PrunePlan) -> prune.PrunePlan:
    """Return a plan that does what another has done, and takes the rows of rare tokens out of the text encoder's table.

    Args:
        work: with the stage ``data``; its recipe says how rare.
        model: the student as the plan has left it; it is not changed.
        made: the plan.

    Raises:
        UserError: as :func:`distill.prune.vocabulary.plan_vocabulary`; the tokenizer has no unknown token as which
            dropped ones could be read; or the encoder does more with ids than look up rows.
    """
    config = work.recipe.prune.vocabulary
    if config is None:
        return made
    data, spec = work.data(), input_spec(model)
    assert spec.tokenizer is not None and isinstance(data.texts, Texts)
    encoder: Any = model.get_submodule(PATH)
    table: Any = model.get_submodule(f"{PATH}.{encoder.word_table}")
    tokenizer = Tokenizer(spec.tokenizer, spec.max_length, spec.pad_id)
    if tokenizer.num_ids > table.num_embeddings:
        raise UserError(
            f"prune.vocabulary: {spec.tokenizer.parent.name}/{spec.tokenizer.name} has ids up to "
            f"{tokenizer.num_ids - 1}, and the table of {PATH} has {table.num_embeddings} rows; leave it out"
        )
    special, unknown = tokenizer.roles()
    if config.dropped == "unknown" and unknown is None:
        raise UserError(
            f"prune.vocabulary.dropped: {spec.tokenizer.parent.name}/{spec.tokenizer.name} has no token for unknown "
            "ones; set it to nearest"
        )
    counts = count_tokens(data.texts, data.rows(TRAIN), tokenizer, table.num_embeddings, data.folder)
    ids, mask = tokenizer(_prompts(work))
    counts[ids[mask]] += config.min_count  # the recipe's own words are read too
    target = unknown if config.dropped == "unknown" else None
    part = plan_vocabulary(model, PATH, counts, config.min_count, special, target)
    if part.tensors:
        _check_same(work, model, part)
    return prune.compose(made, part)


def _prompts(work: Workspace) -> list[str]:
    """The texts that a recipe itself has the student read."""
    config, labels = work.recipe.retrieval, work.data().labels
    return [
        template.replace("{}", spoken(name))
        for task, templates in ({} if config is None else config.prompts).items()
        for name in labels[task]
        for template in templates
    ]


def _check_same(work: Workspace, model: Model, part: prune.PrunePlan) -> None:
    """Compare the smaller model with the whole one, which reads the same tokens under the ids that they had.

    Raises:
        UserError: they do not say the same of training rows, to the bit.
    """
    smaller: Any = prune.apply(copy.deepcopy(model), part)
    options: dict[str, Any] = {"batch_size": CHECKED, "seed": work.recipe.seed, "augment": None, "shuffle": False}
    loader = Loader(work.data(), TRAIN, {STUDENT: input_spec(smaller)}, **options)
    batch = loader.at(0, 0)[STUDENT]
    (cuts,) = part.tensors.values()
    renamed = {TEXT: torch.tensor(cuts["0"]["kept"])[batch.inputs[TEXT]]}
    before = answers(copy.deepcopy(model).cpu().eval(), [batch._replace(inputs=batch.inputs | renamed)])
    after = answers(smaller.cpu().eval(), [batch])
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            raise UserError(
                f"prune.vocabulary: {PATH} does more with token ids than look up rows, as {name} of training rows "
                "changes with their numbers; leave prune.vocabulary out"
            )
