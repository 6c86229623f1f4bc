"""The objective: what it refuses, which rows a term is about, projectors, and the names under which it logs."""

import pytest
import torch
import torch.nn.functional as F
from tiny import terms

from distill import losses
from distill.batch_parts import take
from distill.config import EMA, TermConfig
from distill.contracts import CLEAN_VIEW, IGNORE, Batch, Outputs, UserError
from distill.losses.objective import Objective
from distill.losses.terms import LOSSES, check_terms, needs_teacher, tap_paths

ROWS = 6


def outputs(seed=0, *, width=4, tap=(8, 3, 3)):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(ROWS, *shape, generator=generator)

    logits = {"kind": random(3), "kind.image": random(3), "kind.text": random(3)}
    return Outputs(
        logits, {name: random(width) for name in ("image", "text", "fused")}, {"encoders.image.tap": random(*tap)}
    )


@pytest.fixture
def batch():
    present = {"image": torch.ones(ROWS, dtype=torch.bool), "text": torch.ones(ROWS, dtype=torch.bool)}
    labels = {"kind": torch.arange(ROWS) % 3}
    return Batch(torch.arange(ROWS), torch.full((ROWS,), CLEAN_VIEW), {}, present, labels)


def without(batch, modality, *rows):
    mask = batch.present[modality].clone()
    mask[list(rows)] = False
    return batch._replace(present={**batch.present, modality: mask})


def value(item, batch, student, teacher=None):
    return Objective(terms(item), student, teacher)(student, teacher, batch)[0]


TAPS = {"student": "encoders.image.tap", "teacher": "encoders.image.tap"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"loss": "kdd", "task": "kind"}, r"objective\[0\]: unknown loss 'kdd'; did you mean 'kd'"),
        (
            {"loss": "kd", "task": "kind", "params": {"temprature": 2}},
            "kd has no parameter 'temprature'; did you mean 'temp",
        ),
        ({"loss": "cross_entropy", "task": "kind", "params": {"labels": 1}}, "no parameter 'labels'"),
        ({"loss": "kd"}, "kd needs exactly one of task, got none"),
        ({"loss": "kd", "task": "kind", "embedding": "fused"}, "exactly one of task, got"),
        ({"loss": "cross_entropy", "embedding": "fused"}, "exactly one of task"),
        ({"loss": "cosine", "task": "kind"}, "exactly one of embedding or taps"),
        ({"loss": "clip_infonce", "embedding": "image"}, 'needs two embeddings, write "image,text"'),
        ({"loss": "clip_infonce", "embedding": "image,text,fused"}, "two embeddings"),
        ({"loss": "clip_relational_kl", "embedding": "image"}, 'clip_relational_kl needs two embeddings, write "image'),
        ({"loss": "clip_fd", "task": "kind"}, "clip_fd needs exactly one of embedding, got"),
        ({"loss": "dist", "embedding": "fused"}, "dist needs exactly one of task, got"),
        ({"loss": "fitnet", "taps": {"student": "a"}}, "taps needs both 'student' and 'teacher'"),
        ({"loss": "cosine", "embedding": "image,text"}, "cosine reads one embedding, got 'image,text'; give one name"),
        ({"loss": "queue_kl", "embedding": "fused,"}, "queue_kl reads one embedding, got 'fused,'"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused_before_anything_is_built(item, message):
    with pytest.raises(UserError, match=message):
        check_terms(terms(item), "objective")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"loss": "kd", "task": "kinds"}, "'kd/kinds': the model gives no 'kinds'; did you mean 'kind'"),
        ({"loss": "cosine", "embedding": "fuse"}, "the model gives no 'fuse'; did you mean 'fused'"),
        ({"loss": "fitnet", "taps": {**TAPS, "teacher": "encoders.image.tip"}}, "did you mean 'encoders.image.tap'"),
        ({"loss": "clip_infonce", "embedding": "image, text"}, "did you mean 'text'"),
    ],
)
def test_a_name_that_the_models_do_not_give_is_refused(item, message, batch):
    with pytest.raises(UserError, match=message):
        value(item, batch, outputs(), outputs(1))


@pytest.mark.parametrize(
    "item",
    [
        {"loss": "kd", "task": "kind"},
        {"loss": "cosine", "embedding": "fused"},
        {"loss": "rkd", "embedding": "fused"},
        {"loss": "clip_fd", "embedding": "image,text"},
        {"loss": "clip_relational_ce", "embedding": "image,text"},
    ],
)
def test_a_teacher_term_without_a_teacher_is_refused(item, batch):
    with pytest.raises(UserError, match="reads a teacher, and this stage has none"):
        value(item, batch, outputs())


