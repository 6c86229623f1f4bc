"""Rows that are no negatives of each other, and scales that are learned: in losses, in an objective and over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import terms

from distill import losses
from distill.contracts import CLEAN_VIEW, Batch, Outputs, UserError
from distill.losses.objective import Objective
from distill.losses.scales import with_own
from distill.losses.terms import check_terms
from distill.ranks import Ranks

ROWS = 4
IDS = torch.tensor([30, 10, 40, 20])
KEYS = {
    "id": torch.tensor([10, 20, 30, 40, 50]),
    "text": torch.tensor([7, 8, 7, 9, 7]),  # rows 10 and 30 (and 50, of another batch) have one text
    "image": torch.tensor([0, 1, 2, 1, 4]),  # rows 20 and 40 one image
    "group": torch.tensor([0, 0, 0, 0, 1]),
}
PAIR = {"embedding": "image,text"}


def embeddings(seed=0, width=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, width, generator=generator, requires_grad=True) for name in ("image", "text")}


def unit(said):
    return [F.normalize(said[name], dim=1) for name in ("image", "text")]


@pytest.fixture
def batch():
    present = {name: torch.ones(ROWS, dtype=torch.bool) for name in ("image", "text")}
    return Batch(IDS, torch.full((ROWS,), CLEAN_VIEW), {}, present, {})


def keys(*names):
    places = torch.searchsorted(KEYS["id"], IDS)
    return torch.stack([KEYS[name][places] for name in names], dim=1)


def test_a_hand_case_of_two_rows_of_one_text():
    # cosines, images down: rows 0 and 1 share a text; scale 1
    img = torch.eye(3)
    txt = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    found = losses.clip_infonce(img, txt, torch.tensor([[5], [5], [6]]), logit_scale=1.0)
    e = math.e
    # image 0: logits 1 1 0, target ½ ½ 0; image 1: 0 0 0, target ½ ½ 0; image 2: 0 0 1, target 0 0 1
    images = (math.log(2 * e + 1) - 1) + math.log(3) + (math.log(2 + e) - 1)
    # texts 0 and 1: logits 1 0 0 over images, target ½ ½ 0; text 2: 0 0 1
    texts = 2 * (math.log(e + 2) - 0.5) + (math.log(2 + e) - 1)
    assert found.item() == pytest.approx((images + texts) / 6)


def test_siglip_takes_positives_as_matches():
    img, txt = (F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    found = losses.siglip(img, txt, torch.tensor([[5], [5], [6]]), logit_scale=3.0, logit_bias=-1.0)
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if (i == j or {i, j} == {0, 1}) else -1
            total += math.log(1 + math.exp(-sign * (3.0 * float(img[i] @ txt[j]) - 1.0)))
    assert found.item() == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["clip_infonce", "siglip", "clip_icl"])
def test_keys_that_all_differ_change_nothing(name):
    tensors = [F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(s)), dim=1) for s in range(4)]
    given = tensors if name == "clip_icl" else tensors[:2]
    loss = getattr(losses, name)
    torch.testing.assert_close(loss(*given, torch.arange(4)[:, None]), loss(*given))


@pytest.mark.parametrize("names", [["text"], ["image"], ["group"], ["text", "image"]])
def test_an_objective_finds_the_keys_of_a_batch(batch, names):
    said = Outputs({}, embeddings(), {})
    item = {"loss": "clip_infonce", **PAIR, "positives": names, "params": {"logit_scale": 5.0}}
    found = Objective(terms(item), said, None, row_keys=KEYS)(said, None, batch)[0]
    torch.testing.assert_close(found, losses.clip_infonce(*unit(said.embeddings), keys(*names), logit_scale=5.0))


def test_rows_without_a_modality_leave_their_keys_too(batch):
    present = {**batch.present, "text": torch.tensor([True, True, False, True])}
    said, kept = Outputs({}, embeddings(), {}), torch.tensor([0, 1, 3])
    item = {"loss": "siglip", **PAIR, "positives": ["text"]}
    found = Objective(terms(item), said, None, row_keys=KEYS)(said, None, batch._replace(present=present))[0]
    image, text = unit(said.embeddings)
    torch.testing.assert_close(found, losses.siglip(image[kept], text[kept], keys("text")[kept]))


LEARNED = {"loss": "clip_infonce", **PAIR, "params": {"logit_scale": "learned"}}


def test_a_learned_scale_begins_at_clips_and_learns(batch):
    said = Outputs({}, embeddings(), {})
    objective = Objective(terms(LEARNED), said, None)
    assert objective.learned_values() == {"logit_scale/clip_infonce/image,text": pytest.approx(1 / 0.07)}
    loss = objective(said, None, batch)[0]
    torch.testing.assert_close(loss, losses.clip_infonce(*unit(said.embeddings), logit_scale=1 / 0.07))
    loss.backward()
    (parameter,) = objective.parameters()
    assert parameter.grad is not None and parameter.grad.abs() > 1e-3


def test_a_learned_scale_stays_below_a_hundred_after_a_step(batch):
    said = Outputs({}, embeddings(), {})
    objective = Objective(terms(LEARNED), said, None)
    (parameter,) = objective.parameters()
    with torch.no_grad():
        parameter.fill_(9.0)
    objective.settle(Ranks())
    assert list(objective.learned_values().values()) == [pytest.approx(100.0)]


def test_siglip_learns_scale_and_bias_from_its_papers_numbers(batch):
    said = Outputs({}, embeddings(), {})
    item = {"loss": "siglip", **PAIR, "params": {"logit_scale": "learned", "logit_bias": "learned"}}
    objective = Objective(terms(item), said, None)
    assert list(objective.learned_values().values()) == [pytest.approx(10.0), pytest.approx(-10.0)]
    objective(said, None, batch)[0].backward()
    assert all(parameter.grad.abs() > 0 for parameter in objective.parameters())


def test_a_rank_without_rows_keeps_the_graph_of_what_is_learned(batch):
    said = Outputs({}, embeddings(), {})
    objective = Objective(terms(LEARNED), said, None)
    nobody = {name: torch.zeros(ROWS, dtype=torch.bool) for name in batch.present}
    objective(said, None, batch._replace(present=nobody))[0].backward()
    assert [parameter.grad.item() for parameter in objective.parameters()] == [0.0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"loss": "clip_infonce", **PAIR, "params": {"logit_scale": "own"}}, "logit_scale is 'own'"),
        ({"loss": "clip_infonce", **PAIR, "params": {"logit_scale": True}}, "logit_scale is True"),
        ({"loss": "clip_relational_kl", **PAIR, "params": {"teacher_scale": "learned"}}, "teacher_scale is 'learned'"),
        ({"loss": "clip_fd", **PAIR, "positives": ["text"]}, "takes no positives; leave them out, or use clip_infonce"),
    ],
)
def test_what_cannot_be_learned_or_told_is_refused(item, message):
    with pytest.raises(UserError, match=message):
        check_terms(terms(item), "student.objective")


def test_the_teachers_own_scale_takes_its_place():
    item = {"loss": "siglip_relational", **PAIR, "params": {"teacher_scale": "own", "teacher_bias": "own"}}
    (term,) = with_own(terms(item), {"logit_scale": 42.0, "logit_bias": -3.0})
    assert term.params == {"teacher_scale": 42.0, "teacher_bias": -3.0}
    with pytest.raises(UserError, match=r"objective\[0\].params.teacher_bias: the teacher's weights come without"):
        with_own(terms(item), {"logit_scale": 42.0})
