"""Fusion blocks: any subset of modalities, masks, and what an absent modality must not do."""

from itertools import product

import pytest
import torch

from distill.builders import build_part
from distill.contracts import UserError
from distill.data_config import Part
from distill.fusion import FUSIONS, CrossAttentionFusion

DIM, ROWS = 8, 5
LENGTHS = {"image": 4, "text": 6, "audio": 3, "series": 5}
NAMES = list(LENGTHS)
BLOCKS = [name for name, block in FUSIONS.items() if not block.plain]
SUMS = ["sum", "weighted_sum"]  # nothing stands for what is absent
STANDING_IN = [name for name in BLOCKS if name not in SUMS]
COUNTS = [2, 3, 4]
TOKENS = [name for name in BLOCKS if FUSIONS[name].reads_tokens]
PAIRED = ["film", "mfb", "cross_attention", "bottleneck"]
SIZES = {
    "tensor": "width",
    "low_rank": "rank",
    "mfb": "factors",
    "convolutional": "kernel",
    "bottleneck": "num_tokens",
    "perceiver": "num_latents",
}


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
    given = [x.requires_grad_() for x in (tokens if block.reads_tokens else pooled).values()]
    fused = block(tokens, masks, pooled, present)
    assert fused.shape == (ROWS, DIM) and torch.isfinite(fused).all()
    fused.square().sum().backward()
    gradients = [each.grad for each in (*given, *block.parameters()) if each.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if absent and kind not in SUMS:
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


@pytest.mark.parametrize("kind", STANDING_IN)
def test_an_absent_modality_differs_from_one_of_zeros(kind):
    block = fusion(kind, ["image", "text"])
    torch.nn.init.normal_(block.missing["text"])
    tokens, masks, pooled, present = inputs(["image", "text"])
    tokens["text"], pooled["text"] = torch.zeros_like(tokens["text"]), torch.zeros_like(pooled["text"])
    with_zeros = block(tokens, masks, pooled, present)
    present["text"] = torch.zeros(ROWS, dtype=torch.bool)
    assert (with_zeros - block(tokens, masks, pooled, present)).abs().max() > 1e-4


def some(rows):
    """Masks of present modalities that give every row another subset, the empty one first."""
    subsets = [dict(zip(NAMES, flags, strict=True)) for flags in product([False, True], repeat=len(NAMES))]
    return {m: torch.tensor([subset[m] for subset in subsets] * rows) for m in NAMES}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("count", COUNTS)
def test_everything_learns_when_all_is_present(kind, count):
    block = fusion(kind, NAMES[:count])
    tokens, masks, pooled, present = inputs(NAMES[:count])
    direction = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    given = {m: x.requires_grad_() for m, x in (tokens if block.reads_tokens else pooled).items()}
    (block(tokens, masks, pooled, present) * direction).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in given.values())
    unused = {name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    stand_ins = set() if block.reads_tokens or kind in SUMS else {f"missing.{m}" for m in NAMES[:count]}
    assert unused == stand_ins  # which learn in rows that lack a modality


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("garbage", [50.0, float("nan"), float("inf")])
def test_what_an_absent_modality_holds_never_shows(kind, count, garbage):
    """Row by row, for every subset; not even where it is no number, nor in gradients."""
    block, names = fusion(kind, NAMES[:count]), NAMES[:count]
    rows = 2 ** len(NAMES)
    present = {m: flags for m, flags in some(1).items() if m in names}
    generator = torch.Generator().manual_seed(4)
    tokens = {m: torch.randn(rows, LENGTHS[m], DIM, generator=generator) for m in names}
    masks = {m: torch.rand(rows, LENGTHS[m], generator=generator) < 0.7 for m in names}
    pooled = {m: torch.randn(rows, DIM, generator=generator) for m in names}
    expected = block(tokens, masks, pooled, present)
    assert torch.isfinite(expected).all()
    tokens = {m: torch.where((masks[m] & present[m][:, None])[..., None], x, garbage) for m, x in tokens.items()}
    pooled = {m: torch.where(present[m][:, None], x, garbage) for m, x in pooled.items()}
    given = {m: x.requires_grad_() for m, x in (tokens if block.reads_tokens else pooled).items()}
    found = block(tokens, masks, pooled, present)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters() if p.grad is not None)
    assert all((x.grad[~present[m]] == 0).all() for m, x in given.items())


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(kind, count, dtype):
    block, names = fusion(kind, NAMES[:count]), NAMES[:count]
    tokens, masks, pooled, present = inputs(names)
    present["image"] = torch.tensor([True, False, True, False, False])
    present["text"] = torch.tensor([True, True, False, False, False])
    with torch.autocast("cpu", dtype=dtype):
        found = block(
            {m: x.to(dtype) for m, x in tokens.items()}, masks, {m: x.to(dtype) for m, x in pooled.items()}, present
        )
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.float(), block(tokens, masks, pooled, present), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", ["image", "text"])
def test_padding_has_no_influence(kind, name):
    block = fusion(kind, ["image", "text"])
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


