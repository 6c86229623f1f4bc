"""Losses that learn or store something beside the student: their parts, in an objective, a training and a run."""

import re

import pytest
import torch
import torch.nn.functional as F
from tiny import only_ids, terms

from distill import losses
from distill.batch_parts import take
from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.losses.memories import Crd, QueueKl
from distill.losses.objective import Objective
from distill.losses.parts import Known
from distill.losses.terms import LOSSES, check_terms, stores_rows
from distill.ranks import Ranks

ROWS, IDS = 6, 10 * torch.arange(40) + 3
SHALLOW, DEEP = "encoders.image.shallow", "encoders.image.deep"
STAGES = {"student": [SHALLOW, DEEP], "teacher": [SHALLOW, DEEP]}
MAPS = {"student": DEEP, "teacher": DEEP}
ITEMS = {
    "vid": {"loss": "vid", "taps": MAPS, "params": {"eps": 1e-3}},
    "mgd": {"loss": "mgd", "taps": MAPS, "params": {"ratio": 0.4}},
    "ofd": {"loss": "ofd", "taps": MAPS},
    "fsp": {"loss": "fsp", "taps": STAGES},
    "review": {"loss": "review", "taps": STAGES, "params": {"width": 6, "levels": [2, 1]}},
    "ctkd": {"loss": "ctkd", "task": "kind", "params": {"strength": 0.5, "span": 10.0}},
    "clip_afd": {"loss": "clip_afd", "embedding": "image,text", "params": {"scale": 10.0}},
    "crd": {"loss": "crd", "embedding": "fused", "params": {"dim": 5, "negatives": 7}},
    "queue_kl": {"loss": "queue_kl", "embedding": "fused", "params": {"size": 9, "teacher_temperature": 0.1}},
}


def test_every_part_is_tested_here():
    assert set(ITEMS) == {name for name, loss in LOSSES.items() if loss.part is not None}


def outputs(seed=0, *, width=4, shallow=5, deep=8):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(ROWS, *shape, generator=generator)

    embeddings = {name: random(width) for name in ("image", "text", "fused")}
    return Outputs({"kind": random(3)}, embeddings, {SHALLOW: random(shallow, 6, 6), DEEP: random(deep, 3, 3)})


def teacher_of():
    return outputs(1, width=7, shallow=4, deep=9)


@pytest.fixture
def batch():
    present = {"image": torch.ones(ROWS, dtype=torch.bool), "text": torch.ones(ROWS, dtype=torch.bool)}
    return Batch(
        IDS[[4, 1, 0, 7, 9, 2]], torch.full((ROWS,), CLEAN_VIEW), {}, present, {"kind": torch.arange(ROWS) % 3}
    )


def objective_of(*names, **options):
    torch.manual_seed(0)
    items = terms(*(ITEMS[name] for name in names))
    return Objective(items, outputs(), teacher_of(), seed=5, **{"rows": only_ids(IDS), **options})


def filled(objective, batch):
    """The objective two steps later, so that memories hold something."""
    for step in range(2):
        objective.advance(step, 10)
        objective(outputs(), teacher_of(), batch)
        objective.settle(Ranks())
    objective.advance(2, 10)
    return objective


def by_hand(name, objective, student, teacher, batch):
    """What the pure function gives with the tensors of the part."""
    part, projector = objective.parts["0"], dict(objective.projectors).get("0")
    own, given = ([outputs.features[path] for path in (SHALLOW, DEEP)] for outputs in (student, teacher))
    pairs = [F.normalize(o.embeddings[side], dim=-1) for o in (student, teacher) for side in ("image", "text")]
    fused = student.embeddings["fused"], teacher.embeddings["fused"]
    if name == "vid":
        return losses.vid(own[1], given[1], part.regressor.weight, part.log_scale, eps=1e-3)
    if name == "mgd":
        mask = (torch.rand(ROWS, 9, 1, 1) >= 0.4).float()
        first, second = part.first, part.second
        return losses.mgd(projector(own[1]), given[1], mask, first.weight, first.bias, second.weight, second.bias)
    if name == "ofd":
        return losses.ofd(part.connector(own[1]), given[1], part.margins)
    if name == "fsp":
        return losses.fsp(part.projections[0](own[0]), part.projections[1](own[1]), *given)
    if name == "review":
        deep = part.laterals[1](own[1])
        fusing = part.attentions[0]
        shallow = losses.review_fusion(part.laterals[0](own[0]), deep, fusing.weight, fusing.bias)
        each = [losses.hcl(part.outs[n](x), given[n], levels=[2, 1]) for n, x in enumerate((shallow, deep))]
        return each[0] + each[1]
    if name == "ctkd":
        temperature = 1 + 10 * part.parameter.sigmoid()
        return losses.ctkd(student.logits["kind"], teacher.logits["kind"], temperature, strength=0.5)
    if name == "clip_afd":
        fusing = part.img.weight, part.img.bias, part.txt.weight, part.txt.bias
        return losses.clip_afd(*pairs, *fusing, scale=10.0)
    if name == "crd":
        rows = [F.normalize(layer(x)) for layer, x in zip((part.student_projection, part.teacher_projection), fused)]  # noqa: B905
        entries = part.entries(batch.ids)
        constants = {"student_constant": part.constant, "teacher_constant": part.constant}
        return losses.crd(*rows, part.student_bank[entries], part.teacher_bank[entries], num_rows=40, **constants)
    rows = F.normalize(projector(fused[0])), F.normalize(fused[1])
    return losses.queue_kl(*rows, part.queue, teacher_temperature=0.1)