def test_which_terms_need_a_teacher_and_which_taps():
    alone = terms({"loss": "cross_entropy", "task": "kind"}, {"loss": "clip_infonce", "embedding": "image,text"})
    assert not needs_teacher(alone) and tap_paths(alone, "teacher") == []
    for item in (
        {"loss": "dkd", "task": "kind"},
        {"loss": "fitnet", "taps": TAPS},
        {"loss": "cosine", "embedding": "text"},
        {"loss": "clip_relational_kl", "embedding": "image,text"},
    ):
        assert needs_teacher([*alone, *terms(item)])
    twice = terms({"loss": "fitnet", "taps": {"student": "a", "teacher": "b"}}, {"loss": "cosine", "taps": TAPS}) * 2
    assert tap_paths(twice, "student") == ["a", "encoders.image.tap"]
    assert tap_paths(twice, "teacher") == ["b", "encoders.image.tap"]


def test_terms_are_weighed_and_logged_unweighted_under_their_own_names(batch):
    student, teacher = outputs(), outputs(1)
    items = [
        {"loss": "cross_entropy", "task": "kind", "weight": 0.5},
        {"loss": "kd", "task": "kind", "weight": 2.0, "params": {"temperature": 2.0}},
        {"loss": "kd", "task": "kind", "weight": 3.0, "params": {"temperature": 5.0}},
        {"loss": "fitnet", "taps": TAPS, "weight": 0.0},
    ]
    total, values = Objective(terms(*items), student, teacher)(student, teacher, batch)
    assert list(values) == ["cross_entropy/kind", "kd/kind", "kd/kind#2", "fitnet/encoders.image.tap"]
    one, two = student.logits["kind"], teacher.logits["kind"]
    torch.testing.assert_close(values["kd/kind#2"], losses.kd(one, two, temperature=5.0))
    expected = 0.5 * losses.cross_entropy(one, batch.targets["kind"])
    expected = expected + 2 * losses.kd(one, two, temperature=2.0) + 3 * losses.kd(one, two, temperature=5.0)
    torch.testing.assert_close(total, expected)


ROW_BY_ROW = [
    {"loss": "cross_entropy", "task": "kind.image"},
    {"loss": "kd", "task": "kind.image"},
    {"loss": "dkd", "task": "kind.image"},
    {"loss": "cosine", "embedding": "image"},
    {"loss": "fitnet", "taps": TAPS},
    {"loss": "at", "taps": TAPS},
    {"loss": "clip_fd", "embedding": "image,text"},
]
RELATIONAL = [
    {"loss": "clip_infonce", "embedding": "image,text"},
    {"loss": "clip_relational_kl", "embedding": "image,text"},
    {"loss": "rkd", "embedding": "image"},
    {"loss": "sp", "taps": TAPS},
    {"loss": "dist", "task": "kind.image"},
]
ABOUT_IMAGES = [*ROW_BY_ROW, *RELATIONAL]


@pytest.mark.parametrize("item", ABOUT_IMAGES, ids=lambda item: item["loss"])
def test_rows_that_lack_the_modality_take_no_part(item, batch):
    lacking = without(batch, "image", 1, 4)
    kept = torch.tensor([0, 2, 3, 5])
    student, teacher = outputs(), outputs(1)
    expected = value(item, take(batch, kept), take(student, kept), take(teacher, kept))
    torch.testing.assert_close(value(item, lacking, student, teacher), expected)


@pytest.mark.parametrize("item", ABOUT_IMAGES, ids=lambda item: item["loss"])
def test_a_batch_in_which_no_row_has_the_modality_gives_zero_with_a_gradient(item, batch):
    """Zero for the tensors that other rows would have moved, and for no others: ranks agree about them."""
    reached = []
    for lacking in (batch, without(batch, "image", *range(ROWS))):
        student = outputs()
        tensors = [tensor.requires_grad_() for kind in student for tensor in kind.values()]
        result = value(item, lacking, student, outputs(1))
        result.backward()
        reached.append([number for number, tensor in enumerate(tensors) if tensor.grad is not None])
    assert reached[0] == reached[1] != []
    assert result.item() == 0 and all(tensors[number].grad.abs().max() == 0 for number in reached[1])


