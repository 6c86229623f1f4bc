"""Records: what is packed comes back, whatever the names, shapes and types."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distill.records import RECORD, describe, describe_packed, pack, unpack

NAMES = st.sampled_from(["logits.a", "logits.b", "embeddings.fused", "features.encoders.image", "z"])
SHAPES = st.lists(st.integers(1, 3), max_size=3)
TYPES = st.sampled_from([torch.float, torch.bool, torch.int64])
FLOATS = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])  # those of a store have one type


def tensor(rows: int, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (10 * torch.randn(rows, *shape, generator=generator)).to(dtype)


@given(rows=st.integers(1, 4), specs=st.dictionaries(NAMES, st.tuples(SHAPES, TYPES), min_size=1), floats=FLOATS)
def test_unpacking_undoes_packing(
    rows: int, specs: dict[str, tuple[list[int], torch.dtype]], floats: torch.dtype
) -> None:
    tensors = {
        name: tensor(rows, shape, floats if dtype == torch.float else dtype, seed=number)
        for number, (name, (shape, dtype)) in enumerate(specs.items())
    }
    described, packed = describe(tensors), pack(tensors)
    assert describe(packed) == describe_packed(described)
    assert sum(value.is_floating_point() for value in packed.values()) == (RECORD in packed)
    found = unpack(packed, described, None)
    assert list(found) == list(described) and describe(found) == described
    assert all(found[name].equal(value) for name, value in tensors.items())
    for name, value in unpack(packed, described, torch.float32).items():
        assert value.equal(tensors[name].float() if tensors[name].is_floating_point() else tensors[name])