@pytest.mark.parametrize("name", ITEMS)
def test_the_value_is_the_pure_function_s_with_what_the_part_holds(name, batch):
    objective = filled(objective_of(name), batch)
    student, teacher = outputs(2), outputs(3, width=7, shallow=4, deep=9)
    torch.manual_seed(7)
    value, _ = objective(student, teacher, batch)
    torch.manual_seed(7)
    torch.testing.assert_close(value, by_hand(name, objective, student, teacher, batch))
    assert value.item() != 0


@pytest.mark.parametrize("name", ITEMS)
def test_student_and_part_learn_and_the_teacher_does_not(name, batch):
    objective = filled(objective_of(name), batch)
    objective.zero_grad()
    student, teacher = outputs(2), outputs(3, width=7, shallow=4, deep=9)
    tensors = [[t.requires_grad_() for kind in side for t in kind.values()] for side in (student, teacher)]
    objective(student, teacher, batch)[0].backward()
    assert any(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors[0])
    assert not any(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors[1])
    untouched = [n for n, p in objective.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert untouched == []


@pytest.mark.parametrize("name", ["vid", "ctkd", "clip_afd", "crd", "queue_kl"])
def test_without_rows_a_part_gets_a_gradient_of_zero(name, batch):
    """Ranks agree about what learns, whatever rows they have."""
    objective = objective_of(name, reads={None: ["image"]})
    nobody = batch._replace(present={**batch.present, "image": torch.zeros(ROWS, dtype=torch.bool)})
    student = outputs()
    for kind in student:
        for tensor in kind.values():
            tensor.requires_grad_()
    value, _ = objective(student, teacher_of(), nobody)
    value.backward()
    objective.settle(Ranks())
    assert value.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.parameters())


@pytest.mark.parametrize("constant", [None, 0.0, 0.3])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", sorted(set(ITEMS) - {"mgd", "queue_kl"}))  # have projectors here, which read no halves
def test_gradients_of_halves_are_finite_or_refused_in_a_sentence(name, scale, constant, batch):
    objective = filled(objective_of(name), batch)
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = (_scaled(side, scale, dtype) for side in (outputs(2), teacher_of()))
        if constant is not None:
            student = _filled(student, scale * constant)
        leaves = [tensor.requires_grad_() for kind in student for tensor in kind.values()]
        value, _ = objective(student, teacher, batch)
        assert value.isfinite()
        try:
            value.backward()
        except UserError as error:
            assert re.match(f"{name}: a gradient of .* is beyond 65,504", str(error)) and dtype == torch.float16
            single = _scaled(student, 1.0, torch.float32)
            alone = [tensor.detach().requires_grad_() for kind in single for tensor in kind.values()]
            tensors = iter(alone)
            single = Outputs(*({key: next(tensors) for key in kind} for kind in single))
            objective(single, teacher, batch)[0].backward()
            assert max(leaf.grad.abs().max() for leaf in alone if leaf.grad is not None) >= 65520
            continue
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


def _scaled(side, scale, dtype):
    return Outputs(*({key: (scale * value.float()).to(dtype) for key, value in kind.items()} for kind in side))


def _filled(side, number):
    return Outputs(*({key: torch.full_like(value, number) for key, value in kind.items()} for kind in side))


def test_maps_of_halves_as_a_cache_gives_them_are_read(batch):
    names = ["vid", "mgd", "ofd", "fsp", "review", "crd"]
    halves = Outputs(*({name: value.half() for name, value in kind.items()} for kind in teacher_of()))
    torch.manual_seed(0)
    items = terms(*(ITEMS[name] for name in names))
    assert Objective(items, outputs(), halves, rows=only_ids(IDS))(outputs(), halves, batch)[0].isfinite()