@pytest.mark.parametrize("item", [{"loss": "kd", "task": "kind"}, {"loss": "cosine", "embedding": "fused"}])
def test_fused_terms_read_all_rows(item, batch):
    student, teacher = outputs(), outputs(1)
    torch.testing.assert_close(
        value(item, without(batch, "image", 1, 4), student, teacher), value(item, batch, student, teacher)
    )


@pytest.mark.parametrize("path", ["embedders.image", "unimodal_heads.kind.image", "necks.image", "heads.kind"])
def test_a_tap_of_one_modality_is_about_the_rows_that_have_it(batch, path):
    said = Outputs({}, {}, {path: torch.zeros(ROWS, 4)})
    objective = Objective(terms({"loss": "fitnet", "taps": {"student": path, "teacher": path}}), said, said)
    assert objective.num_rows(without(batch, "image", 1, 4)).tolist() == [ROWS if path == "heads.kind" else 4]


@pytest.mark.parametrize("item", [{"loss": "cross_entropy"}, {"loss": "kd"}, {"loss": "dkd"}], ids=str)
def test_rows_that_the_student_cannot_read_take_no_part(batch, item):
    item, lacking = {**item, "task": "kind"}, without(batch, "image", 1, 4)
    student, teacher = outputs(), outputs(1)
    blind = Objective(terms(item), student, teacher, reads={None: ["image", "text"], EMA: ["image"]})
    seeing = Objective(terms(item), student, teacher, reads={None: ["image", "text"], EMA: ["text", "image"]})
    there = torch.tensor([0, 2, 3, 5])
    expected = seeing(*(take(x, there) for x in (student, teacher, batch)))[0]
    torch.testing.assert_close(blind(student, teacher, lacking)[0], expected)
    assert blind.num_rows(lacking).tolist() == [4] and blind.num_rows(batch).tolist() == [ROWS]
    assert seeing.num_rows(lacking).tolist() == [ROWS]
    assert torch.equal(blind(student, teacher, batch)[0], seeing(student, teacher, batch)[0])


def test_missing_labels_leave_soft_labels_in_force(batch):
    bare = batch._replace(targets={"kind": torch.full((ROWS,), IGNORE)})
    student, teacher = outputs(), outputs(1)
    assert value({"loss": "cross_entropy", "task": "kind"}, bare, student) == 0
    assert value({"loss": "dkd", "task": "kind"}, bare, student, teacher) == 0
    assert value({"loss": "kd", "task": "kind"}, bare, student, teacher) > 0


@pytest.mark.parametrize("reads", [None, {None: ["image"]}], ids=["teacher of all", "teacher of images"])
def test_the_parts_of_a_batch_add_up_to_the_whole_whatever_they_lack(batch, reads):
    items = [*ROW_BY_ROW, {"loss": "cross_entropy", "task": "kind"}, {"loss": "kd", "task": "kind"}]
    labels = torch.tensor([0, IGNORE, IGNORE, 1, 2, IGNORE])
    whole = without(batch, "image", 1, 4)._replace(targets={"kind": labels})
    student, teacher = outputs(), outputs(1)
    objective = Objective(terms(*items), student, teacher, reads=reads)
    assert objective.num_rows(whole)[-1] == (4 if reads else ROWS)  # of kd on the whole
    total, values = objective(student, teacher, whole)
    parts = [torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])]
    counts = objective.num_rows(whole).clamp(min=1)
    summed = []
    for rows in parts:
        part = [take(x, rows) for x in (student, teacher, whole)]
        summed.append(objective(*part, (objective.num_rows(part[2]) / counts).tolist()))
    torch.testing.assert_close(sum(part[0] for part in summed), total)
    for name, expected in values.items():
        torch.testing.assert_close(sum(part[1][name] for part in summed), expected, msg=name)


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "expected"),
    [
        ((8,), (8,), None),
        ((8, 3, 3), (8, 3, 3), None),
        ((8,), (12,), torch.nn.Linear),
        ((5, 8), (5, 12), torch.nn.Linear),
        ((8, 3, 3), (12, 3, 3), torch.nn.Conv2d),
    ],
)
def test_a_projector_is_made_where_widths_differ(student_shape, teacher_shape, expected, batch):
    student, teacher = outputs(tap=student_shape), outputs(1, tap=teacher_shape)
    objective = Objective(terms({"loss": "fitnet", "taps": TAPS}), student, teacher)
    assert [type(layer) for layer in objective.projectors.values()] == ([] if expected is None else [expected])
    total, _ = objective(student, teacher, batch)
    total.backward() if expected else None
    assert all(parameter.grad.abs().sum() > 0 for parameter in objective.parameters())
    assert torch.isfinite(total)


