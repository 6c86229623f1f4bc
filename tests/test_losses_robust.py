"""What holds of every loss: half precision, tiny and huge inputs, batches of one row, rows that are all alike."""

import inspect

import pytest
import torch
from losses_table import CALLS, HELPERS, Draw, call

from distill import losses
from distill.contracts import IGNORE, UserError
from distill.losses.terms import LOSSES

HALVES = [torch.float16, torch.bfloat16]
BEYOND_HALF = 65520  # becomes infinite in float16
SITUATIONS = {
    "plain": {},
    "one row": {"rows": 1},
    "two rows": {"rows": 2},
    "two classes": {"classes": 2},
    "one row, two classes": {"rows": 1, "classes": 2},
    "rows alike": {"alike": True},
    "a student that says nothing": {"constant": 0.0},
    "a student that says one thing of ten classes": {"constant": 0.3, "classes": 10},
}


def test_every_exported_loss_and_every_one_of_recipes_is_in_the_table():
    assert set(CALLS) | HELPERS == set(losses.__all__) and not set(CALLS) & HELPERS
    assert set(LOSSES) - set(CALLS) == {"review"}  # hcl of several stages, tested with the other parts


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_value_and_gradient_are_finite_and_those_of_float32_or_refused_in_a_sentence(name, situation):
    for dtype in HALVES:
        for scale in (0.0, 1e-4, 1e-2, 1.0, 100.0, 1e4):
            where = f"{dtype}, inputs up to {scale}"
            half, single = (Draw(scale=scale, dtype=kind, **situation) for kind in (dtype, torch.float32))
            value = call(name, half)
            single = rounded(single, dtype)
            expected = call(name, single)
            assert value.dtype == torch.float32 and value.isfinite(), where
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9, msg=where)
            expected.backward()
            assert all(leaf.grad.isfinite().all() for leaf in single.student), where
            if dtype == torch.float16 and max(leaf.grad.abs().max() for leaf in single.student) >= BEYOND_HALF:
                with pytest.raises(
                    UserError, match=f"^{name}: a gradient of .* is beyond 65,504, the largest number of"
                ):
                    value.backward()
                continue
            value.backward()
            for ours, theirs in zip(half.student, single.student, strict=True):
                assert ours.grad.dtype == dtype and ours.grad.isfinite().all(), where
                torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), rtol=1e-2, atol=1e-6, msg=where)


def rounded(draw, dtype):
    """A draw in float32 of numbers that the other type can hold."""
    make = draw._leaf
    draw._leaf = lambda values, side: make(values.to(dtype), side)
    return draw


class TestGradientsBeyondFloat16:
    """Of features up to 1e4 FSP's gradients are near 1e12."""

    def value(self, scale=1e4):
        draw = Draw(scale=scale, dtype=torch.float16)
        return call("fsp", draw), draw.student

    def test_a_refused_gradient_is_the_one_that_overflows(self):
        value, leaves = self.value()
        with pytest.raises(UserError, match=r"^fsp: a gradient of .*e\+\d+ is beyond .*; give bfloat16 or float32"):
            value.backward()
        value, leaves = self.value()
        (0 * value).backward()  # nothing overflows
        assert not any(leaf.grad.any() for leaf in leaves)

    def test_a_weight_that_brings_it_into_range_is_enough(self):
        value, leaves = self.value()
        (1e-9 * value).backward()
        assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)

    def test_what_a_gradient_scaler_does_too_much_is_its_own_to_mend(self):
        value, leaves = self.value(scale=1.0)
        (1e9 * value).backward()
        assert any(leaf.grad.isinf().any() for leaf in leaves)

    def test_inside_autocast_a_scaler_is_told_by_infinity(self):
        with torch.autocast("cpu", torch.bfloat16):
            value, leaves = self.value()
        value.backward()
        assert any(leaf.grad.isinf().any() for leaf in leaves)


def test_transforms_of_torch_func_take_halves():
    student, teacher = (torch.randn(4, 3, dtype=torch.float16) for _ in range(2))
    gradients = torch.func.vmap(torch.func.grad(losses.mse_logits))(student, teacher)
    torch.testing.assert_close(gradients, (2 / 3 * (student.float() - teacher.float())).half())


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_computes_the_same_inside_autocast(name):
    """Autocast multiplies matrices in half precision, where squares of features overflow."""
    plain, inside = (Draw(scale=300.0, dtype=torch.float32) for _ in range(2))
    expected = call(name, plain)
    with torch.autocast("cpu", torch.bfloat16):
        value = call(name, inside)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"clip_ensemble_ce"}))  # whose number of tensors is free
