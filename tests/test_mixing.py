"""Several teachers in one term on logits: weights by hand, plain terms as special cases, rows, parts and learning."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_objective import ROWS, outputs, without
from tiny import terms

from distill import losses
from distill.batch_parts import take
from distill.config import MixConfig
from distill.contracts import CLEAN_VIEW, IGNORE, Batch, Outputs, UserError
from distill.losses.mixing import Mixed, confidence_weights, pool_loss, pooled_logits
from distill.losses.objective import Objective
from distill.losses.terms import LOSSES, check_terms, mixes

NAMES = ["teacher", "big", "eye"]
MIXED = [name for name in LOSSES if mixes(terms({"loss": name, "task": "kind", "teacher": NAMES})[0])]
BY_SOFTMAX = [name for name in MIXED if not LOSSES[name].raw]
MIXES = ["weights", "learned", "confidence"]
LABELLED = torch.tensor([0, IGNORE, 2, 1, IGNORE, 0])


@pytest.fixture
def batch():
    present = {name: torch.ones(ROWS, dtype=torch.bool) for name in ("image", "text")}
    return Batch(torch.arange(ROWS), torch.full((ROWS,), CLEAN_VIEW), {}, present, {"kind": torch.arange(ROWS) % 3})


def several(count=3, *, same=False):
    """What some teachers say, under the names of ``NAMES``."""
    said = [outputs(1 if same else 1 + number).logits for number in range(count)]
    named = {name if not n else f"{name}@{NAMES[n]}": v for n, part in enumerate(said) for name, v in part.items()}
    return Outputs(named, {}, {})


def term(loss="kd", mix=None, teacher=NAMES, task="kind", **more):
    item = {"loss": loss, "task": task, "teacher": list(teacher), **more}
    return item if mix is None else item | {"mix": mix}


def value(item, batch, student, teacher, reads=None):
    return Objective(terms(item), student, teacher, reads=reads)(student, teacher, batch)[0]


def alone(loss, student, teacher, labels, **params):
    """The loss as a function, with labels if it reads them."""
    told = [labels] if LOSSES[loss].kind == "teacher+labels" else []
    return LOSSES[loss].function(student, teacher, *told, **params)


def test_which_losses_mix_teachers():
    assert MIXED == ["kd", "mse_logits", "logit_standardized_kd", "multilabel_kd", "dist", "dkd", "nkd"]
    assert set(MIXED) - set(BY_SOFTMAX) == {"mse_logits", "multilabel_kd"}


def test_confidence_by_hand():
    """Teachers that give the label 1/2, 1/4 and 1/8 have exp(L) = 2, 4, 8: weights (1 - 2/14) / 2 and so on."""
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875]], dtype=torch.float64)
    logits = (p.log() + torch.tensor([[3.0], [-1.0], [0.0]])).expand(5, 3, 2)
    labels = torch.tensor([0, 0, 0, 0, IGNORE])
    reads = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]).bool()
    expected = torch.tensor(
        [[6 / 14, 5 / 14, 3 / 14], [4 / 6, 2 / 6, 0], [0, 8 / 12, 4 / 12], [0, 0, 1], [0.5, 0, 0.5]], dtype=p.dtype
    )
    torch.testing.assert_close(confidence_weights(logits, labels, reads), expected)


def test_a_hopeless_teacher_has_no_weight_and_no_infinity():
    logits = torch.tensor([[[1e4, 0.0], [0.0, 0.0]]])
    reads = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(confidence_weights(logits, torch.tensor([1]), reads), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("loss", MIXED)
def test_fixed_weights_are_those_of_the_losses(loss, batch):
    student, teacher = outputs(), several()
    values = [alone(loss, student.logits["kind"], t, batch.targets["kind"]) for t in of(teacher)]
    weights = torch.tensor([0.5, 0.3, 0.2])
    found = value(term(loss, {"weights": [5, 3, 2]}), batch, student, teacher)
    torch.testing.assert_close(found, (weights * torch.stack(values)).sum())
    torch.testing.assert_close(value(term(loss), batch, student, teacher), torch.stack(values).mean())


def of(teacher):
    return [teacher.logits["kind"], teacher.logits["kind@big"], teacher.logits["kind@eye"]]


@pytest.mark.parametrize("loss", [name for name in MIXED if not LOSSES[name].relational])
def test_confidence_weighs_row_by_row(loss, batch):
    """CA-MKD in loops; rows without a label have equal weights, where the loss reads them at all."""
    student, teacher = outputs(), several()
    whole = batch._replace(targets={"kind": LABELLED})
    total, counted = 0.0, 0
    for row, label in enumerate(LABELLED.tolist()):
        if label == IGNORE and LOSSES[loss].kind == "teacher+labels":
            continue
        weights = [1 / 3] * 3
        if label != IGNORE:
            errors = torch.stack([-F.log_softmax(t[row], -1)[label] for t in of(teacher)]).exp()
            weights = ((1 - errors / errors.sum()) / 2).tolist()
        one = [LABELLED[row : row + 1]]
        each = [alone(loss, student.logits["kind"][row : row + 1], t[row : row + 1], *one) for t in of(teacher)]
        total, counted = total + sum(w * v for w, v in zip(weights, each, strict=True)), counted + 1
    torch.testing.assert_close(value(term(loss, "confidence"), whole, student, teacher), total / counted)


def test_a_loss_that_compares_rows_takes_the_mean_weights_of_the_batch(batch):
    student, teacher = outputs(), several()
    weights = confidence_weights(torch.stack(of(teacher), 1), batch.targets["kind"], torch.ones(ROWS, 3).bool())
    each = torch.stack([losses.dist(student.logits["kind"], t) for t in of(teacher)])
    found = value(term("dist", "confidence"), batch, student, teacher)
    torch.testing.assert_close(found, (weights.mean(0) * each).sum())


@pytest.mark.parametrize("loss", BY_SOFTMAX)
def test_mixed_predictions_are_those_of_one_teacher(loss, batch):
    student, teacher = outputs(), several()
    weights = [0.5, 0.3, 0.2]
    mean = torch.stack([w * t.softmax(-1) for w, t in zip(weights, of(teacher), strict=True)]).sum(0)
    item = term(loss, {"weights": weights, "average": "probabilities"})
    expected = alone(loss, student.logits["kind"], mean.log(), batch.targets["kind"])
    torch.testing.assert_close(value(item, batch, student, teacher), expected)


@pytest.mark.parametrize("by", MIXES)
def test_kd_at_temperature_1_has_one_gradient_in_both_ways(by, batch):
    gradients = []
    for average in ("losses", "probabilities"):
        student = outputs()
        student.logits["kind"].requires_grad_()
        item = term("kd", {"by": by, "average": average}, params={"temperature": 1.0})
        value(item, batch, student, several()).backward()
        gradients.append(student.logits["kind"].grad)
    torch.testing.assert_close(*gradients)


AVERAGES = [(loss, average) for loss in MIXED for average in ("losses", "probabilities")]
AVERAGES = [(loss, average) for loss, average in AVERAGES if average == "losses" or loss in BY_SOFTMAX]


@pytest.mark.parametrize("by", MIXES)
@pytest.mark.parametrize(("loss", "average"), AVERAGES)
def test_one_teacher_and_equal_teachers_are_the_plain_term(loss, average, by, batch):
    whole = batch._replace(targets={"kind": LABELLED})
    student = outputs()
    plain = value({"loss": loss, "task": "kind"}, whole, student, several(1))
    for count in (1, 3):
        item = term(loss, {"by": by, "average": average}, teacher=NAMES[:count])
        torch.testing.assert_close(value(item, whole, student, several(count, same=True)), plain)


@pytest.mark.parametrize("by", MIXES)
@pytest.mark.parametrize(("loss", "average"), AVERAGES)
def test_the_order_of_teachers_does_not_matter(loss, average, by, batch):
    weights = {"big": 3.0, "eye": 1.0, "teacher": 2.0} if by != "confidence" else {}
    reads = {"eye": ["image"], "big": ["text"], None: ["image", "text"]}
    lacking = without(batch, "image", 1)._replace(targets={"kind": LABELLED})
    found = []
    for order in itertools.permutations(NAMES):
        mix = {"by": by, "average": average} | ({"weights": [weights[name] for name in order]} if weights else {})
        found.append(value(term(loss, mix, teacher=order), lacking, outputs(), several(), reads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("by", MIXES)
@pytest.mark.parametrize(("loss", "average"), AVERAGES)
def test_gradients_are_those_of_differences(loss, average, by, batch):
    said = [{name: v.double() for name, v in part.logits.items()} for part in (outputs(), several())]
    student, teacher = (Outputs(logits, {}, {}) for logits in said)
    whole = batch._replace(targets={"kind": LABELLED})
    objective = Objective(terms(term(loss, {"by": by, "average": average})), student, teacher).double()

    def call(logits):
        return objective(student._replace(logits={"kind": logits}), teacher, whole)[0]

    assert torch.autograd.gradcheck(call, student.logits["kind"].requires_grad_())


READS = {None: ["text"], "big": ["image", "text"], "eye": ["image"]}


@pytest.mark.parametrize("by", MIXES)
@pytest.mark.parametrize(("loss", "average"), AVERAGES)
def test_what_a_teacher_cannot_read_changes_nothing(loss, average, by, batch):
    """Rows 1 and 4 lack the image, row 2 the text: there the others have all the weight."""
    lacking = without(without(batch, "image", 1, 4), "text", 2)
    item, found = term(loss, {"by": by, "average": average}), []
    for filler in (torch.zeros(3), torch.tensor([5.0, -1.0, 2.0])):
        student, teacher = outputs(), several()
        teacher.logits["kind"][2] = filler
        teacher.logits["kind@eye"][[1, 4]] = filler
        student.logits["kind"].requires_grad_()
        objective = Objective(terms(item), student, teacher, reads=READS)
        total = objective(student, teacher, lacking)[0]
        total.backward()
        found.append([total, student.logits["kind"].grad, *(p.grad for p in objective.parameters())])
    torch.testing.assert_close(*found)


def test_a_row_belongs_to_those_who_read_it_and_one_that_nobody_reads_is_left_out(batch):
    lacking = without(batch, "image", 1, 4)
    student, teacher = outputs(), several()
    item = term("kd", {"weights": [2, 1]}, teacher=["teacher", "eye"])
    objective = Objective(terms(item), student, teacher, reads={None: ["text"], "eye": ["image"]})
    assert objective.num_rows(lacking).tolist() == [ROWS]
    own, eye = ([losses.kd(student.logits["kind"][[r]], t[[r]]) for r in range(ROWS)] for t in of(teacher)[::2])
    expected = [own[r] if r in (1, 4) else (2 * own[r] + eye[r]) / 3 for r in range(ROWS)]
    torch.testing.assert_close(objective(student, teacher, lacking)[0], torch.stack(expected).mean())
    half_blind = Objective(terms(item), student, teacher, reads={None: ["image", "text"], "eye": ["image"]})
    assert half_blind.num_rows(lacking).tolist() == [ROWS]
    blind = Objective(terms(item), student, teacher, reads={None: ["image"], "eye": ["image"]})
    kept = torch.tensor([0, 2, 3, 5])
    assert blind.num_rows(lacking).tolist() == [4]
    part = [take(x, kept) for x in (student, teacher, lacking)]
    torch.testing.assert_close(blind(student, teacher, lacking)[0], blind(*part)[0])


@pytest.mark.parametrize("by", MIXES)
def test_the_parts_of_a_batch_add_up_to_the_whole_with_their_gradients(by, batch):
    whole = without(batch, "image", 1, 4)._replace(targets={"kind": LABELLED})
    items = terms(*(term(loss, by) for loss in MIXED if not LOSSES[loss].relational))
    student, teacher = outputs(), several()
    student.logits["kind"].requires_grad_()
    objective = Objective(items, student, teacher, reads=READS)
    counts = objective.num_rows(whole).clamp(min=1)

    def gradients(parts):
        objective.zero_grad()
        student.logits["kind"].grad = None
        total = 0.0
        for rows in parts:
            part = [take(x, rows) for x in (student, teacher, whole)]
            total = total + objective(*part, (objective.num_rows(part[2]) / counts).tolist())[0]
        total.backward()
        return [total, student.logits["kind"].grad, *(p.grad.clone() for p in objective.parameters())]

    one = gradients([torch.arange(ROWS)])
    assert len(one) == (2 + len(items) if by == "learned" else 2)
    for found, expected in zip(gradients([torch.tensor([1]), torch.tensor([0, 2, 3, 4, 5])]), one, strict=True):
        torch.testing.assert_close(found, expected)


def test_learned_weights_have_the_gradient_of_the_mixtures_likelihood_alone(batch):
    student, teacher = outputs(), several()
    objective = Objective(terms(term("kd", "learned", weight=0.5)), student, teacher)
    (scores,) = objective.parameters()
    total = objective(student, teacher, batch)[0]
    torch.testing.assert_close(total, 0.5 * value(term(), batch, student, teacher).detach())
    total.backward()
    again = scores.detach().clone().requires_grad_()
    mixture = torch.stack([w * t.softmax(-1) for w, t in zip(again.softmax(-1), of(teacher), strict=True)]).sum(0)
    F.nll_loss(mixture.log(), batch.targets["kind"]).backward()
    torch.testing.assert_close(scores.grad, 0.5 * again.grad)
    bare = batch._replace(targets={"kind": torch.full((ROWS,), IGNORE)})
    scores.grad = None
    objective(student, teacher, bare)[0].backward()
    assert not scores.grad.any()


def test_the_likelihood_finds_who_is_right_where_the_loss_itself_finds_who_is_easy():
    """Two teachers are right in half of the rows each; the third is wrong, and the student says the same as it."""
    labels = torch.arange(12) % 3
    right, wrong = 4.0 * F.one_hot(labels, 3), 4.0 * F.one_hot((labels + 1) % 3, 3)
    first = torch.arange(12) < 6
    teachers = torch.stack([torch.where(first[:, None], right, 0), torch.where(first[:, None], 0, right), wrong], 1)
    reads, student = torch.ones(12, 3, dtype=torch.bool), wrong
    each = torch.stack([losses.kd(student, t, temperature=1.0) for t in teachers.unbind(1)])
    ends = []
    for learning in (
        lambda scores: pool_loss(scores, teachers, labels, reads).mean(),
        lambda scores: (scores.softmax(-1) * each).sum(),
    ):
        scores = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([scores], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            learning(scores).backward()
            optimizer.step()
        ends.append(scores.detach().softmax(-1))
    torch.testing.assert_close(ends[0], torch.tensor([0.5, 0.5, 0.0]), atol=0.01, rtol=0)
    assert ends[1][2] > 0.99


def test_learned_weights_begin_where_the_recipe_says_and_are_told(batch):
    student, teacher = outputs(), several()
    objective = Objective(terms(term("kd", {"by": "learned", "weights": [2, 1, 1]})), student, teacher)
    named = {f"mix/kd/kind@teacher+big+eye/{name}": share for name, share in zip(NAMES, (0.5, 0.25, 0.25), strict=True)}
    assert objective.moving() == pytest.approx(named)
    with torch.no_grad():
        next(objective.parameters()).copy_(torch.tensor([0.0, 1.0, 2.0]))
    objective(student, teacher, batch)
    assert list(objective.moving().values()) == pytest.approx(torch.tensor([0.0, 1.0, 2.0]).softmax(-1).tolist())
    assert not Objective(terms(term("kd", "confidence")), student, teacher).moving()


def test_halves_are_mixed_in_full_precision():
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    teachers = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).half() for seed in (1, 2)]
    rest = (torch.arange(4) % 3, torch.ones(4, 2, dtype=torch.bool))
    mixed = Mixed(losses.kd, MixConfig(by="confidence"), 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(student.bfloat16(), *teachers, *rest)
    expected = mixed(student.bfloat16().float(), *(teacher.float() for teacher in teachers), *rest)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_pool_of_equal_predictions_is_that_prediction():
    logits = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(0)).expand(5, 3, 4)
    weights = torch.tensor([0.2, 0.8, 0.0]).expand(5, 3)
    torch.testing.assert_close(pooled_logits(logits, weights), F.log_softmax(logits[:, 0], -1))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (term("ctkd"), "ctkd reads one teacher, got a list; give one name, or a term for each"),
        (term(teacher=["big", "big"]), r"kd needs different teachers, got \['big', 'big'\]"),
        (term(teacher=[]), r"kd needs different teachers, got \[\]"),
        (
            {"loss": "kd", "task": "kind", "teacher": "big", "mix": "learned"},
            r"objective\[0\].mix: kd mixes no teachers here; leave it out, or list some for a loss on logits",
        ),
        (
            {"loss": "cosine", "embedding": "fused", "mix": {}},
            "cosine mixes no teachers here",
        ),
        (term(mix={"weights": [1, 2]}), r"mix.weights: got 2 for 3 teachers by 'weights'; give one for each"),
        (term(mix={"by": "confidence", "weights": [1, 2, 3]}), "got 3 for 3 teachers by 'confidence'; .* and none"),
        (term("mse_logits", {"average": "probabilities"}), "which mse_logits reads too; use 'losses'"),
    ],
)
def test_mixes_that_make_no_sense_are_refused(item, message):
    with pytest.raises(UserError, match=message):
        check_terms(terms(item), "objective")
