"""What the schema of a recipe cannot check: that its parts fit their builders and each other, before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from distill.aware import PLACE, asked_for
from distill.balance import check_balances
from distill.build import check_model, told_by_data
from distill.builders import check_part
from distill.config import EMA, ModelConfig, Recipe, TeacherConfig, TermConfig, TrainConfig, nearest
from distill.contracts import UserError
from distill.data.sources import GIVEN, SOURCES
from distill.decision import check_decision
from distill.fitted import Fitted
from distill.inheritance import check_inheritance
from distill.layouts import modality_of
from distill.losses.scales import own_name
from distill.losses.terms import (
    LEARNED,
    LOSSES,
    OWN,
    TASKS,
    check_terms,
    learns_unlabelled,
    mixes,
    needs_teacher,
    reads_text_tokens,
)
from distill.multimodal import MEMBER
from distill.optimize import check_optimizer
from distill.other_teachers import check_teachers
from distill.sampled import check_class_balance, check_mixing, check_resizing
from distill.sharding import check_sharding
from distill.targets import CAPTIONING, CLASSIFICATION
from distill.tasks import check_reused
from distill.trackers import check_trackers
from distill.workspace import takers
from distill.writing import check_written

Registry = Mapping[str, Callable[..., Any]]
DECODER = "decoder"


def check_recipe(recipe: Recipe, encoders: Registry, inheritances: Registry) -> None:
    """Check a recipe without touching data or weights, but for the hashes of other runs' teachers.

    Args:
        recipe: validated by its schema.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.

    Raises:
        UserError: the first mistake found.
    """
    if "://" in recipe.output:
        why = f"runs are written to a folder, and {recipe.output} is a URL"
        raise UserError(f"output: {why}; name a folder, one that all machines share if there are several")
    check_trackers(recipe.trackers, asked_for="trackers" in recipe.model_fields_set)
    check_part(SOURCES, recipe.data.source, "data.source", GIVEN)
    for task in recipe.data.targets:
        if "." in task or MEMBER in task or hasattr(nn.ModuleDict(), task):
            why = f"leave out '.' and {MEMBER!r}, which name its heads; other words that torch uses can do with a '_'"
            raise UserError(f"data.targets: {task!r} cannot name a task; {why}")
    models: dict[str, ModelConfig] = {"teacher": recipe.teacher, "student": recipe.student}
    for where, model in models.items():
        check_parts(model, where, encoders, recipe, list(recipe.data.targets))
    _check_retrieval(recipe)
    others = check_teachers(recipe)
    check_inheritance(recipe, encoders, inheritances)
    check_reused(recipe)
    _check_transfer(recipe, others)
    _check_fit(recipe.teacher)
    _check_pretraining(recipe.teacher)
    _check_class_names(recipe)
    check_written(recipe)
    _check_budgets(recipe, others)
    _check_terms(recipe.teacher.objective, recipe.teacher, recipe, "teacher.objective")
    _check_terms(recipe.student.baseline, recipe.student, recipe, "student.baseline")
    _check_terms(recipe.student.objective, recipe.student, recipe, "student.objective", others)
    own = recipe.export.quantize.qat.objective if asked_for(recipe) else None
    if own:
        _check_terms(own, recipe.student, recipe, f"{PLACE}.objective", others)
    _check_kept(recipe, encoders)
    for where, model in models.items():
        _check_heads(model, where, recipe)
    check_balances(recipe)
    tasks = list(recipe.data.targets)
    check_decision(recipe.teacher, {"teacher.objective": recipe.teacher.objective}, tasks)
    trained = {"student.baseline": recipe.student.baseline, "student.objective": recipe.student.objective}
    check_decision(recipe.student, trained | ({f"{PLACE}.objective": own} if own else {}), tasks)


def check_parts(model: ModelConfig, where: str, encoders: Registry, recipe: Recipe, tasks: Sequence[str]) -> None:
    """Check that a model's parts are known, take what they are given, and read what the data has.

    Args:
        model: the model.
        where: dotted path of the model in the recipe.
        encoders: encoder type -> class.
        recipe: whose data it reads.
        tasks: that it may have heads for.

    Raises:
        UserError: the first mistake found.
    """
    for modality in model.encoders:
        if modality not in recipe.data.modalities:
            hint = nearest(modality, recipe.data.modalities)
            raise UserError(f"{where}.encoders: the data has no modality {modality!r}; {hint}")
    given = told_by_data(model, encoders, recipe.data)
    given |= {name: {"tokenizer_file": ""} for name in takers(model, encoders)}
    check_model(model, encoders, where, list(tasks), given)


def _check_heads(model: ModelConfig, where: str, recipe: Recipe) -> None:
    """Heads are for some kinds of tasks, and decide by probabilities of classes where there are classes."""
    for task in model.heads or recipe.data.targets:
        kind = recipe.data.targets[task].kind
        part = model.heads.get(task)
        if part is not None and (part.type == DECODER) != (kind == CAPTIONING):
            fitting = DECODER if kind == CAPTIONING else "linear"
            raise UserError(f"{where}.heads.{task}: {part.type} is not for a {kind}; use {fitting}")
        if model.fusion and kind == CAPTIONING and getattr(model, "members", 1) > 1:
            raise UserError(
                f"{where}.members: captions of several members have no mean, and task {task!r} is a captioning; set it "
                "to 1"
            )
        if model.fusion and model.decision in ("product", "mixture") and kind != CLASSIFICATION:
            raise UserError(
                f"{where}.decision: {model.decision} is of the probabilities of classes, and task {task!r} is a "
                f"{kind}; set it to mean or learned"
            )


def _check_retrieval(recipe: Recipe) -> None:
    """Models without heads are measured by what they retrieve, which takes images and texts."""
    models: dict[str, ModelConfig] = {"teacher": recipe.teacher, "student": recipe.student}
    for where, model in models.items():
        if model.fusion and not recipe.data.targets:
            raise UserError(
                f"{where}.fusion: heads answer tasks, and data.targets names none; add some, or set it to null"
            )
        if model.fusion is None and recipe.retrieval is None:
            raise UserError(f"{where}.fusion is null, and such a model is measured by retrieval; add 'retrieval: {{}}'")
        missing = {"image", "text"}.difference(model.encoders)
        if recipe.retrieval is not None and missing:
            raise UserError(
                f"retrieval: {where}.encoders has no {min(missing)!r}, without which nothing is found; add it"
            )
    for task, templates in ({} if recipe.retrieval is None else recipe.retrieval.prompts).items():
        place = f"retrieval.prompts.{task}"
        if task not in recipe.data.targets:
            raise UserError(f"{place}: the data has no task {task!r}; {nearest(task, recipe.data.targets)}")
        _check_named(task, recipe, place)
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise UserError(f"{place}: give texts in which '{{}}' stands once for the name of a class")


def _check_named(task: str, recipe: Recipe, where: str) -> None:
    """Rows of other tasks have no one class whose name a text could be."""
    kind = recipe.data.targets[task].kind
    if kind != CLASSIFICATION:
        raise UserError(f"{where}: task {task!r} is a {kind}, whose rows have no one class; leave it out")


def _check_transfer(recipe: Recipe, others: Mapping[str, Fitted]) -> None:
    """Texts without labels need readers on both sides, and a teacher to answer them."""
    if not recipe.transfer.texts:
        return
    wanted = f"transfer.texts is {recipe.transfer.texts}"
    for where, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if "text" not in model.encoders:
            raise UserError(f"{wanted}, and the {where} has no text encoder; set it to 0")
    budgets: list[TrainConfig] = [recipe.student.train, recipe.prune.train]
    budgets += [recipe.export.quantize.qat.train] if asked_for(recipe) else []
    largest = max(train.batch_size for train in budgets) * recipe.transfer.ratio
    if recipe.transfer.texts < round(largest):
        raise UserError(f"{wanted}, and a batch takes {round(largest)} of them; raise it or lower transfer.ratio")
    blind = {name for name, other in others.items() if "text" not in other.modalities}
    if not learns_unlabelled([term for term in recipe.student.objective if not blind.issuperset(term.teachers)]):
        raise UserError(
            f"{wanted}, and no term of student.objective learns from the teacher without labels, which these texts do "
            "not have; add such a term or set it to 0"
        )


def _check_fit(teacher: TeacherConfig) -> None:
    """A teacher without anything to learn has no objective, and any other has one."""
    parts = teacher.encoders.values()
    fixed = teacher.fusion is None and all(
        part.params.get("projected") and part.params.get("freeze", True) for part in parts
    )
    known = all(part.params.get("classifier") and part.params.get("pretrained") for part in parts)
    if not teacher.objective and not fixed and not known:
        raise UserError("teacher.objective is empty, and the teacher has something to learn; add a term")
    if fixed and teacher.objective and not any(LEARNED in term.params.values() for term in teacher.objective):
        raise UserError("teacher.objective: nothing is left to learn there, as its encoders are frozen; set it to []")


def _check_pretraining(teacher: TeacherConfig) -> None:
    """An encoder that learns alone needs a head of its own, and a term on it."""
    for modality in teacher.pretrain:
        where = f"teacher.pretrain.{modality}"
        if modality not in teacher.encoders:
            raise UserError(f"{where}: the teacher has no such encoder; {nearest(modality, teacher.encoders)}")
        if not teacher.unimodal_heads:
            raise UserError(
                f"{where}: the teacher has no heads of single modalities; set teacher.unimodal_heads to true"
            )
        if not any((term.task or "").endswith(f".{modality}") for term in teacher.objective):
            raise UserError(f"{where}: no term of teacher.objective is on the head of {modality}; add TASK.{modality}")


def _check_class_names(recipe: Recipe) -> None:
    """Names of classes need tasks that are there, and a reader."""
    where = "teacher.class_names.tasks"
    for task in recipe.teacher.class_names.tasks:
        if task not in recipe.data.targets:
            raise UserError(f"{where}: the data has no task {task!r}; {nearest(task, recipe.data.targets)}")
        _check_named(task, recipe, where)
        if "text" not in recipe.teacher.encoders:
            raise UserError(f"{where}: the teacher has no text encoder to read the names of {task!r}; leave it out")


def _check_budgets(recipe: Recipe, others: Mapping[str, Fitted]) -> None:
    budgets = {f"teacher.pretrain.{modality}": train for modality, train in recipe.teacher.pretrain.items()}
    budgets |= {"teacher.train": recipe.teacher.train, "student.train": recipe.student.train}
    budgets["prune.train"] = recipe.prune.train
    if asked_for(recipe):
        budgets[f"{PLACE}.train"] = recipe.export.quantize.qat.train
    check_mixing(recipe, budgets, {name: other.modalities for name, other in others.items()})
    for where, train in budgets.items():
        check_class_balance(recipe, train, where)
        check_optimizer(train, where)
        check_sharding(train, where)
        model = recipe.teacher if where.startswith("teacher") else recipe.student
        if train.shard and model.exchange and "pretrain" not in where:
            raise UserError(
                f"{where}.shard splits encoders as wholes, and an exchange runs their stages; set it to false"
            )
        check_resizing(recipe, train, where)


def _check_terms(
    terms: Sequence[TermConfig],
    model: ModelConfig,
    recipe: Recipe,
    where: str,
    others: Mapping[str, Fitted] | None = None,
) -> None:
    """Each term's loss is known, and its task and embedding exist in the trained model and in the teacher it reads.

    Args:
        terms: of the objective.
        model: the trained one.
        recipe: the whole.
        where: dotted path of the objective.
        others: teachers of other runs; None where the objective may read no teacher.
    """
    check_terms(terms, where)
    if others is None and needs_teacher(terms):
        raise UserError(f"{where}: a term reads a teacher, and this stage has none; use losses on labels here")
    for number, term in enumerate(terms):
        place, ours = f"{where}[{number}]", list(recipe.data.targets)
        _check_names(term, model, ours, f"{place}: no", recipe)
        _check_kind(term, recipe, place)
        if "group" in term.positives and recipe.data.group is None:
            raise UserError(f"{place}.positives: the data names no group column; set data.group, or leave 'group' out")
        if others is None or not needs_teacher([term]):
            continue
        _check_tokens(term, recipe, place)
        if LOSSES[term.loss].kind == "features+head" and recipe.teacher.members > 1:
            raise UserError(
                f"{place}: {term.loss} reads one classifier, and the teacher has {recipe.teacher.members} members with "
                "one each; set teacher.members to 1, or use another loss"
            )
        _check_own(term, recipe.teacher, place)
        for name in term.teachers:
            if name is None:
                _check_names(term, recipe.teacher, ours, f"{place}: no", recipe)
                _check_width(term, recipe.student, recipe.teacher, place)
            elif name == EMA:
                _check_average(term, recipe, place)
            elif name not in others:
                hint = nearest(name, others) if others else "there are none: add it"
                raise UserError(f"{place}: no teacher {name!r} under 'teachers'; {hint}")
            else:
                other, having = others[name], f"{place}: teacher {name!r} has no"
                _check_names(term, other.config, [task for task in other.tasks if task in ours], having, recipe)
                _check_width(term, recipe.student, other.config, place)


def _check_kind(term: TermConfig, recipe: Recipe, place: str) -> None:
    """A loss on logits is for some kinds of tasks."""
    loss = LOSSES[term.loss]
    if loss.kind not in TASKS:
        return
    kind = recipe.data.targets[str(term.task).split(".")[0]].kind
    if kind not in loss.tasks:
        able = [name for name, other in LOSSES.items() if other.kind in TASKS and kind in other.tasks]
        raise UserError(
            f"{place}: {term.loss} is for {' or '.join(loss.tasks)}, and task {term.task!r} is a {kind}; use "
            f"{', '.join(able)}"
        )
    if mixes(term) and kind != CLASSIFICATION and (term.mix is None or term.mix.by == "confidence"):
        raise UserError(f"{place}.mix: confidence is of classes, and task {term.task!r} is a {kind}; mix by 'weights'")


def _check_average(term: TermConfig, recipe: Recipe, place: str) -> None:
    """The student's own average as a teacher: it has to be there, whole, and has the student's own taps."""
    budgets: dict[str, TrainConfig] = {"student.train": recipe.student.train, "prune.train": recipe.prune.train}
    qat = recipe.export.quantize.qat
    if place.startswith(PLACE):
        budgets = {f"{PLACE}.train": qat.train}
    elif asked_for(recipe) and not qat.objective:
        budgets[f"{PLACE}.train"] = qat.train
    for where, train in budgets.items():
        if train.ema is None:
            raise UserError(f"{place}: teacher 'ema' is the average that {where}.ema keeps; set that, as to 0.99")
        if train.shard:
            raise UserError(f"{place}: teacher 'ema' needs weights that are not split; set {where}.shard to false")
    if term.tapped("student") != term.tapped("teacher"):
        raise UserError(f"{place}: teacher 'ema' is the student with other weights; give both sides the same taps")


def _check_names(term: TermConfig, model: ModelConfig, tasks: Sequence[str], missing: str, recipe: Recipe) -> None:
    """A term's task and embedding are among those of a model; ``missing`` begins what is said if not."""
    names = list(model.heads or tasks) if model.fusion else []
    if model.unimodal_heads:
        writing = {task for task, target in recipe.data.targets.items() if target.kind == CAPTIONING}
        names += [f"{task}.{name}" for task in names if task not in writing for name in (*model.encoders, "fused")]
    embeddings = [*model.encoders, *(["fused"] if model.fusion else [])]
    if term.task is not None and not names:
        raise UserError(f"{missing} task {term.task!r}, as there is no task or no fusion; use losses on embeddings")
    if term.task is not None and term.task not in names:
        raise UserError(f"{missing} task {term.task!r}; {nearest(term.task, names)}")
    for name in [] if term.embedding is None else term.embedding.split(","):
        if name not in embeddings:
            raise UserError(f"{missing} embedding {name!r}; {nearest(name, embeddings)}")


