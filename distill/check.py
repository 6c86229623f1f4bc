"""What the schema of a recipe cannot check: that its parts fit their builders and each other, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.build import check_model
from distill.config import ModelConfig, Recipe, TeacherConfig, TermConfig, TrainConfig, check_part, nearest
from distill.contracts import UserError
from distill.data.sources import GIVEN, SOURCES
from distill.losses.objective import LOSSES, check_terms, needs_teacher
from distill.multimodal import MEMBER
from distill.optimize import check_optimizer
from distill.other_teachers import Fitted, check_teachers
from distill.sharding import check_sharding
from distill.trackers import check_trackers
from distill.workspace import takes_tokenizer, takes_tokens

Registry = Mapping[str, Callable[..., Any]]


def check_recipe(recipe: Recipe, encoders: Registry, inheritances: Registry) -> None:
    """Check a recipe without touching data or weights, but for the hashes of other runs' teachers.

    Args:
        recipe: validated by its schema.
        encoders: encoder type -> class.
        inheritances: inheritance type -> function.

    Raises:
        UserError: the first mistake found.
    """
    check_trackers(recipe.trackers, asked_for="trackers" in recipe.model_fields_set)
    check_part(SOURCES, recipe.data.source, "data.source", GIVEN)
    for task in recipe.data.targets:
        if "." in task or MEMBER in task:
            raise UserError(
                f"data.targets: {task!r} cannot name a task; leave out '.' and {MEMBER!r}, which name its heads"
            )
    models: dict[str, ModelConfig] = {"teacher": recipe.teacher, "student": recipe.student}
    for where, model in models.items():
        for modality in model.encoders:
            if modality not in recipe.data.modalities:
                hint = nearest(modality, recipe.data.modalities)
                raise UserError(f"{where}.encoders: the data has no modality {modality!r}; {hint}")
        given = {name: {"tokenizer_file": ""} for name in _takers(model, encoders)}
        check_model(model, encoders, where, list(recipe.data.targets), given)
    others = check_teachers(recipe)
    _check_inheritance(recipe, encoders, inheritances)
    _check_transfer(recipe, others)
    _check_pretraining(recipe.teacher)
    _check_class_names(recipe)
    _check_budgets(recipe)
    _check_terms(recipe.teacher.objective, recipe.teacher, recipe, "teacher.objective")
    _check_terms(recipe.student.baseline, recipe.student, recipe, "student.baseline")
    _check_terms(recipe.student.objective, recipe.student, recipe, "student.objective", others)


def _takers(model: ModelConfig, encoders: Registry) -> list[str]:
    """Modalities whose encoder is given its tokenizer."""
    parts = model.encoders.items()
    return [name for name, part in parts if part.type in encoders and takes_tokenizer(encoders[part.type])]


def _check_inheritance(recipe: Recipe, encoders: Registry, inheritances: Registry) -> None:
    """A vocabulary or an embedding comes from the teacher's text encoder, which then has to have its own."""
    if _takers(recipe.teacher, encoders):
        kind = recipe.teacher.encoders["text"].type
        raise UserError(f"teacher.encoders.text: {kind} takes its vocabulary from a teacher; a teacher brings its own")
    takers = _takers(recipe.student, encoders)
    if takers and "text" not in recipe.teacher.encoders:
        kind = recipe.student.encoders[takers[0]].type
        raise UserError(
            f"student.encoders.{takers[0]}: {kind} takes its vocabulary from the teacher, which has no text encoder; "
            "add one to teacher.encoders"
        )
    for name, part in recipe.student.inherit.items():
        check_part(inheritances, part, f"student.inherit.{name}", ("encoder", "project", "student", "token_ids"))
        if not takes_tokens(inheritances[part.type]):
            _check_alike(recipe, name, part.type)
        elif name not in takers:
            raise UserError(
                f"student.inherit.{name}: {part.type} fills an encoder that takes its vocabulary from the teacher; "
                f"{nearest(name, takers)}"
            )


def _check_alike(recipe: Recipe, name: str, inheritance: str) -> None:
    """Weights fit an encoder that is built as the teacher's; dropout has none."""
    where = f"student.inherit.{name}: {inheritance}"
    for model, encoders in (("student", recipe.student.encoders), ("teacher", recipe.teacher.encoders)):
        if name not in encoders:
            raise UserError(f"{where}: the {model} has no such encoder; {nearest(name, encoders)}")
    ours, theirs = (
        {"type": part.type, **part.params} for part in (recipe.student.encoders[name], recipe.teacher.encoders[name])
    )
    for key in sorted({*ours, *theirs} - {"dropout"}):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{where}: {key} is {ours.get(key)} in student.encoders.{name} and {theirs.get(key)} in "
                f"teacher.encoders.{name}; weights need equal ones"
            )


