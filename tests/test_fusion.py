"""Fusion blocks: any subset of modalities, masks, and what an absent modality must not do."""

import pytest
import torch

from distill.builders import build_part
from distill.config import Part
from distill.contracts import UserError
from distill.fusion import FUSIONS, CrossAttentionFusion

DIM, ROWS = 8, 5
LENGTHS = {"image": 4, "text": 6, "audio": 3}
BLOCKS = [name for name, block in FUSIONS.items() if not block.plain]


def inputs(names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = {m: torch.randn(ROWS, LENGTHS[m], DIM, generator=generator) for m in names}
    masks = {m: torch.ones(ROWS, LENGTHS[m], dtype=torch.bool) for m in names}
    pooled = {m: torch.randn(ROWS, DIM, generator=generator) for m in names}
    present = {m: torch.ones(ROWS, dtype=torch.bool) for m in names}
    return tokens, masks, pooled, present


def fusion(kind, names):
    torch.manual_seed(1)
    return FUSIONS[kind](names, DIM).eval()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("names", [["image", "text"], ["image", "text", "audio"]])
@pytest.mark.parametrize("absent", [[], ["image"], ["text"], ["image", "text"]])
def test_any_subset_gives_a_finite_vector_with_gradients_everywhere_it_should(kind, names, absent):
    block = fusion(kind, names)
    tokens, masks, pooled, present = inputs(names)
    for name in absent:
        present[name] = torch.zeros(ROWS, dtype=torch.bool)
    fused = block(tokens, masks, pooled, present)
    assert fused.shape == (ROWS, DIM) and torch.isfinite(fused).all()
    fused.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters() if parameter.grad is not None)
    if absent:
        assert all(block.missing[name].grad.abs().sum() > 0 for name in absent)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("absent", ["image", "text"])
def test_the_content_of_an_absent_modality_has_no_influence(kind, absent):
    block = fusion(kind, ["image", "text"])
    tokens, masks, pooled, present = inputs(["image", "text"])
    present[absent] = torch.tensor([False, True, False, True, True])
    before = block(tokens, masks, pooled, present)
    tokens[absent], pooled[absent] = 50 * tokens[absent].flip(0), 50 * pooled[absent].flip(0)
    after = block(tokens, masks, pooled, present)
    rows = present[absent]
    assert torch.equal(before[~rows], after[~rows])
    changed = (before[rows] - after[rows]).abs().amax(dim=1)
    assert (changed[[0, 1]] > 1e-4).all()  # rows that have it do read it


@pytest.mark.parametrize("kind", BLOCKS)
def test_an_absent_modality_differs_from_one_of_zeros(kind):
    block = fusion(kind, ["image", "text"])
    torch.nn.init.normal_(block.missing["text"])
    tokens, masks, pooled, present = inputs(["image", "text"])
    tokens["text"], pooled["text"] = torch.zeros_like(tokens["text"]), torch.zeros_like(pooled["text"])
    with_zeros = block(tokens, masks, pooled, present)
    present["text"] = torch.zeros(ROWS, dtype=torch.bool)
    assert (with_zeros - block(tokens, masks, pooled, present)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["image", "text"])
def test_padding_has_no_influence(name):
    block = fusion("cross_attention", ["image", "text"])
    tokens, masks, pooled, present = inputs(["image", "text"])
    masks[name][:, -2:] = False
    before = block(tokens, masks, pooled, present)
    tokens[name][:, -2:] = 100.0
    assert torch.equal(before, block(tokens, masks, pooled, present))
    tokens[name], masks[name] = tokens[name][:, :-2], masks[name][:, :-2]
    torch.testing.assert_close(block(tokens, masks, pooled, present), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_row_does_not_see_the_other_rows(kind):
    block = fusion(kind, ["image", "text"])
    everything = inputs(["image", "text"])
    alone = [{name: tensor[2:3] for name, tensor in part.items()} for part in everything]
    torch.testing.assert_close(block(*alone), block(*everything)[2:3], rtol=1e-5, atol=1e-6)


def test_depth_is_the_number_of_rounds():
    torch.manual_seed(0)
    for depth in (1, 3):
        block = CrossAttentionFusion(["image", "text"], DIM, depth=depth, heads=2)
        assert len(block.blocks) == depth and block(*inputs(["image", "text"])).shape == (ROWS, DIM)


@pytest.mark.parametrize(
    ("modalities", "params", "message"),
    [
        (["image"], {"dim": 8}, "at least two modalities"),
        (["image", "text"], {"dim": 10, "heads": 4}, "heads 4 does not divide dim 10"),
        (["image", "text"], {"dim": 8, "head": 2}, "no parameter 'head'; did you mean 'heads'"),
        (["image", "text"], {}, "needs the parameter 'dim'"),
    ],
)
def test_a_block_that_cannot_be_built_says_why(modalities, params, message):
    part = Part(type="cross_attention", **params)
    with pytest.raises(UserError, match=message):
        build_part(FUSIONS, part, "teacher.fusion", modalities=modalities)


def test_one_modality_alone_can_be_concatenated():
    block = fusion("concat", ["image"])
    assert block(*inputs(["image"])).shape == (ROWS, DIM)


def test_pooled_is_the_vector_of_the_only_modality_and_zero_where_it_is_absent():
    block = build_part(FUSIONS, Part(type="pooled"), "student.fusion", modalities=["image"])
    tokens, masks, pooled, present = inputs(["image"])
    present["image"] = torch.tensor([True, False, True, True, False])
    fused = block(tokens, masks, pooled, present)
    assert torch.equal(fused[present["image"]], pooled["image"][present["image"]])
    assert (fused[~present["image"]] == 0).all() and not list(block.parameters())
    with pytest.raises(UserError, match="it reads one modality, and there are image, text; use concat"):
        build_part(FUSIONS, Part(type="pooled"), "student.fusion", modalities=["image", "text"])