def test_a_loss_takes_its_tensors_by_keyword(name):
    arguments, options = CALLS[name](Draw())
    loss = getattr(losses, name)
    named = dict(zip(inspect.signature(loss).parameters, arguments, strict=False)) | options
    torch.testing.assert_close(loss(**named), loss(*arguments, **options), rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_the_student_learns_and_the_teacher_does_not(name):
    draw = Draw()
    value = call(name, draw)
    assert value.dtype == torch.float64 and value.shape == () and value.requires_grad
    value.backward()
    for leaf in draw.student:
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    learning = [leaf for leaf in draw.teacher if leaf.grad is not None]
    assert len(learning) == (name == "crd")  # whose teacher stands behind a projection that learns
    assert all(leaf is draw.teacher[0] for leaf in learning)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_finite_differences(name):
    draw = Draw(rows=3, classes=3)
    arguments, named = CALLS[name](draw)
    frozen = {id(leaf) for leaf in draw.teacher} | ({id(arguments[2])} if name == "ctkd" else set())
    inputs = [value.detach() if id(value) in frozen else value for value in arguments]
    loss = getattr(losses, name)
    assert torch.autograd.gradcheck(lambda *values: loss(*values, **named), inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "nkd", "logit_standardized_kd"])
def test_one_class_is_refused_in_a_sentence(name):
    with pytest.raises(UserError, match=f"{name} compares classes .* needs logits of two or more, got 1"):
        call(name, Draw(classes=1))


@pytest.mark.parametrize("name", ["rkd", "sp", "pkt"])
def test_one_row_has_no_relations(name):
    draw = Draw(rows=1)
    value = call(name, draw)
    value.backward()
    assert value.abs() < 1e-12 and draw.student[0].grad.abs().max() < 1e-9


BROADCASTING = {
    **dict.fromkeys(("kd", "mse_logits", "dist", "multilabel_kd", "logit_standardized_kd"), ()),
    **dict.fromkeys(("fitnet", "simkd", "cosine", "srrl"), ()),
    **dict.fromkeys(("dkd", "nkd"), (torch.tensor([0, 1, 2, 0]),)),
}


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("name", BROADCASTING)
def test_shapes_that_only_broadcast_are_refused(name, shape):
    more = (torch.ones(2, 3),) if name == "srrl" else BROADCASTING[name]
    with pytest.raises(UserError, match=rf"{name} .*\[4, 3\].* and .*\[{shape[0]}, {shape[1]}\].*; give both the same"):
        getattr(losses, name)(torch.randn(4, 3), torch.randn(shape), *more)


def test_both_embeddings_of_a_pair_have_one_shape():
    own, narrow = torch.randn(4, 3), torch.randn(4, 1)
    for given in ((own, narrow), (narrow, own)):
        with pytest.raises(UserError, match="clip_fd compares number by number"):
            losses.clip_fd(own, own, *given)


@pytest.mark.parametrize("name", ["rkd", "sp", "pkt", "at", "nst"])
def test_a_teacher_of_other_rows_is_refused(name):
    shape = (3, 2, 2) if name in ("at", "nst") else (3,)
    with pytest.raises(UserError, match=f"{name} needs as many rows of student and teacher"):
        getattr(losses, name)(torch.randn(4, *shape), torch.randn(1, *shape))


@pytest.mark.parametrize("label", [-1, 3, -99])
@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_a_label_that_is_no_class_is_refused(name, label):
    labels = torch.tensor([0, IGNORE, label, 2])
    with pytest.raises(UserError, match=f"{name}: the label {label} is no class of 3 logits; give 0 to 2, or -100"):
        getattr(losses, name)(torch.randn(4, 3), torch.randn(4, 3), labels)
    with pytest.raises(UserError, match=rf"{name} reads one label a row, got labels \[1\]"):
        getattr(losses, name)(torch.randn(4, 3), torch.randn(4, 3), labels[:1])
