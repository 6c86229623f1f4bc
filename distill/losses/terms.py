"""The losses that recipes name, what each is given, and the checks of terms that need no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from torch import Tensor

from distill.builders import check_type
from distill.config import MixConfig, TermConfig, complaint, nearest, shortened
from distill.contracts import UserError
from distill.layouts import Arrangement, modality_of
from distill.losses import captioning, contrastive, features, logits, maps, outputs, parts, relations, tokens
from distill.losses.bounds import AtLeastZero, Bias, Scale
from distill.losses.memories import Crd, QueueKl
from distill.schedules import Schedule
from distill.targets import CAPTIONING, CLASSIFICATION, MULTILABEL, REGRESSION

Kind = Literal[
    "labels",
    "labels+counts",
    "teacher",
    "teacher+labels",
    "teacher+numbers",
    "features",
    "features+ids",
    "features+head",
    "stages",
    "tokens",
    "pair",
    "pair+teacher",
    "pair+teachers",
]


@dataclass(frozen=True)
class Loss:
    """A loss and the arguments it takes.

    Attributes:
        function: the pure function, or the part that holds what it learns or stores and calls it.
        kind: "labels" (logits, labels), "labels+counts" (and the training rows of each class), "teacher" (logits of
            both), "teacher+labels", "teacher+numbers" (targets that are numbers, as many as logits, NaN where missing),
            "features" (an embedding or a pair of taps, of both), "features+ids" (and the ids of the rows),
            "features+head" (a pair of taps and the weights of the teacher's classifier), "stages" (taps of several
            stages, the student's and then the teacher's), "tokens" (a pair of taps and the mask of the text's tokens,
            if they are of a text), "pair" (two embeddings of the model's own, normalised), "pair+teacher" (and the
            same two of the teacher), "pair+teachers" (of several teachers).
        relational: True where rows are compared with each other, so that splitting a batch changes the value.
        one_width: True where the student's numbers are compared with the teacher's one by one. Features of other shapes
            then get a projector (:mod:`distill.losses.projectors`); embeddings of a pair have none and are refused.
        arrangement: how tapped features of both models are laid before the call, and before a projector.
        unit: True where the features of both are vectors, divided by their length before the call.
        raw: True where a number added to all logits of a row changes the loss.
        stages: of "stages", how many a side; None for any number.
        keys: True where rows may be told to be no negatives of each other, by keys of theirs.
        tasks: kinds of tasks that a loss on logits is for.
    """

    function: Callable[..., Tensor] | type[parts.Part]
    kind: Kind
    relational: bool = False
    one_width: bool = True
    unit: bool = False
    raw: bool = False
    arrangement: Arrangement = "as_is"
    stages: int | None = None
    keys: bool = False
    tasks: tuple[str, ...] = (CLASSIFICATION,)

    @property
    def part(self) -> type[parts.Part] | None:
        """The part, of a loss that has one."""
        return self.function if isinstance(self.function, type) else None


LOSSES = {
    "cross_entropy": Loss(logits.cross_entropy, "labels"),
    "logit_adjusted": Loss(logits.logit_adjusted, "labels+counts"),
    "kd": Loss(logits.kd, "teacher"),
    "weighted_cross_entropy": Loss(logits.weighted_cross_entropy, "labels+counts"),
    "bce": Loss(outputs.bce, "labels+counts", tasks=(MULTILABEL,)),
    "asymmetric": Loss(outputs.asymmetric, "labels", tasks=(MULTILABEL,)),
    "mse": Loss(outputs.mse, "labels", tasks=(REGRESSION,)),
    "smooth_l1": Loss(outputs.smooth_l1, "labels", tasks=(REGRESSION,)),
    "token_cross_entropy": Loss(captioning.token_cross_entropy, "labels", tasks=(CAPTIONING,)),
    "token_kd": Loss(captioning.token_kd, "teacher+labels", tasks=(CAPTIONING,)),
    "mse_logits": Loss(logits.mse_logits, "teacher", raw=True, tasks=(CLASSIFICATION, MULTILABEL, REGRESSION)),
    "logit_standardized_kd": Loss(logits.logit_standardized_kd, "teacher"),
    "ctkd": Loss(parts.Ctkd, "teacher"),
    "multilabel_kd": Loss(outputs.multilabel_kd, "teacher", raw=True, tasks=(MULTILABEL,)),
    "dist": Loss(logits.dist, "teacher", relational=True),
    "dkd": Loss(logits.dkd, "teacher+labels"),
    "nkd": Loss(logits.nkd, "teacher+labels"),
    "regression_kd": Loss(outputs.regression_kd, "teacher+numbers", tasks=(REGRESSION,)),
    "cosine": Loss(features.cosine, "features", arrangement="last"),
    "fitnet": Loss(features.fitnet, "features"),
    "simkd": Loss(features.simkd, "features"),
    "srrl": Loss(features.srrl, "features+head", arrangement="mean"),
    "at": Loss(maps.at, "features", one_width=False, arrangement="map"),
    "nst": Loss(maps.nst, "features", one_width=False, arrangement="map"),
    "hcl": Loss(maps.hcl, "features", arrangement="map"),
    "cwd": Loss(maps.cwd, "features", arrangement="map"),
    "vid": Loss(parts.Vid, "features", one_width=False, arrangement="map"),
    "mgd": Loss(parts.Mgd, "features", arrangement="map"),
    "ofd": Loss(parts.Ofd, "features", one_width=False, arrangement="map"),
    "fsp": Loss(parts.Fsp, "stages", one_width=False, arrangement="map", stages=2),
    "review": Loss(parts.Review, "stages", one_width=False, arrangement="map"),
    "token_mse": Loss(tokens.token_mse, "tokens", arrangement="last"),
    "attention_transfer": Loss(tokens.attention_transfer, "tokens", one_width=False),
    "minilm_relations": Loss(tokens.minilm_relations, "tokens", one_width=False, arrangement="last"),
    "rkd": Loss(relations.rkd, "features", relational=True, one_width=False),
    "sp": Loss(relations.sp, "features", relational=True, one_width=False),
    "pkt": Loss(relations.pkt, "features", relational=True, one_width=False),
    "cckd": Loss(relations.cckd, "features", relational=True, one_width=False, unit=True),
    "crd": Loss(Crd, "features+ids", one_width=False),
    "queue_kl": Loss(QueueKl, "features+ids", unit=True),
    "clip_infonce": Loss(contrastive.clip_infonce, "pair", relational=True, keys=True),
    "siglip": Loss(contrastive.siglip, "pair", relational=True, keys=True),
    "clip_relational_ce": Loss(contrastive.clip_relational_ce, "pair+teacher", relational=True, one_width=False),
    "clip_relational_kl": Loss(contrastive.clip_relational_kl, "pair+teacher", relational=True, one_width=False),
    "siglip_relational": Loss(contrastive.siglip_relational, "pair+teacher", relational=True, one_width=False),
    "clip_fd": Loss(contrastive.clip_fd, "pair+teacher"),
    "clip_icl": Loss(contrastive.clip_icl, "pair+teacher", relational=True, keys=True),
    "clip_gd": Loss(contrastive.clip_gd, "pair+teacher", relational=True),
    "clip_afd": Loss(parts.ClipAfd, "pair+teacher", relational=True, one_width=False),
    "clip_ensemble_ce": Loss(contrastive.clip_ensemble_ce, "pair+teachers", relational=True, one_width=False),
}

LEARNED = "learned"
"""In place of a number: a parameter of :mod:`distill.losses.scales`."""
OWN = "own"
"""In place of a number: what the teacher itself was trained with."""
LABELS: tuple[Kind, ...] = ("labels", "labels+counts", "teacher+labels", "teacher+numbers")
PAIRS: tuple[Kind, ...] = ("pair", "pair+teacher", "pair+teachers")
FEATURES: tuple[Kind, ...] = ("features", "features+ids", "features+head", "tokens")
TASKS: tuple[Kind, ...] = (*LABELS, "teacher")
TEACHING: tuple[Kind, ...] = (
    *("teacher", "teacher+labels", "teacher+numbers"),
    *(*FEATURES, "stages"),
    *("pair+teacher", "pair+teachers"),
)
NEEDS = (
    dict.fromkeys(FEATURES, ("embedding", "taps"))
    | dict.fromkeys(TASKS, ("task",))
    | dict.fromkeys(PAIRS, ("embedding",))
    | dict.fromkeys(("stages", "tokens"), ("taps",))
    | {"features+head": ("task and taps",)}
)
"""Kind -> the keys, one of which says what the loss is on."""


def check_terms(terms: Sequence[TermConfig], where: str) -> None:
    """Check names, targets and parameters of terms without building anything.

    Raises:
        UserError: an unknown loss or parameter, a value of another type or beyond its bounds, or a term without the
            target that its loss needs.
    """
    for index, term in enumerate(terms):
        place = f"{where}[{index}]"
        if term.loss not in LOSSES:
            raise UserError(f"{place}: unknown loss {term.loss!r}; {nearest(term.loss, LOSSES)}")
        loss = LOSSES[term.loss]
        _check_params(term, place)
        given = [key for key in ("task", "embedding", "taps") if getattr(term, key) is not None]
        expected = NEEDS[loss.kind]
        if " and ".join(given) not in expected:
            wanted = (
                " or ".join(expected) if loss.kind == "features+head" else f"exactly one of {' or '.join(expected)}"
            )
            raise UserError(f"{place}: {term.loss} needs {wanted}, got {given or 'none'}")
        names = str(term.embedding).split(",")
        if loss.kind in PAIRS and len(names) != 2:
            raise UserError(f'{place}: {term.loss} needs two embeddings, write "image,text"; got {term.embedding!r}')
        if loss.kind not in PAIRS and len(names) != 1:
            raise UserError(
                f"{place}: {term.loss} reads one embedding, got {term.embedding!r}; give one name, or a term for each"
            )
        if term.taps is not None:
            _check_taps(term, place)
        if term.positives and not loss.keys:
            able = ", ".join(name for name, other in LOSSES.items() if other.keys)
            raise UserError(f"{place}: {term.loss} takes no positives; leave them out, or use {able}")
        if term.teacher is not None and loss.kind not in TEACHING:
            raise UserError(f"{place}: {term.loss} reads no teacher; leave out its key 'teacher'")
        if term.teacher is not None and loss.kind == "features+head":
            raise UserError(f"{place}: {term.loss} reads the classifier of the run's own teacher; leave out 'teacher'")
        _check_teachers(term, place)


def _check_params(term: TermConfig, place: str) -> None:
    fixed, moving = settings(LOSSES[term.loss])
    allowed = {**fixed, **moving}
    for name, value in {**term.params, "weight": term.weight}.items():
        if name != "weight" and name not in allowed:
            raise UserError(f"{place}: {term.loss} has no parameter {name!r}; {nearest(name, allowed)}")
        key = name if name == "weight" else f"params.{name}"
        if isinstance(value, dict) and name in fixed:
            raise UserError(f"{place}.{key}: it is fixed when the term is built, so it has no schedule; give a value")
        schedule = as_schedule(value, f"{place}.{key}") if isinstance(value, dict | Schedule) else None
        if name != "weight" and value == allowed[name].word:
            continue
        for number in (value,) if schedule is None else (schedule.from_, schedule.to):
            check_type(AtLeastZero if name == "weight" else allowed[name].hint, number, f"{place}.{key}")
    for name, setting in allowed.items():
        if setting.needed and name not in term.params:
            raise UserError(f"{place}: {term.loss} needs the parameter {name!r}; add it to params")


def as_schedule(value: Any, where: str) -> Schedule:
    """The schedule that a mapping in a recipe stands for.

    Raises:
        UserError: it is none.
    """
    try:
        return Schedule.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{where} is {shortened(value)}: {key}: {complaint(problem)}; write {{from: NUMBER, to: NUMBER, "
            "until: SHARE, schedule: linear or cosine}"
        ) from error


@dataclass(frozen=True)
class Setting:
    """A parameter of a loss.

    Attributes:
        hint: its type.
        needed: it has no default.
        word: what a scale or bias may be given as: a student learns its own, and a teacher has one.
    """

    hint: Any
    needed: bool
    word: str | None = None


def settings(loss: Loss) -> tuple[Mapping[str, Setting], Mapping[str, Setting]]:
    """The parameters of a loss by name: those that stay, and those that may have a schedule."""
    return ({}, _settings(loss.function)) if loss.part is None else (_settings(loss.part), _settings(loss.part.forward))


def _settings(function: Callable[..., Any]) -> dict[str, Setting]:
    target = getattr(function, "__init__") if isinstance(function, type) else function  # noqa: B009
    hints = get_type_hints(target, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return {p.name: Setting(_in_a_recipe(hints[p.name]), p.default is p.empty, _word(p.name, hints)) for p in keywords}


def _word(name: str, hints: Mapping[str, Any]) -> str | None:
    if hints[name] not in (Scale, Bias):
        return None
    return OWN if name.startswith("teacher") else LEARNED


def _in_a_recipe(hint: Any) -> Any:
    """A hint without tensors, which no recipe can hold."""
    kept = tuple(choice for choice in get_args(hint) if choice is not Tensor)
    return Union[kept] if get_origin(hint) in (Union, UnionType) else hint  # noqa: UP007 - of a tuple


def _check_taps(term: TermConfig, place: str) -> None:
    taps, loss = term.taps or {}, LOSSES[term.loss]
    if set(taps) != {"student", "teacher"}:
        raise UserError(f"{place}: taps needs both 'student' and 'teacher'")
    counts = [len(taps[side]) if isinstance(taps[side], list) else None for side in ("student", "teacher")]
    if loss.kind != "stages":
        if counts != [None, None]:
            raise UserError(f"{place}: {term.loss} reads one tap a side, got a list; give one module path")
    elif None in counts or counts[0] != counts[1] or not counts[0] or counts[0] != (loss.stages or counts[0]):
        wanted = f"{loss.stages} paths" if loss.stages else "as many paths"
        raise UserError(f"{place}: {term.loss} reads several stages; give lists of {wanted} a side, shallow to deep")
    owners = [modality_of(term.tapped(side)[0]) for side in ("student", "teacher")]
    if loss.kind == "tokens" and (owners[0] != owners[1] or owners[0] is None):
        raise UserError(f"{place}: {term.loss} needs taps of one modality's encoder on both sides, got {taps}")


def _check_teachers(term: TermConfig, place: str) -> None:
    """Several teachers are different ones, and the loss and the mix have a use for them."""
    loss, names = LOSSES[term.loss], term.teachers
    distinct = len(names) == len(set(names)) > 0
    if loss.kind == "pair+teachers":
        scales = term.params["teacher_scales"]
        if not distinct or len(scales) != len(names):
            raise UserError(
                f"{place}: {term.loss} needs different teachers and a number in teacher_scales for each, got "
                f"{term.teacher} and {scales}"
            )
    elif isinstance(term.teacher, list) and not mixes(term):
        raise UserError(f"{place}: {term.loss} reads one teacher, got a list; give one name, or a term for each")
    elif not distinct:
        raise UserError(f"{place}: {term.loss} needs different teachers, got {term.teacher}")
    if term.mix is not None:
        _check_mix(term, term.mix, place)


def _check_mix(term: TermConfig, mix: MixConfig, place: str) -> None:
    if not mixes(term):
        raise UserError(
            f"{place}.mix: {term.loss} mixes no teachers here; leave it out, or list some for a loss on logits"
        )
    if mix.weights is not None and (mix.by == "confidence" or len(mix.weights) != len(term.teachers)):
        raise UserError(
            f"{place}.mix.weights: got {len(mix.weights)} for {len(term.teachers)} teachers by {mix.by!r}; give one "
            "for each, and none by 'confidence', which finds them in the rows"
        )
    if mix.average == "probabilities" and LOSSES[term.loss].raw:
        raise UserError(
            f"{place}.mix.average: probabilities say logits but for a number a row, which {term.loss} reads too; use "
            "'losses'"
        )


def mixes(term: TermConfig) -> bool:
    """Whether a term weighs several teachers: a list, and a loss on logits that learns nothing, not of captions."""
    loss = LOSSES[term.loss]
    plain = loss.kind in ("teacher", "teacher+labels") and loss.part is None and CAPTIONING not in loss.tasks
    return isinstance(term.teacher, list) and plain


def needs_teacher(terms: Sequence[TermConfig]) -> bool:
    """Whether any term reads a teacher."""
    return any(LOSSES[term.loss].kind in TEACHING for term in terms)


def learns_unlabelled(terms: Sequence[TermConfig]) -> bool:
    """Whether any term learns from rows without labels."""
    return any(LOSSES[term.loss].kind in TEACHING and LOSSES[term.loss].kind not in LABELS for term in terms)


def labelled_alone(terms: Sequence[TermConfig]) -> bool:
    """Whether rows without a label are left out: some term reads labels, and none learns from a teacher without."""
    return any(LOSSES[term.loss].kind in LABELS for term in terms) and not learns_unlabelled(terms)


def counts_classes(terms: Sequence[TermConfig]) -> bool:
    """Whether any term reads how many rows each class has."""
    return any(LOSSES[term.loss].kind == "labels+counts" for term in terms)


def classifiers(terms: Sequence[TermConfig]) -> list[str]:
    """The tasks whose classifier in the teacher a term reads."""
    return [str(term.task) for term in terms if LOSSES[term.loss].kind == "features+head"]


def compares_keys(terms: Sequence[TermConfig]) -> bool:
    """Whether any term asks which rows are no negatives of each other."""
    return any(term.positives for term in terms)


def stores_rows(terms: Sequence[TermConfig]) -> bool:
    """Whether any term keeps an entry for each training row."""
    return any(LOSSES[term.loss].part is Crd for term in terms)


def modalities(term: TermConfig) -> list[str]:
    """The modalities that a term is about, without repetition."""
    names: list[str] = []
    if term.task and "." in term.task:
        names = [term.task.split(".")[1]]
    elif term.embedding:
        names = term.embedding.split(",")
    elif term.taps:
        owners = map(modality_of, (*term.tapped("student"), *term.tapped("teacher")))
        names = [name for name in owners if name is not None]
    return list(dict.fromkeys(names))


def one_modality(term: TermConfig) -> str | None:
    """The modality whose encoders all taps of a term belong to; None where there is no such one."""
    owners = {modality_of(path) for path in (*term.tapped("student"), *term.tapped("teacher"))}
    return owners.pop() if len(owners) == 1 else None


def reads_text_tokens(term: TermConfig) -> bool:
    """Whether a term compares the tokens of texts one by one."""
    return LOSSES[term.loss].kind == "tokens" and "text" in modalities(term)


def tap_paths(
    terms: Sequence[TermConfig], side: Literal["student", "teacher"], teacher: str | None = None
) -> list[str]:
    """The module paths whose outputs the terms read of the student or of one teacher, without repetition."""
    read = [term for term in terms if side == "student" or teacher in term.teachers]
    return list(dict.fromkeys(path for term in read for path in term.tapped(side)))
