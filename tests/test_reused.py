"""Students that answer through the teacher's classifier (SimKD): what it is built of, and as a recipe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_project import make_project

from distill import pipeline
from distill.contracts import UserError
from distill.recipe import load_recipe
from distill.tasks import HEADS, LinearHead, ReusedHead, keep_classifiers, reuse_classifiers

WIDTH = 16
HEAD = "{colour: {type: reused, width: 16}, shape: {type: linear}}"
SIMKD = [
    {"loss": "simkd", "taps": {"student": "heads.colour.projector", "teacher": "fusion"}},
    {"loss": "simkd", "taps": {"student": "unimodal_heads.colour.image.projector", "teacher": "necks.image"}},
    {"loss": "simkd", "taps": {"student": "unimodal_heads.colour.text.projector", "teacher": "necks.text"}},
]
LABELS = [  # of the colour too, whose gradient reaches the classifier
    {"loss": "cross_entropy", "task": "shape"},
    {"loss": "cross_entropy", "task": "colour", "weight": 0.1},
    {"loss": "cross_entropy", "task": "colour.image", "weight": 0.1},
]
USUAL = ["teacher.members=1", "trackers=[]"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)


def recipe(*overrides, heads=HEAD, terms=(*SIMKD, *LABELS)):
    objective = f"student.objective={json.dumps(list(terms))}"
    return load_recipe("recipe.yaml", [*USUAL, f"student.heads={heads}", objective, *overrides])


def test_a_perfect_projector_gives_the_teachers_logits():
    torch.manual_seed(0)
    head, classifier = ReusedHead(6, 3, width=WIDTH), LinearHead(WIDTH, 3)
    reuse_classifiers(torch.nn.ModuleDict({"colour": head}), torch.nn.ModuleDict({"colour": classifier}))
    pooled = torch.randn(5, 6)
    features = head.projector(pooled)
    assert features.shape == (5, WIDTH)
    torch.testing.assert_close(head(pooled), classifier(features), rtol=0, atol=0)


def test_the_projector_is_a_bottleneck_that_learns_and_the_classifier_stays():
    head = ReusedHead(6, 3, width=WIDTH, reduction=4)
    shapes = [tuple(m.weight.shape) for m in head.projector.modules() if isinstance(m, torch.nn.Linear)]
    assert shapes == [(4, 6), (4, 4), (WIDTH, 4)]
    keep_classifiers(torch.nn.ModuleList([head]))
    head(torch.randn(1, 6)).sum().backward()  # a single row too
    assert head.linear.weight.grad is None and all(p.grad is not None for p in head.projector.parameters())


def test_a_reduction_that_leaves_nothing_is_refused():
    for reduction in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=f"reduction {reduction} leaves no middle of width 16; give 1 to 16"):
            HEADS["reused"](6, 3, width=WIDTH, reduction=reduction)


@pytest.mark.parametrize("until", ["pruned", pytest.param("quantize", marks=pytest.mark.slow)])
def test_student_and_pruned_student_of_a_recipe_answer_through_the_teachers_classifier(project, until):
    """The baseline, which knows no teacher, learns its own. Both bundles pass their gates, in the slow variant."""
    for stage in ("baseline", until):
        pipeline.run(recipe("student.train.epochs=3"), until=stage, quiet=True)
    runs = Path("runs/tiny")
    models = {name: load_file(runs / name / "model.safetensors") for name in ("teacher", "student", "pruned")}
    baseline, begun = (load_file(runs / name / "model.safetensors") for name in ("baseline", "inherit"))
    heads = ("heads.colour", "unimodal_heads.colour.image")
    names = [f"{head}.linear.{kind}" for head in heads for kind in ("weight", "bias")]
    for name in names:
        assert torch.equal(models["student"][name], models["teacher"][name])
        assert torch.equal(models["pruned"][name], models["teacher"][name])
        assert not torch.equal(baseline[name], models["teacher"][name])
    projector = "heads.colour.projector.0.0.weight"
    assert not torch.equal(models["student"][projector], begun[projector])
    first, *_, last = [json.loads(line) for line in (runs / "student/metrics.jsonl").read_text().splitlines()]
    for term in SIMKD:
        name = f"train/simkd/{term['taps']['student']}"
        assert last[name] < first[name]
    assert not any("objective" in name for name in models["student"])


@pytest.mark.parametrize(
    ("overrides", "heads", "message"),
    [
        ([], HEAD.replace("16", "12"), r"student\.heads\.colour\.width is 12, and the teacher's .* reads 16 numbers"),
        (["teacher.members=2"], HEAD, r"student\.heads\.colour: reused takes over one classifier, .* 2 members"),
        (["teacher.heads={shape: {type: linear}}"], HEAD, r"takes over the teacher's .*, and it has none; cho"),
        (["teacher.unimodal_heads=false"], HEAD, r"has none of 'image'; set student\.unimodal_heads to false"),
        ([f"teacher.heads={HEAD}"], HEAD, r"teacher\.heads\.colour: reused takes over the teacher's classifier; use"),
        ([], "{colour: {type: reused}}", r"student\.heads\.colour: reused needs the parameter 'width'; add it"),
    ],
)
def test_a_teacher_without_such_a_classifier_is_refused_in_a_sentence(project, overrides, heads, message):
    terms = [{"loss": "clip_fd", "embedding": "image,text"}] if "members" in str(overrides) else SIMKD
    with pytest.raises(UserError, match=message):
        pipeline.check(recipe(*overrides, heads=heads, terms=[*terms]))