@pytest.mark.parametrize(
    ("one", "other"), [((8,), (8, 3, 3)), ((8,), (5, 8)), ((7, 8), (8, 3, 3)), ((8, 2, 2, 2), (8, 3, 3, 3))]
)
def test_features_that_no_projector_can_bring_together_are_refused(one, other):
    with pytest.raises(UserError, match=r"no projector fits features of shapes .* choose taps of equal layout"):
        Objective(terms({"loss": "fitnet", "taps": TAPS}), outputs(tap=one), outputs(tap=other))


def test_embeddings_of_unequal_width_get_a_projector_too(batch):
    student, teacher = outputs(width=4), outputs(1, width=9)
    objective = Objective(terms({"loss": "cosine", "embedding": "fused"}), student, teacher)
    assert objective(student, teacher, batch)[0].requires_grad
    assert objective.projectors["0"].weight.shape == (9, 4)


OF_PAIRS = [name for name, loss in LOSSES.items() if loss.kind == "pair+teacher" and loss.part is None]


@pytest.mark.parametrize("name", OF_PAIRS)
def test_pairs_of_both_models_are_normalised(name, batch):
    student, teacher = outputs(), outputs(1)
    rows = [F.normalize(o.embeddings[side], dim=-1) for o in (student, teacher) for side in ("image", "text")]
    item = {"loss": name, "embedding": "image,text"}
    torch.testing.assert_close(value(item, batch, student, teacher), getattr(losses, name)(*rows))
    scaled = teacher._replace(embeddings={side: 7 * rows for side, rows in teacher.embeddings.items()})
    torch.testing.assert_close(value(item, batch, student, scaled), getattr(losses, name)(*rows))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_pairs_of_unequal_width_are_compared_by_their_relations_alone(name, batch):
    item = {"loss": name, "embedding": "image,text"}
    student, teacher = outputs(width=4), outputs(1, width=9)
    if LOSSES[name].one_width:
        message = f"'{name}/image,text' compares embeddings of one width, and 'image' has 4 in the student and 9 in"
        with pytest.raises(UserError, match=message):
            value(item, batch, student, teacher)
    else:
        assert value(item, batch, student, teacher).isfinite()


@pytest.mark.parametrize("item", [{"loss": "rkd", "embedding": "image"}, {"loss": "at", "taps": TAPS}])
def test_what_needs_no_equal_width_gets_no_projector(item, batch):
    student, teacher = outputs(width=4, tap=(8, 4, 4)), outputs(1, width=9, tap=(12, 3, 3))
    objective = Objective(terms(item), student, teacher)
    assert not list(objective.parameters()) and objective(student, teacher, batch)[0].isfinite()


def test_pairs_are_normalised_before_halves_are_rounded(batch):
    """The norm of a normalised half is 1 within a thousandth only, which a scale of 100 makes a tenth."""
    student, halves = (outputs(width=64) for _ in range(2))
    rounded = {name: rows.bfloat16() for name, rows in halves.embeddings.items()}
    same = {name: rows.float() for name, rows in rounded.items()}
    item = {"loss": "clip_infonce", "embedding": "image,text", "params": {"logit_scale": 100.0}}
    expected = value(item, batch, student._replace(embeddings=same))
    torch.testing.assert_close(value(item, batch, student._replace(embeddings=rounded)), expected)


def test_cckd_gets_normalised_rows(batch):
    student, teacher = outputs(width=4), outputs(1, width=9)
    rows = [F.normalize(o.embeddings["fused"], dim=-1) for o in (student, teacher)]
    found = value({"loss": "cckd", "embedding": "fused", "params": {"gamma": 0.7}}, batch, student, teacher)
    torch.testing.assert_close(found, losses.cckd(*rows, gamma=0.7))


SEVERAL = {"loss": "clip_ensemble_ce", "embedding": "image,text", "teacher": ["teacher", "big"]}


