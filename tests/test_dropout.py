"""Dropout that draws fewer numbers drops as torch's does."""

import pytest
import torch
from torch import nn

from distill.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1000, 999), (77, 13, 999)])
def test_it_keeps_elements_with_the_probability_and_scales_them(p, shape):
    """Within five standard deviations; values that stay are all scaled alike, so that the mean is kept."""
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    y = Dropout(p)(x)
    kept = y != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - p - kept.float().mean().item()) < 5 * deviation + 2**-17
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=2**-16 / (1 - p))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient passes where the value did


def test_elements_are_dropped_independently():
    """Neighbours that share the bits of one number, and the same element in two draws, are uncorrelated."""
    torch.manual_seed(0)
    layer = Dropout(0.5)
    first, second = (layer(torch.ones(400_000)).view(-1, 4) != 0 for _ in range(2))
    columns = torch.cat([first, second], dim=1).float().T
    off = torch.corrcoef(columns) - torch.eye(8)
    assert off.abs().max() < 5 / 100_000**0.5


def test_the_seed_decides():
    """The same seed gives the same mask, and leaves the generator at the same place."""
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append((Dropout(0.2)(torch.ones(5, 7)), torch.rand(1)))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_ends(p, expected):
    """Probability 0 keeps and 1 drops everything."""
    assert torch.equal(Dropout(p)(torch.ones(9)), torch.full((9,), expected))


def test_in_evaluation_it_is_the_identity():
    """The very tensor comes back, so a graph has no trace of it."""
    x = torch.ones(4)
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("x", [torch.ones(3, 0), torch.ones(6, dtype=torch.bfloat16), torch.ones(6).double()])
def test_other_types_and_no_elements(x):
    """Shape and type are those of the input."""
    y = Dropout(0.25)(x)
    assert y.shape == x.shape and y.dtype == x.dtype


def test_it_is_torchs_where_code_is_compiled():
    """An exported graph in training mode has torch's own operator."""
    program = torch.export.export(nn.Sequential(Dropout(0.5)).train(), (torch.ones(2, 3),))
    assert any("dropout" in str(node.target) for node in program.graph.nodes)