@pytest.mark.parametrize("kind", BLOCKS)
def test_permuting_rows_permutes_results(kind):
    block, everything = fusion(kind, NAMES), inputs(NAMES)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = [{name: tensor[order] for name, tensor in part.items()} for part in everything]
    torch.testing.assert_close(block(*moved), block(*everything)[order], rtol=1e-5, atol=1e-6)


def test_depth_is_the_number_of_rounds():
    torch.manual_seed(0)
    for depth in (1, 3):
        block = CrossAttentionFusion(["image", "text"], DIM, depth=depth, heads=2)
        assert len(block.blocks) == depth and block(*inputs(["image", "text"])).shape == (ROWS, DIM)


BOTH = ["image", "text"]


@pytest.mark.parametrize(
    ("kind", "modalities", "params", "message"),
    [
        *((kind, ["image"], {"dim": 8}, "at least two modalities, got image; use concat") for kind in PAIRED),
        *((kind, BOTH, {"dim": 10, "heads": 4}, "heads 4 does not divide dim 10") for kind in TOKENS),
        *((kind, BOTH, {"dim": 8, "heads": 0}, "heads 0 does not divide dim 8") for kind in TOKENS),
        *((kind, BOTH, {"dim": 8, "depth": 0}, "depth is 0, expected at least") for kind in TOKENS),
        *((kind, BOTH, {"dim": 0}, "dim is 0, expected at least 1") for kind in BLOCKS),
        *((kind, BOTH, {"dim": 8, name: 0}, f"{name} is 0, expected at least 1") for kind, name in SIZES.items()),
        ("bottleneck", BOTH, {"dim": 8, "depth": 1}, "depth is 1, expected at least 2, as shared tokens"),
        ("convolutional", BOTH, {"dim": 8, "kernel": 2}, "kernel is 2, expected an odd number"),
        (
            "tensor",
            NAMES,
            {"dim": 8, "width": 16},
            "product of 4 modalities of width 16 and a one has 83,521 entries, more than 65,536; lower width",
        ),
        ("cross_attention", BOTH, {"dim": 8, "head": 2}, "no parameter 'head'; did you mean 'heads'"),
        ("cross_attention", BOTH, {}, "needs the parameter 'dim'"),
    ],
)
def test_a_block_that_cannot_be_built_says_why(kind, modalities, params, message):
    part = Part(type=kind, **params)
    with pytest.raises(UserError, match=message):
        build_part(FUSIONS, part, "teacher.fusion", modalities=modalities)


@pytest.mark.parametrize(("count", "width"), [(2, 255), (3, 39), (4, 15)])
def test_the_widest_tensor_fusion_that_may_be(count, width):
    assert FUSIONS["tensor"](NAMES[:count], 1, width=width).linear.in_features <= 2**16
    with pytest.raises(ValueError, match="more than 65,536"):
        FUSIONS["tensor"](NAMES[:count], 1, width=width + 1)


@pytest.mark.parametrize("kind", [name for name in BLOCKS if name not in PAIRED])
def test_one_modality_alone_is_enough_for_the_others(kind):
    block = fusion(kind, ["image"])
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
