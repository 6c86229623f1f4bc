"""Heads that decide a task together: each rule written out, absent modalities, learning, recipes and graphs."""

import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_batch, make_model
from tiny_project import distill, make_project, refusal
from torch import Tensor

from distill.config import ModelConfig, TermConfig
from distill.contracts import UserError
from distill.decision import Decision, check_decision
from distill.evaluate import feeds
from distill.export.onnx import export_onnx

KINDS = ["mean", "learned", "product", "mixture"]
TASKS = ("colour", "shape")  # of the tiny project
WEIGHTS = {"text": 3.0, "fused": 0.5}


def written_out(kind: str, logits: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """One row's probabilities, from the heads that it has."""
    scores = {name: value.double() for name, value in logits.items()}
    total = sum(weights[name] for name in scores)
    if kind == "mixture":
        return sum(weights[name] / total * value.softmax(0) for name, value in scores.items())
    if kind == "product":
        product = torch.stack([value.softmax(0) ** weights[name] for name, value in scores.items()]).prod(0)
        return product / product.sum()
    return sum(weights[name] / total * value for name, value in scores.items()).softmax(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [{}, WEIGHTS, {"fused": 0.0}, {"text": 0.0}, {"image": 0.0, "text": 0.0}])
def test_a_task_is_decided_by_the_heads_that_a_row_has(wordpiece_file, kind, weights):
    model = make_model(wordpiece_file, decision=kind, head_weights=weights).eval()
    batch = make_batch()
    batch.present["image"][:2] = False
    batch.present["text"][2:4] = False
    logits = model(batch).logits
    each = {"fused": 1.0, "image": 1.0, "text": 1.0} | weights
    for row in range(6):
        names = ["fused", *(name for name in ("image", "text") if batch.present[name][row])]
        heads = {name: logits[f"kind.{name}"][row] for name in names}
        found = logits["kind"][row].double().softmax(0)
        torch.testing.assert_close(found, written_out(kind, heads, each), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_no_modality_of_the_model_are_decided_by_the_fused_head(wordpiece_file, kind):
    model = make_model(wordpiece_file, decision=kind, head_weights={"fused": 0.0}).eval()
    batch = make_batch()
    for name in ("image", "text"):
        batch.present[name][:2] = False
    logits = model(batch).logits
    assert logits["kind"].isfinite().all()
    torch.testing.assert_close(logits["kind"][:2].softmax(1), logits["kind.fused"][:2].softmax(1))


def test_heads_without_a_say_are_in_no_exported_graph(wordpiece_file, tmp_path):
    model = make_model(wordpiece_file, head_weights={"image": 0.0, "text": 0.0}).eval()
    found = export_onnx(model, make_batch(), tmp_path / "model.onnx")
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert found["bytes"] and any("heads.kind" in name for name in names)
    assert not [name for name in names if "unimodal_heads" in name or name.startswith("decision")]


def test_heads_that_agree_are_surer_as_a_product_and_a_sure_one_carries_a_mixture():
    agreeing = {"fused": torch.tensor([[2.0, 0.0]]), "image": torch.tensor([[2.0, 0.0]])}
    split = {"fused": torch.tensor([[9.0, 0.0, 0.0]]), "image": torch.tensor([[0.0, 1.0, 0.0]])}

    def share(kind, heads, column):
        decision, present = Decision(kind, ["kind"], ["image"], {}), {"image": torch.tensor([True])}
        with torch.no_grad():
            return decision("kind", heads["fused"], {"image": heads["image"]}, present).softmax(1)[0, column].item()

    assert share("product", agreeing, 0) > share("mean", agreeing, 0) == pytest.approx(share("mixture", agreeing, 0))
    sure = {"fused": torch.tensor([[1.0, 0.0, 0.0]]), "image": torch.tensor([[-9.0, 0.0, 0.0]])}
    assert share("mixture", sure, 0) > share("mean", sure, 0)  # one veto is not enough
    assert share("mixture", split, 0) == pytest.approx((1 + 1 / (2 + torch.e)) / 2, abs=1e-3)


def test_learned_weights_begin_as_the_mean_and_learn_from_the_task_alone(wordpiece_file):
    batch = make_batch()
    mean, learned = (make_model(wordpiece_file, decision=kind, head_weights=WEIGHTS) for kind in ("mean", "learned"))
    torch.testing.assert_close(learned(batch).logits["kind"], mean(batch).logits["kind"])
    learned(batch).logits["kind.text"].sum().backward()
    assert learned.decision.scores["kind"].grad is None
    learned(batch).logits["kind"][:, 0].sum().backward()
    assert learned.decision.scores["kind"].grad.abs().min() > 0 and learned.decision.scores["tone"].grad is None


def test_the_more_a_head_is_trusted_the_nearer_is_the_decision(wordpiece_file):
    model, batch = make_model(wordpiece_file, decision="learned").eval(), make_batch()
    with torch.no_grad():
        model.decision.scores["kind"].copy_(torch.tensor([0.0, 0.0, 30.0]))
        logits = model(batch).logits
    torch.testing.assert_close(logits["kind"], logits["kind.text"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits_stay_finite(kind, dtype):
    decision, present = Decision(kind, ["kind"], ["image"], {}), {"image": torch.tensor([True, False])}
    fused = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    found = decision("kind", fused, {"image": -fused.detach()}, present)
    found.float().log_softmax(1)[:, 0].sum().backward()
    assert found.isfinite().all() and fused.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_graph_decides_the_same(wordpiece_file, tmp_path: Path, kind: str):
    model, batch = make_model(wordpiece_file, decision=kind, head_weights=WEIGHTS).eval(), make_batch()
    batch.present["image"][:2] = False
    export_onnx(model, make_batch(3), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds(batch)), strict=True))
    with torch.no_grad():
        expected = model(batch).logits
    for task in ("kind", "tone"):
        torch.testing.assert_close(torch.from_numpy(found[task]), expected[task], rtol=1e-4, atol=1e-4)


def test_learned_weights_need_a_term_that_teaches_them():
    config = ModelConfig(encoders={"image": {"type": "convnet"}}, decision="learned")
    heads = [TermConfig(loss="cross_entropy", task="kind.fused"), TermConfig(loss="kd", task="tone")]
    with pytest.raises(UserError, match=re.escape("student.objective: no term reads task 'kind' itself")):
        check_decision(config, {"student.objective": heads}, ["tone", "kind"])
    check_decision(config, {"student.objective": heads}, ["tone"])
    check_decision(config, {"teacher.objective": []}, ["kind"])  # kept as it is
    check_decision(config.model_copy(update={"decision": "mean"}), {"student.objective": heads}, ["kind"])


@pytest.mark.parametrize("kind", ["learned", "product", "mixture"])
def test_a_run_trains_prunes_and_exports_it(tmp_path, monkeypatch, kind):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    answer = distill("run", "recipe.yaml", f"teacher.decision={kind}", f"student.decision={kind}")
    assert answer.code == 0, answer.err
    for stage in ("teacher", "student", "pruned"):
        held = load_file(tmp_path / "runs/tiny" / stage / "model.safetensors")
        scores = {name: value for name, value in held.items() if name.startswith("decision.scores.")}
        assert scores.keys() == ({f"decision.scores.{task}" for task in TASKS} if kind == "learned" else set())
        assert all(value.abs().min() > 0 for value in scores.values())


def test_a_rule_for_one_head_is_refused(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = refusal(distill("validate", "recipe.yaml", "student.decision=product", "student.unimodal_heads=false"))
    assert "student.decision: there is one head a task; set student.unimodal_heads or leave it out" in said
