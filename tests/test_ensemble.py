"""An ensemble that shares its encoders: what it answers, and that each member learns by itself."""

import copy

import pytest
import torch
from tiny import LABELS, NUM_CLASSES, make_batch, make_model, terms

from distill.fusion import FUSIONS
from distill.losses.objective import Objective
from distill.multimodal import MultimodalModel, OneModality, Reader, by_member, evaluating
from distill.tasks import HEADS

CONTRAST = terms({"loss": "clip_infonce", "embedding": "image,text"})


def make_reader(seed, dim=12):
    torch.manual_seed(seed)
    heads = {task: HEADS["linear"](dim, count) for task, count in NUM_CLASSES.items()}
    alone = {
        task: {name: HEADS["linear"](dim, count) for name in ("image", "text")} for task, count in NUM_CLASSES.items()
    }
    widths = {"image": 8, "text": 8}
    return Reader(widths, FUSIONS["concat"](list(widths), dim), heads, alone, dim=dim, embedding_dim=6)


@pytest.fixture
def ensemble(wordpiece_file):
    """Two members, and each of them as a model of its own with the same weights."""
    model = make_model(wordpiece_file)
    other = make_reader(1)
    alone = [model]
    for reader in (model, other):
        single = copy.deepcopy(model)
        for name, part in reader.named_children():
            if name not in ("encoders", "others"):
                setattr(single, name, copy.deepcopy(part))
        alone.append(single)
    parts = (model.fusion, dict(model.heads), {task: dict(by) for task, by in model.unimodal_heads.items()})
    joined = MultimodalModel(dict(model.encoders), *parts, dim=12, embedding_dim=6, others=[other])
    for name in ("necks", "token_necks", "embedders"):
        setattr(joined, name, getattr(model, name))
    return joined, alone[1:]


def test_in_evaluation_logits_are_averaged_and_embeddings_side_by_side(ensemble):
    joined, alone = ensemble
    batch = make_batch()
    with evaluating(joined), evaluating(alone[0]), evaluating(alone[1]):
        together, one, two = (model(batch) for model in (joined, *alone))
    assert together.logits.keys() == one.logits.keys()
    for name, logits in together.logits.items():
        torch.testing.assert_close(logits, (one.logits[name] + two.logits[name]) / 2)
        assert not torch.allclose(one.logits[name], two.logits[name])
    for name, vectors in together.embeddings.items():
        torch.testing.assert_close(vectors, torch.cat([one.embeddings[name], two.embeddings[name]], dim=1))


def test_in_training_each_member_answers_for_itself(ensemble):
    joined, alone = ensemble
    batch = make_batch()
    answers = by_member(joined.train()(batch))
    assert len(answers) == 2
    for answer, model in zip(answers, alone, strict=True):
        expected = copy.deepcopy(model).train()(batch)
        for found, wanted in ((answer.logits, expected.logits), (answer.embeddings, expected.embeddings)):
            assert found.keys() == wanted.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, wanted[name])
    single = alone[0].train()(batch)
    assert by_member(single) == [single]


def test_each_member_gets_the_gradient_of_its_own_loss(ensemble):
    """A term is the mean over members; so each member learns as it would alone, but for the shared encoders."""
    joined, alone = ensemble
    batch = make_batch()
    objective = Objective([*LABELS, *CONTRAST], joined.eval()(batch), None)
    loss, values = objective(joined.train()(batch), None, batch)
    loss.backward()
    singles = []
    for model in alone:
        single, by_term = objective(model.train()(batch), None, batch)
        single.backward()
        singles.append((single.item(), by_term))
    assert loss.item() == pytest.approx(sum(item for item, _ in singles) / 2)
    for name, value in values.items():
        assert value.item() == pytest.approx(sum(by_term[name].item() for _, by_term in singles) / 2)
    for member, model in zip(joined.members, alone, strict=True):
        for name in ("necks", "fusion", "embedders"):
            wanted = dict(getattr(model, name).named_parameters())
            for path, parameter in getattr(member, name).named_parameters():
                if wanted[path].grad is not None:
                    torch.testing.assert_close(2 * parameter.grad, wanted[path].grad, rtol=1e-4, atol=1e-7)
    shared = dict(joined.encoders.named_parameters())
    for path, parameter in shared.items():
        both = sum(dict(model.encoders.named_parameters())[path].grad for model in alone)
        torch.testing.assert_close(2 * parameter.grad, both, rtol=1e-3, atol=1e-5)


def test_a_member_can_be_read_with_one_modality(ensemble):
    joined, alone = ensemble
    batch = make_batch()
    for member, model in zip(joined.members, alone, strict=True):
        with evaluating(joined), evaluating(model):
            found, wanted = OneModality(joined, "text", member).eval()(batch), OneModality(model, "text").eval()(batch)
        torch.testing.assert_close(found.logits["kind"], wanted.logits["kind"])


def test_the_projection_that_a_student_inherits_is_that_of_all_members(ensemble):
    joined, alone = ensemble
    pooled = torch.randn(5, 8)
    with torch.no_grad():
        parts = [model.necks["text"].project(pooled) for model in alone]
        torch.testing.assert_close(joined.project("text", pooled), torch.cat(parts, dim=1))


@pytest.mark.parametrize("weights", [{}, {"text": 3.0}, {"fused": 0.5, "image": 2.0}])
def test_weights_of_heads(wordpiece_file, weights):
    """The mean is weighted, over the heads that the row has."""
    model = make_model(wordpiece_file, head_weights=weights).eval()
    batch = make_batch()
    batch.present["image"][:2] = False
    logits = model(batch).logits
    each = {name: weights.get(name, 1.0) for name in ("fused", "image", "text")}
    for rows, names in ((slice(0, 2), ("fused", "text")), (slice(2, None), ("fused", "image", "text"))):
        total = sum(each[name] for name in names)
        expected = sum(each[name] * logits[f"kind.{name}"][rows] for name in names) / total
        torch.testing.assert_close(logits["kind"][rows], expected)