def _check_own(term: TermConfig, teacher: TeacherConfig, place: str) -> None:
    """The teacher's own scale is what its objective learns, or what its weights were trained with."""
    for name in [name for name, value in term.params.items() if value == OWN]:
        wanted = own_name(name)
        learned = any(other.params.get(wanted) == LEARNED for other in teacher.objective)
        if term.teachers != (None,):
            raise UserError(f"{place}.params.{name}: only of the run's own teacher is it known; give a number")
        if not learned and not any(part.params.get("projected") for part in teacher.encoders.values()):
            raise UserError(
                f"{place}.params.{name}: no term of teacher.objective learns a {wanted}; set it to 'learned' in one of "
                "them, or give a number here"
            )


def _check_tokens(term: TermConfig, recipe: Recipe, place: str) -> None:
    """Texts have no fixed number of tokens, as rows of a cache have and those of a transfer set would need."""
    if not reads_text_tokens(term):
        return
    where = f"{place}: {term.loss} reads the tokens of texts, whose number differs from batch to batch"
    if recipe.cache.enabled:
        raise UserError(f"{where}, and a cache holds rows of one shape; set cache.enabled to false")
    if recipe.transfer.texts:
        raise UserError(f"{where} and from the data's rows to those of the transfer set; set transfer.texts to 0")