def _check_transfer(recipe: Recipe, others: Mapping[str, Fitted]) -> None:
    """Texts without labels need readers on both sides, and a teacher to answer them."""
    if not recipe.transfer.texts:
        return
    wanted = f"transfer.texts is {recipe.transfer.texts}"
    for where, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if "text" not in model.encoders:
            raise UserError(f"{wanted}, and the {where} has no text encoder; set it to 0")
    largest = max(recipe.student.train.batch_size, recipe.prune.train.batch_size) * recipe.transfer.ratio
    if recipe.transfer.texts < round(largest):
        raise UserError(f"{wanted}, and a batch takes {round(largest)} of them; raise it or lower transfer.ratio")
    blind = {name for name, other in others.items() if "text" not in other.modalities}
    if not needs_teacher([term for term in recipe.student.objective if term.teacher not in blind]):
        raise UserError(
            f"{wanted}, and no term of student.objective reads the teacher, who alone could say what these texts are; "
            "add such a term or set it to 0"
        )


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
        if "text" not in recipe.teacher.encoders:
            raise UserError(f"{where}: the teacher has no text encoder to read the names of {task!r}; leave it out")


def _check_budgets(recipe: Recipe) -> None:
    budgets = {f"teacher.pretrain.{modality}": train for modality, train in recipe.teacher.pretrain.items()}
    budgets |= {"teacher.train": recipe.teacher.train, "student.train": recipe.student.train}
    for where, train in (budgets | {"prune.train": recipe.prune.train}).items():
        check_optimizer(train, where)
        check_sharding(train, where)
        _check_resizing(recipe, train, where)


def _check_resizing(recipe: Recipe, train: TrainConfig, where: str) -> None:
    """Images can be made smaller, and features of theirs are compared by their means alone."""
    if train.progressive_resizing is None:
        return
    place, model = f"{where}.progressive_resizing", recipe.teacher if where.startswith("teacher") else recipe.student
    if "image" not in model.encoders or where == "teacher.pretrain.text":
        raise UserError(f"{place}: no images are read there; leave it out")
    size, whole = train.progressive_resizing.size, recipe.data.working_size
    if size >= whole:
        raise UserError(f"{place}.size is {size} pixels, and data.working_size is {whole}; give fewer")
    for number, term in enumerate([] if where.startswith("teacher") else recipe.student.objective):
        tap = (term.taps or {}).get("student", "")
        if tap.startswith("encoders.image") and not tap.endswith(":mean"):
            raise UserError(
                f"{place}: small images have smaller feature maps than those the teacher saw, and "
                f"student.objective[{number}] compares them position by position; add ':mean' to its taps"
            )


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
        _check_names(term, model, ours, f"{place}: no")
        if others is None or not needs_teacher([term]):
            continue
        if term.teacher is None:
            _check_names(term, recipe.teacher, ours, f"{place}: no")
            _check_width(term, recipe.student, recipe.teacher, place)
        elif term.teacher not in others:
            hint = nearest(term.teacher, others) if others else "there are none: add it"
            raise UserError(f"{place}: no teacher {term.teacher!r} under 'teachers'; {hint}")
        else:
            other, having = others[term.teacher], f"{place}: teacher {term.teacher!r} has no"
            _check_names(term, other.recipe.teacher, [task for task in other.tasks if task in ours], having)
            _check_width(term, recipe.student, other.recipe.teacher, place)


def _check_names(term: TermConfig, model: ModelConfig, tasks: Sequence[str], missing: str) -> None:
    """A term's task and embedding are among those of a model; ``missing`` begins what is said if not."""
    names = list(model.heads or tasks)
    if model.unimodal_heads:
        names += [f"{task}.{name}" for task in names for name in (*model.encoders, "fused")]
    embeddings = [*model.encoders, "fused"]
    if term.task is not None and term.task not in names:
        raise UserError(f"{missing} task {term.task!r}; {nearest(term.task, names)}")
    for name in [] if term.embedding is None else term.embedding.split(","):
        if name not in embeddings:
            raise UserError(f"{missing} embedding {name!r}; {nearest(name, embeddings)}")


def _check_width(term: TermConfig, student: ModelConfig, teacher: TeacherConfig, place: str) -> None:
    """Pairs of embeddings have no projector: those compared number by number are of one width."""
    loss = LOSSES[term.loss]
    own, given = student.embedding_dim, teacher.embedding_dim * teacher.members
    if loss.kind == "pair+teacher" and loss.one_width and own != given:
        raise UserError(
            f"{place}: {term.loss} compares embeddings of one width, and student.embedding_dim is {own} where the "
            f"teacher's are {given} wide (embedding_dim · members); set it to {given}, or use clip_relational_kl"
        )