def test_margins_are_means_of_negative_values():
    given = torch.tensor([[[[-1.0, 3.0]], [[2.0, 5.0]]], [[[-4.0, 0.0]], [[1.0, 0.0]]]])
    student, teacher = (Outputs({}, {}, {DEEP: maps}) for maps in (torch.zeros(2, 3, 1, 2), given))
    objective = Objective(terms({"loss": "ofd", "taps": MAPS}), student, teacher)
    assert objective.parts["0"].margins.tolist() == [-2.5, 0.0]


def test_the_constants_of_crd_are_those_of_a_first_batch():
    generator = torch.Generator().manual_seed(1)
    anchors = F.normalize(torch.randn(64, 128, generator=generator))
    part = Crd(Known("crd", 0, torch.arange(3000)), torch.zeros(1, 6), torch.zeros(1, 9))
    entries = part.teacher_bank[part.entries(torch.arange(64))]
    expected = losses.crd_constant(anchors, entries, num_rows=3000)
    assert part.constant.item() == pytest.approx(expected.item(), rel=0.05)


def test_negatives_are_other_rows_and_follow_from_seed_row_and_step_alone():
    def part(seed=0):
        made = Crd(Known("crd", seed, IDS), torch.zeros(1, 6), torch.zeros(1, 9), dim=4, negatives=500)
        made.step = 3
        return made

    entries = part().entries(IDS[:8])
    assert torch.equal(entries[:, 0], torch.arange(8))
    assert all(set(row[1:].tolist()) == set(range(40)) - {number} for number, row in enumerate(entries))
    assert torch.equal(part().entries(IDS[[5, 2]]), entries[[5, 2]])
    later = part()
    later.step = 4
    for other in (later, part(seed=1)):
        assert not torch.equal(other.entries(IDS[:8])[:, 1:], entries[:, 1:])


def test_a_bank_moves_toward_the_rows_of_a_step_once_it_is_done(batch):
    objective = objective_of("crd")
    part = objective.parts["0"]
    before = part.teacher_bank.clone()
    objective(outputs(), teacher_of(), batch)
    assert torch.equal(part.teacher_bank, before)
    objective.settle(Ranks())
    places = [4, 1, 0, 7, 9, 2]
    now = F.normalize(part.teacher_projection(teacher_of().embeddings["fused"]))
    torch.testing.assert_close(part.teacher_bank[places], F.normalize(0.5 * before[places] + 0.5 * now))
    others = [place for place in range(40) if place not in places]
    assert torch.equal(part.teacher_bank[others], before[others])


@pytest.mark.parametrize("size", [4, 9, 20])
def test_a_queue_holds_the_last_rows_in_order_of_steps_and_ids(size):
    part = QueueKl(Known("queue_kl"), torch.zeros(1, 1), torch.zeros(1, 1), size=size)
    for ids in ([8, 2, 5], [1, 9, 4], [30, 20, 10, 40, 50]):
        for some in (ids[::2], ids[1::2]):  # in micro-batches
            rows = torch.tensor(some)[:, None].float()
            part(rows, rows, torch.tensor(some))
        part.settle(Ranks())
    stored = [2, 5, 8, 1, 4, 9, 10, 20, 30, 40, 50][-size:]
    assert sorted(part.stored.flatten().tolist()) == sorted(stored)
    oldest = int(part.count) % size if size < 11 else 0
    assert part.stored.roll(-oldest, 0).flatten().tolist() == stored