def _check_kept(recipe: Recipe, encoders: Registry) -> None:
    """Of a frozen tower of the teacher the outputs are kept, and its modules never run beside a student."""
    for number, term in enumerate(recipe.student.objective):
        for path in term.tapped("teacher") if None in term.teachers else ():
            part = recipe.teacher.encoders.get(modality_of(path) or "")
            if part is None or not path.startswith("encoders.") or path.partition(":")[0].count(".") == 1:
                continue
            builder = encoders[part.type]
            freeze = inspect.signature(builder).parameters.get("freeze")
            if freeze is not None and part.params.get("freeze", freeze.default) and hasattr(builder, "encode"):
                whole = ".".join(path.split(".")[:2])
                raise UserError(
                    f"student.objective[{number}]: the tap {path!r} lies in a frozen tower, whose outputs are kept and "
                    f"whose modules do not run; tap {whole!r}, its tokens, or set teacher.{whole}.freeze to false"
                )


def _check_width(term: TermConfig, student: ModelConfig, teacher: ModelConfig, place: str) -> None:
    """Pairs of embeddings have no projector: those compared number by number are of one width."""
    loss = LOSSES[term.loss]
    members = teacher.members if isinstance(teacher, TeacherConfig) else 1
    own, given = student.embedding_dim, teacher.embedding_dim * members
    if loss.kind == "pair+teacher" and loss.one_width and own != given:
        raise UserError(
            f"{place}: {term.loss} compares embeddings of one width, and student.embedding_dim is {own} where the "
            f"teacher's are {given} wide (embedding_dim · members); set it to {given}, or use clip_relational_kl"
        )
