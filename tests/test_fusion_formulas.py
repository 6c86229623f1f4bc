"""What each fusion block computes: its formula by hand, or an identity that it must keep."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.fusion import (
    BottleneckFusion,
    ConvolutionalFusion,
    FilmFusion,
    GatedFusion,
    LowRankFusion,
    MfbFusion,
    PerceiverFusion,
    SelfAttentionFusion,
    SumFusion,
    TensorFusion,
    WeightedSumFusion,
)
from distill.fusion.base import mean_of_modalities
from distill.fusion.tensor import outer_product

NAMES = ["image", "text", "audio"]
ROWS, DIM = 4, 6


def vectors(names=NAMES, dim=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, dim, generator=generator) for name in names}


def everywhere(pooled, **absent):
    return {name: torch.full((ROWS,), absent.get(name, True)) for name in pooled}


def fuse(block, pooled, present=None):
    return block.eval()({}, {}, pooled, present or everywhere(pooled))


@given(st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None)
def test_a_sum_is_the_sum_of_what_is_there_and_equal_weights_are_its_mean(flags):
    pooled = vectors()
    there = [value for value, flag in zip(pooled.values(), flags, strict=True) if flag]
    present = {name: torch.full((ROWS,), flag) for name, flag in zip(NAMES, flags, strict=True)}
    total = sum(there, torch.zeros(ROWS, DIM))
    torch.testing.assert_close(fuse(SumFusion(NAMES, DIM), pooled, present), total)
    torch.testing.assert_close(fuse(WeightedSumFusion(NAMES, DIM), pooled, present), total / max(len(there), 1))


def test_learned_weights_add_up_to_one_over_what_is_there():
    block, pooled = WeightedSumFusion(NAMES, DIM), vectors()
    with torch.no_grad():
        block.scores.copy_(torch.tensor([0.0, math.log(3), 5.0]))
    found = fuse(block, pooled, everywhere(pooled, audio=False))
    torch.testing.assert_close(found, 0.25 * pooled["image"] + 0.75 * pooled["text"])


def test_gates_lie_between_0_and_1_and_open_gates_give_the_sum_of_values():
    block, pooled, gates = GatedFusion(NAMES, DIM), vectors(), []
    block.gates.register_forward_hook(lambda module, given, output: gates.append(output))
    fuse(block, {name: 10 * value for name, value in pooled.items()})
    assert gates[0].min() >= 0 and gates[0].max() <= 1 and gates[0].std() > 0.1
    torch.nn.init.constant_(block.gates[0].bias, 100.0)
    expected = sum(block.values[name](pooled[name]).tanh() for name in NAMES)
    torch.testing.assert_close(fuse(block, pooled), expected)


def test_two_tied_gates_are_the_unit_of_the_paper():
    names = NAMES[:2]
    block, pooled = GatedFusion(names, DIM), vectors(names)
    with torch.no_grad():  # sigmoid(-a) = 1 - sigmoid(a)
        block.gates[0].weight[DIM:], block.gates[0].bias[DIM:] = (
            -block.gates[0].weight[:DIM],
            -block.gates[0].bias[:DIM],
        )
    gate = block.gates(torch.cat(list(pooled.values()), 1))[:, :DIM]
    image, text = (block.values[name](pooled[name]).tanh() for name in names)
    torch.testing.assert_close(fuse(block, pooled), gate * image + (1 - gate) * text)


def test_film_scales_and_shifts_by_the_others_alone():
    block, pooled = FilmFusion(NAMES, DIM), vectors()
    for layer in block.conditions.values():
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(fuse(block, pooled), torch.stack(list(pooled.values())).relu().mean(0))
    block = FilmFusion(["image", "text"], 1)
    with torch.no_grad():
        block.conditions["image"].weight.copy_(torch.tensor([[2.0], [3.0]]))  # g = 2 text, b = 3 text
        block.conditions["image"].bias.zero_()
        block.conditions["text"].weight.copy_(torch.tensor([[0.0], [-100.0]]))  # shut by the image
        block.conditions["text"].bias.zero_()
    found = fuse(block, {"image": torch.full((ROWS, 1), 4.0), "text": torch.full((ROWS, 1), 5.0)})
    assert found.flatten().tolist() == [((1 + 10) * 4 + 15) / 2] * ROWS


def test_a_convolution_reads_neighbours():
    block, pooled = ConvolutionalFusion(NAMES, 2), vectors(dim=2)
    left, middle, right = block.convolution.weight.unbind(-1)
    a, b, c = pooled.values()
    places = [a @ middle.T + b @ right.T, a @ left.T + b @ middle.T + c @ right.T, b @ left.T + c @ middle.T]
    expected = torch.stack([(place + block.convolution.bias).relu() for place in places]).mean(0)
    torch.testing.assert_close(fuse(block, pooled), expected)


def test_the_outer_product_has_a_one_beside_each_vector():
    image, text, audio = (torch.randn(ROWS, width) for width in (2, 3, 4))
    one = torch.ones(ROWS, 1)
    expected = torch.einsum("bi,bj,bk->bijk", *(torch.cat([x, one], 1) for x in (image, text, audio))).flatten(1)
    torch.testing.assert_close(outer_product([image, text, audio]), expected)


def whole(name, block, pooled):
    """Tensor fusion with the weights that the factors of low-rank fusion stand for."""
    tensor = TensorFusion(list(pooled), DIM, width=DIM)
    factors = [
        torch.cat([f.weight, f.bias[:, None]], 1).unflatten(0, (block.rank, DIM)) for f in block.factors.values()
    ]
    sizes = "ijk"[: len(factors)]
    terms = ",".join(f"ro{size}" for size in sizes)
    with torch.no_grad():
        for narrow in tensor.narrow.values():
            torch.nn.init.eye_(narrow.weight)
            torch.nn.init.zeros_(narrow.bias)
        tensor.linear.weight.copy_(torch.einsum(f"{terms}->o{sizes}", *factors).flatten(1))
        tensor.linear.bias.copy_(block.bias)
    return tensor


@pytest.mark.parametrize("count", [1, 2, 3])
def test_low_rank_fusion_is_tensor_fusion_with_weights_of_low_rank(count):
    torch.manual_seed(0)
    pooled = vectors(NAMES[:count])
    block = LowRankFusion(list(pooled), DIM, rank=3)
    torch.nn.init.normal_(block.bias)
    torch.testing.assert_close(fuse(block, pooled), fuse(whole("tensor", block, pooled), pooled), rtol=1e-4, atol=1e-5)
    assert {abs(value) for factor in block.factors.values() for value in factor.bias.tolist()} == {1.0}


def test_mfb_by_hand():
    block = MfbFusion(["image", "text"], 2, factors=2)
    with torch.no_grad():
        for name, rows in (("image", [[1, 0], [0, 1], [1, 1], [0, 0]]), ("text", [[1, 0], [1, 0], [0, 2], [5, 5]])):
            block.expand[name].weight.copy_(torch.tensor(rows, dtype=torch.float))
            block.expand[name].bias.zero_()
    pooled = {"image": torch.tensor([[2.0, 1.0]] * ROWS), "text": torch.tensor([[3.0, -2.0]] * ROWS)}
    # image [2, 1, 3, 0], text [3, 3, -4, 5]: sums 6 + 3 and -12 + 0, roots 3 and -sqrt(12), length sqrt(21)
    expected = torch.tensor([[3.0, -math.sqrt(12)]] * ROWS) / math.sqrt(21)
    torch.testing.assert_close(fuse(block, pooled), expected, rtol=1e-4, atol=1e-5)


def test_mfb_of_three_is_the_mean_over_pairs():
    block, pooled = MfbFusion(NAMES, DIM), vectors()
    pairs = []
    for names in (["image", "text"], ["image", "audio"], ["text", "audio"]):
        pair = MfbFusion(names, DIM)
        pair.load_state_dict({k: v for k, v in block.state_dict().items() if k.split(".")[1] in names})
        pairs.append(fuse(pair, pooled))
        torch.testing.assert_close(pairs[-1].norm(dim=1), torch.ones(ROWS))
    torch.testing.assert_close(fuse(block, pooled), torch.stack(pairs).mean(0))


def states(names=NAMES, length=3):
    return {name: torch.randn(ROWS, 1 + length, DIM) for name in names}


def test_tokens_of_a_long_modality_count_no_more():
    short, long = torch.randn(ROWS, 2, DIM), torch.randn(ROWS, 9, DIM)
    valid = {"text": torch.ones(ROWS, 2, dtype=torch.bool), "image": torch.arange(9).expand(ROWS, -1) < 5}
    expected = (short.mean(1) + long[:, :5].mean(1)) / 2
    torch.testing.assert_close(mean_of_modalities({"text": short, "image": long}, valid), expected)


def test_self_attention_is_torch_s_transformer_layer_over_all_tokens():
    torch.manual_seed(0)
    block = SelfAttentionFusion(NAMES, DIM, heads=2).eval()
    ours, layer = block.blocks[0], torch.nn.TransformerEncoderLayer(
        DIM, 2, 2 * DIM, 0.0, "gelu", batch_first=True, norm_first=True
    ).eval()  # fmt: skip
    joined = {"in_proj_weight": [], "in_proj_bias": []}
    for part in (ours.attention.q, ours.attention.k, ours.attention.v):
        joined["in_proj_weight"].append(part.weight)
        joined["in_proj_bias"].append(part.bias)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat(joined["in_proj_weight"]))
        layer.self_attn.in_proj_bias.copy_(torch.cat(joined["in_proj_bias"]))
    for theirs, mine in (
        (layer.self_attn.out_proj, ours.attention.o),
        (layer.linear1, ours.mlp[0]),
        (layer.linear2, ours.mlp[3]),
    ):
        theirs.load_state_dict(mine.state_dict())
    given = states()
    valid = {name: torch.tensor([True, True, name != "text", True]).expand(ROWS, -1) for name in NAMES}
    merged = torch.cat([given[name] + block.embeddings[name] for name in NAMES], 1)
    mixed = layer(merged, src_key_padding_mask=~torch.cat(list(valid.values()), 1)).split(4, dim=1)
    expected = block.out(mean_of_modalities(dict(zip(NAMES, mixed, strict=True)), valid))
    torch.testing.assert_close(block.fuse(given, valid), expected, rtol=1e-4, atol=1e-5)


def test_modalities_meet_in_the_bottleneck_alone():
    torch.manual_seed(0)
    block, given = BottleneckFusion(NAMES, DIM, heads=2, num_tokens=2).eval(), states()
    valid = {name: torch.ones(ROWS, 4, dtype=torch.bool) for name in NAMES}
    seen = {}
    for name, last in block.blocks[-1].items():
        last.register_forward_hook(lambda module, given, output, name=name: seen.__setitem__(name, output))
    block.fuse(given, valid)
    before = dict(seen)
    block.fuse(given | {"text": torch.randn(ROWS, 4, DIM)}, valid)
    assert (before["image"] - seen["image"]).abs().max() > 1e-6
    for name in NAMES:  # shut: tokens of the first round read nothing of the bottleneck, nor write to it
        torch.nn.init.zeros_(block.blocks[-1][name].attention.v.weight)
    block.fuse(given, valid)
    before = dict(seen)
    block.fuse(given | {"text": torch.randn(ROWS, 4, DIM)}, valid)
    torch.testing.assert_close(before["image"], seen["image"])


def test_latents_are_what_the_cost_of_a_perceiver_depends_on():
    block, given = PerceiverFusion(NAMES, DIM, heads=2, num_latents=3, depth=2), states()
    shapes = []
    for each in block.blocks:
        each.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape)))
    block.fuse(given, {name: torch.ones(ROWS, 4, dtype=torch.bool) for name in NAMES})
    assert shapes == [(ROWS, 3, DIM)] * 2