def test_a_term_of_several_teachers_reads_all_of_them(batch):
    student, own, big = outputs(), outputs(1, width=9), outputs(2, width=5)
    both = own._replace(embeddings=own.embeddings | {f"{name}@big": rows for name, rows in big.embeddings.items()})
    pairs = [F.normalize(o.embeddings[side], dim=-1) for o in (student, own, big) for side in ("image", "text")]
    item = {**SEVERAL, "params": {"teacher_scales": [50.0, 30.0]}}
    torch.testing.assert_close(
        value(item, batch, student, both), losses.clip_ensemble_ce(*pairs, teacher_scales=(50.0, 30.0))
    )
    objective = Objective(terms(item), student, both, reads={None: ["image", "text"], "big": ["image"]})
    assert objective.num_rows(without(batch, "image", 1, 4)).tolist() == [4]
    assert terms(item)[0].teachers == (None, "big") and objective.relational == [True]


def test_the_runs_own_teacher_may_be_named():
    item = {"loss": "kd", "task": "kind"}
    named, unnamed = terms({**item, "teacher": "teacher"}, item)
    assert named.teachers == unnamed.teachers == (None,) and named.name == unnamed.name == "kd/kind"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (SEVERAL, "clip_ensemble_ce needs the parameter 'teacher_scales'; add it to params"),
        (
            {**SEVERAL, "params": {"teacher_scales": [1.0]}},
            "needs different teachers and a number in teacher_scales for",
        ),
        ({**SEVERAL, "teacher": ["a", "a"], "params": {"teacher_scales": [1.0, 2.0]}}, "needs different teachers"),
        ({**SEVERAL, "teacher": "big", "params": {"teacher_scales": [1.0, 2.0]}}, "needs different teachers"),
        ({**SEVERAL, "teacher": [], "params": {"teacher_scales": []}}, "needs different teachers"),
        ({"loss": "cosine", "embedding": "fused", "teacher": ["a", "b"]}, "cosine reads one teacher, got a list"),
        (
            {"loss": "kd", "task": "kind", "weight": {"from": 1, "to": -1}},
            r"objective\[0\].weight is -1.0: Input should be greater than or equal to 0",
        ),
        (
            {"loss": "kd", "task": "kind", "params": {"temperature": {"from": 1, "till": 3}}},
            "params.temperature is .*: to: Field required; write {from: NUMBER, to: NUMBER",
        ),
        (
            {"loss": "kd", "task": "kind", "params": {"temperature": "hot"}},
            "params.temperature is 'hot': Input should be a",
        ),
        ({"loss": "rkd", "embedding": "text", "params": {"squared": {"from": 0, "to": 1}}}, "params.squared is 0.0"),
        (
            {"loss": "token_mse", "taps": {"student": "encoders.image.a", "teacher": "encoders.text.a"}},
            "token_mse needs taps of one modality's encoder on both sides",
        ),
        ({"loss": "token_mse", "taps": {"student": "fusion", "teacher": "fusion"}}, "taps of one modality's encoder"),
        ({"loss": "token_mse", "embedding": "text"}, "token_mse needs exactly one of taps"),
    ],
)
def test_lists_schedules_and_tokens_that_make_no_sense_are_refused(item, message):
    with pytest.raises(UserError, match=message):
        check_terms(terms(item), "objective")


SLOPE = {"from": 4.0, "to": 0.0, "until": 0.5}


def test_weights_and_parameters_move_with_the_steps(batch):
    student, teacher = outputs(), outputs(1)
    items = terms(
        {"loss": "kd", "task": "kind", "weight": SLOPE},
        {"loss": "kd", "task": "kind", "params": {"temperature": {"from": 1, "to": 3, "schedule": "cosine"}}},
    )
    objective = Objective(items, student, teacher)
    one, two = student.logits["kind"], teacher.logits["kind"]
    for step, weight, temperature in ((0, 4.0, 1.0), (5, 2.0, 1.2928932), (10, 0.0, 2.0), (15, 0.0, 2.7071068)):
        objective.advance(step, 20)
        expected = weight * losses.kd(one, two) + losses.kd(one, two, temperature=temperature)
        torch.testing.assert_close(objective(student, teacher, batch)[0], expected)
        assert objective.moving() == pytest.approx({"weight/kd/kind": weight})


def test_a_schedule_is_written_as_it_was_read():
    item = terms({"loss": "kd", "task": "kind", "weight": SLOPE})[0]
    assert item.model_dump()["weight"] == {**SLOPE, "schedule": "linear"}
    assert TermConfig.model_validate(item.model_dump()) == item
