"""Projectors over pairs of shapes: the teacher's shape comes out and the student learns, or a sentence says why not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import ROWS, batch, outputs, value, without  # noqa: F401
from tiny import terms

from distill.batch_parts import take
from distill.contracts import Outputs, UserError
from distill.layouts import arranged, grid_of, layout_of, modality_of
from distill.losses.objective import Objective
from distill.losses.projectors import Mixture, Regrid, Stretch, build_projector
from distill.losses.terms import LOSSES

SIDES, WIDTHS = st.integers(1, 5), st.integers(1, 7)
VECTORS = st.tuples(WIDTHS)
MAPS = st.builds(lambda width, side: (width, side, side), WIDTHS, SIDES)
LAST = st.builds(lambda side, width: (side, side, width), SIDES, WIDTHS)
TOKENS = st.builds(lambda side, before, width: (side**2 + before, width), SIDES, st.sampled_from([0, 1, 2, 5]), WIDTHS)
SPREAD = st.one_of(MAPS, LAST, TOKENS)


def random(shape, seed=0, rows=3):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def learns(projector, shape, wanted):
    """The shape of what a projector gives, after checking that its gradient reaches the student and all its weights."""
    feature = random(shape).requires_grad_()
    found = projector(feature)
    (found * random(wanted, 1)).sum().backward()
    assert feature.grad.isfinite().all() and feature.grad.abs().sum() > 0
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in projector.parameters())
    assert projector(feature[:0]).shape == (0, *wanted)  # a rank may have no rows
    return tuple(found.shape[1:])


@settings(deadline=None)
@given(student=st.one_of(VECTORS, SPREAD), teacher=st.one_of(VECTORS, SPREAD))
def test_the_teachers_shape_comes_out_of_every_pair_of_image_features(student, teacher):
    if len(student) == 1 < len(teacher):
        with pytest.raises(UserError, match=r"term 't': no projector fits .* a vector says nothing of positions"):
            build_projector("t", random(student), random(teacher), "image")
        return
    projector = build_projector("t", random(student), random(teacher), "image")
    assert (projector is None) == (student == teacher)
    if projector is not None:
        assert learns(projector, student, teacher) == teacher


@settings(deadline=None)
@given(student=TOKENS, teacher=TOKENS, modality=st.sampled_from(["audio", "text", None]))
def test_tokens_of_other_modalities_are_sequences(student, teacher, modality):
    one, other = random(student), random(teacher)
    if student[0] != teacher[0] and modality != "audio":
        with pytest.raises(UserError, match=r"no projector fits features of shapes .*':mean'"):
            build_projector("t", one, other, modality)
    elif student != teacher:
        assert learns(build_projector("t", one, other, modality), student, teacher) == teacher


@pytest.mark.parametrize(
    ("student", "teacher", "modality", "why"),
    [
        ((4,), (4, 8), "image", "a vector says nothing of positions"),
        ((4,), (8, 3, 3), "image", "add ':mean' to the teacher's tap"),
        ((5, 8), (6, 8), "text", "use one tokenizer and max_length"),
        ((5, 8), (6, 8), None, "positions of no one modality do not go together"),
        ((8, 4, 4), (9, 8), "audio", "positions of no known grid do not go together"),
        ((8, 4, 4), (7, 8), "image", "positions of no known grid do not go together"),
        ((2, 3, 4, 4), (2, 3, 5, 5), "image", "none of vector, tokens, map and attentions"),
    ],
)
def test_what_no_projector_fits_is_refused_in_a_sentence(student, teacher, modality, why):
    with pytest.raises(UserError, match=rf"no projector fits features of shapes .*{why}.*choose taps of equal layout"):
        build_projector("t", random(student), random(teacher), modality)


def test_attentions_go_with_those_of_as_many_tokens():
    one, other, longer = (random(shape).softmax(-1) for shape in ((2, 5, 5), (4, 5, 5), (2, 9, 9)))
    assert layout_of(one, "image") == "attention" and layout_of(random((2, 5, 5)), "image") == "map"
    assert learns(build_projector("t", one, other, "image"), (2, 5, 5), (4, 5, 5)) == (4, 5, 5)
    for feature in (longer, random((5, 8)), random((8,))):
        with pytest.raises(UserError, match="attentions go with those of as many tokens alone"):
            build_projector("t", one, feature, "image")


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [(50, (7, 7, 1)), (49, (7, 7, 0)), (198, (14, 14, 2)), (261, (16, 16, 5)), (1, (1, 1, 0)), (7, None), (32, None)],
)
def test_patches_of_known_vision_transformers_are_found_behind_what_stands_before_them(tokens, grid):
    assert grid_of(random((tokens, 2)), "image") == grid
    assert grid_of(random((tokens, 2)), "text") is None


@pytest.mark.parametrize(
    ("path", "modality"),
    [
        ("encoders.image", "image"),
        ("necks.text:mean", "text"),
        ("others.0.token_necks.image.0", "image"),
        ("embedders.image", "image"),
        ("others.0.embedders.text", "text"),
        ("unimodal_heads.kind.image", "image"),
        ("unimodal_heads.kind.text.projector:mean", "text"),
        ("unimodal_heads.kind", None),
        ("fusion", None),
        ("others.0.fusion", None),
        ("others", None),
        ("encoders", None),
    ],
)
def test_a_tap_of_an_encoder_or_neck_has_its_modality(path, modality):
    assert modality_of(path) == modality


def test_a_map_becomes_tokens_row_by_row_and_back():
    maps = random((4, 3, 3))
    tokens = maps.flatten(2).mT
    projector = Regrid(maps, random((10, 4)), "image")
    with torch.no_grad():
        projector.linear.weight.copy_(torch.eye(4))
        projector.linear.bias.zero_()
        torch.testing.assert_close(projector(maps)[:, 1:], tokens)
        torch.testing.assert_close(projector(maps)[:, 0], projector.before(maps.mean(dim=(2, 3))))
    for arrangement in ("map", "last"):
        found = arranged(tokens, arrangement, "image")
        torch.testing.assert_close(found, maps if arrangement == "map" else tokens)
    last = maps.movedim(1, -1)
    torch.testing.assert_close(arranged(last, "map", "image"), maps)
    torch.testing.assert_close(arranged(last, "last", "image"), tokens)
    for feature in (maps, last, tokens):
        torch.testing.assert_close(arranged(feature, "mean", "image"), maps.mean(dim=(2, 3)))


def test_class_tokens_stay_and_patches_are_interpolated():
    given = random((5, 6))
    projector = build_projector("t", given, random((17, 6)), "image")
    assert not list(projector.parameters())
    found = projector(given)
    patches = F.interpolate(given[:, 1:].mT.unflatten(2, (2, 2)), (4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(found[:, 0], given[:, 0])
    torch.testing.assert_close(found[:, 1:], patches.flatten(2).mT)


def test_more_positions_than_the_teacher_has_are_averaged():
    given = random((3, 8, 8))
    found = build_projector("t", given, random((3, 4, 4)), "image")(given)
    torch.testing.assert_close(found, F.avg_pool2d(given, 2))
    sequence = random((6, 3))
    stretched = build_projector("t", sequence, random((3, 3)), "audio")
    assert isinstance(stretched, Stretch)
    torch.testing.assert_close(stretched(sequence), sequence.unflatten(1, (3, 2)).mean(dim=2))
    assert isinstance(build_projector("t", random((7, 3)), random((9, 3)), "image"), Mixture)


READERS = [name for name, loss in LOSSES.items() if loss.kind in ("features", "tokens", "stages", "features+head")]
SHAPES = [(6,), (16, 6), (17, 6), (8, 4, 4), (6, 8, 8), (4, 4, 6), (7, 6)]
SOFT = (2, 5, 5)


def reading(name, taps):
    """A term with a loss on taps; ``heads`` of 2 divides the widths."""
    stages = {side: [path, path] for side, path in taps.items()} if LOSSES[name].kind == "stages" else taps
    task = {"task": "kind"} if name == "srrl" else {}
    return {"loss": name, "taps": stages, **task, "params": {"heads": 2} if name == "minilm_relations" else {}}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("teacher", [*SHAPES, SOFT], ids=str)
@pytest.mark.parametrize("student", [*SHAPES, SOFT], ids=str)
def test_every_loss_on_features_takes_a_pair_of_shapes_or_refuses_it_in_a_sentence(name, student, teacher, batch):  # noqa: F811
    path = "encoders.image.tap"
    shapes = {"student": student, "teacher": teacher}
    features = {side: random(shape, rows=ROWS) for side, shape in shapes.items()}
    features = {side: tensor.softmax(-1) if shapes[side] == SOFT else tensor for side, tensor in features.items()}
    one, other = (Outputs({}, {}, {path: features[side].requires_grad_()}) for side in shapes)
    width = arranged(features["teacher"], "mean", "image").shape[1]
    try:
        objective = Objective(
            terms(reading(name, dict.fromkeys(shapes, path))), one, other, classifiers={"kind": torch.ones(3, width)}
        )
        found = objective(one, other, batch)[0]
    except UserError as error:
        assert len(str(error)) > 40 and "\n" not in str(error)
        assert student != teacher or (name, len(student)) in REFUSED_ALIKE
        return
    found.backward()
    assert found.isfinite() and features["student"].grad.isfinite().all() and features["teacher"].grad is None


NO_MAPS = ("at", "nst", "hcl", "cwd", "vid", "mgd", "ofd", "fsp", "review")
REFUSED_ALIKE = {(name, 1) for name in (*NO_MAPS, "token_mse", "minilm_relations", "attention_transfer")}
REFUSED_ALIKE |= {(name, 2) for name in (*NO_MAPS, "attention_transfer", "cckd")}  # of tokens without a grid
REFUSED_ALIKE |= {("cckd", 3)}


@pytest.mark.parametrize("name", ["at", "nst", "cwd", "hcl", "mgd", "vid", "ofd"])
def test_losses_on_maps_read_the_patches_of_a_transformer_as_a_map(name, batch):  # noqa: F811
    maps = random((6, 4, 4), 1, rows=ROWS)
    tokens = torch.cat([random((1, 6), 2, rows=ROWS), maps.flatten(2).mT], dim=1)
    student = outputs(tap=(8, 5, 5))
    found = []
    for feature in (maps, tokens):
        torch.manual_seed(0)
        teacher = Outputs({}, {}, {"encoders.image.tap": feature})
        item = {"loss": name, "taps": dict.fromkeys(("student", "teacher"), "encoders.image.tap")}
        found.append(value(item, batch, student, teacher))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["fitnet", "token_mse", "cosine", "cwd", "at"])
def test_the_parts_of_a_batch_add_up_behind_a_projector(name, batch):  # noqa: F811
    path = "encoders.image.tap"
    student, teacher = (Outputs({}, {}, {path: random(s, n, ROWS)}) for n, s in enumerate([(8, 4, 4), (10, 6)]))
    objective = Objective(terms(reading(name, dict.fromkeys(("student", "teacher"), path))), student, teacher)
    whole = without(batch, "image", 1, 4)
    total, count = objective(student, teacher, whole)[0], objective.num_rows(whole)
    summed = []
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])):
        part = [take(item, rows) for item in (student, teacher, whole)]
        summed.append(objective(*part, (objective.num_rows(part[2]) / count).tolist())[0])
    torch.testing.assert_close(sum(summed), total)


def test_cosines_of_maps_are_those_of_their_positions(batch):  # noqa: F811
    one, other = random((6, 4, 4), rows=ROWS), random((6, 4, 4), 1, rows=ROWS)
    student, teacher = (Outputs({}, {}, {"encoders.image.tap": feature}) for feature in (one, other))
    item = {"loss": "cosine", "taps": dict.fromkeys(("student", "teacher"), "encoders.image.tap")}
    torch.testing.assert_close(value(item, batch, student, teacher), 1 - F.cosine_similarity(one, other, dim=1).mean())