def test_rows_of_an_unfinished_step_and_of_evaluation_are_not_stored(batch):
    objective = objective_of("queue_kl", "crd")
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    objective(outputs(), teacher_of(), batch)
    objective.forget()
    objective.eval()(outputs(), teacher_of(), batch)
    objective.settle(Ranks())
    assert all(torch.equal(buffer, before[name]) for name, buffer in objective.named_buffers())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"loss": "vid", "embedding": "fused"},
            r"'vid/fused' reads feature maps \[B, C, H, W\], got \[\[6, 4\], \[6, 7\]\]",
        ),
        ({"loss": "crd", "taps": MAPS}, "reads one vector a row, got .* add ':mean' to both taps"),
        ({"loss": "queue_kl", "taps": MAPS}, "reads one vector a row"),
        ({"loss": "cckd", "taps": MAPS}, "reads one vector a row"),
        ({**ITEMS["crd"], "params": {"negatives": 0}}, "params.negatives is 0: Input should be greater than"),
        (
            {**ITEMS["review"], "params": {"width": -1}},
            "params.width is -1: Input should be greater than or equal to 1",
        ),
        ({**ITEMS["fsp"], "taps": {**STAGES, "student": [DEEP]}}, "reads several stages; give lists of 2 paths a side"),
        ({**ITEMS["review"], "taps": {**STAGES, "student": [DEEP]}}, "give lists of as many paths a side"),
        ({**ITEMS["review"], "taps": MAPS}, "reads several stages"),
        ({**ITEMS["vid"], "taps": STAGES}, "vid reads one tap a side, got a list"),
        ({**ITEMS["crd"], "params": {"dims": 3}}, "crd has no parameter 'dims'; did you mean 'dim'"),
        (
            {**ITEMS["crd"], "params": {"dim": "wide"}},
            r"objective\[0\].params.dim is 'wide': Input should be a valid int",
        ),
        ({**ITEMS["mgd"], "params": {"hide": "rows"}}, "params.hide is 'rows': .*choices: channels, positions"),
        ({**ITEMS["crd"], "params": {"dim": {"from": 1, "to": 2}}}, "params.dim: it is fixed when the term is built"),
    ],
)
def test_what_a_part_cannot_be_built_from_is_refused(item, message):
    with pytest.raises(UserError, match=message):
        Objective(terms(item), outputs(), teacher_of(), rows=only_ids(IDS))


def test_crd_needs_to_know_the_rows():
    assert stores_rows(terms(ITEMS["vid"], ITEMS["crd"])) and not stores_rows(terms(ITEMS["vid"]))
    for ids, said in ((None, "an unknown number of"), (IDS[:1], "1")):
        with pytest.raises(UserError, match=f"keeps an entry a training row: 2 to 16,777,216, not {said} rows"):
            objective_of("crd", rows=only_ids(ids))


def test_a_part_without_a_teacher_is_refused():
    with pytest.raises(UserError, match="reads a teacher, and this stage has none"):
        Objective(terms(ITEMS["vid"]), outputs(), None)


FUSION = {"student": "fusion", "teacher": "fusion"}
SRRL = {"loss": "srrl", "task": "kind", "taps": FUSION, "params": {"beta": 3.0}}


def test_the_teacher_s_classifier_reads_the_features_of_both(batch):
    torch.manual_seed(0)
    head, (student, teacher) = torch.randn(3, 7), (torch.randn(ROWS, 5), torch.randn(ROWS, 7))
    said = [Outputs({}, {}, {"fusion": value}) for value in (student, teacher)]
    objective = Objective(terms(SRRL), *said, classifiers={"kind": head})
    expected = losses.srrl(objective.projectors["0"](student), teacher, head, beta=3.0)
    torch.testing.assert_close(objective(*said, batch)[0], expected)
    assert list(objective.state_dict()) == ["projectors.0.weight", "projectors.0.bias"]  # the head is the teacher's
    with pytest.raises(
        UserError, match=r"classifier reads 4 numbers, and its tap gives \[7\] a row; tap what it reads"
    ):
        Objective(terms(SRRL), *said, classifiers={"kind": head[:, :4]})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"loss": "srrl", "task": "kind"}, r"needs task and taps, got \['task'\]"),
        ({"loss": "srrl", "taps": FUSION}, "needs task and taps, got"),
        ({**SRRL, "teacher": "big"}, "srrl reads the classifier of the run's own teacher; leave out 'teacher'"),
    ],
)
def test_what_the_classifier_is_not_given_is_refused(item, message):
    with pytest.raises(UserError, match=message):
        check_terms(terms(item), "objective")


@pytest.mark.parametrize("name", ["ofd", "review"])
def test_one_row_of_one_position_is_normalised_with_averages(name, batch):
    def first(said, rows):
        return Outputs({}, {}, {path: maps[:rows, :, :1, :1] for path, maps in said.features.items()})

    student, teacher = outputs(), teacher_of()
    objective = Objective(terms(ITEMS[name]), first(student, ROWS), first(teacher, ROWS))
    objective(first(student, ROWS), first(teacher, ROWS), batch)
    gathered = {key: value.clone() for key, value in objective.named_buffers()}
    alone = take(batch, torch.tensor([0]))
    value = objective(first(student, 1), first(teacher, 1), alone)[0]
    torch.testing.assert_close(value, objective.eval()(first(student, 1), first(teacher, 1), alone)[0])
    assert all(torch.equal(value, gathered[key]) for key, value in objective.named_buffers())
