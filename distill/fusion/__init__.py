"""Fusion blocks: from the tokens or pooled vectors of several modalities to one vector a row.

Each works for any number of modalities that its docstring allows and any subset present in a row, and exports to one
graph that is told at run time what is present.
"""

from distill.fusion.base import TokenFusion, VectorFusion
from distill.fusion.bottleneck import BottleneckFusion
from distill.fusion.concat import ConcatFusion
from distill.fusion.convolutional import ConvolutionalFusion
from distill.fusion.cross_attention import CrossAttentionFusion
from distill.fusion.film import FilmFusion
from distill.fusion.gated import GatedFusion
from distill.fusion.mfb import MfbFusion
from distill.fusion.perceiver import PerceiverFusion
from distill.fusion.pooled import PooledFusion
from distill.fusion.self_attention import SelfAttentionFusion
from distill.fusion.sums import SumFusion, WeightedSumFusion
from distill.fusion.tensor import LowRankFusion, TensorFusion

FUSIONS: dict[str, type[VectorFusion | TokenFusion | SumFusion | PooledFusion]] = {
    "concat": ConcatFusion,
    "sum": SumFusion,
    "weighted_sum": WeightedSumFusion,
    "gated": GatedFusion,
    "film": FilmFusion,
    "convolutional": ConvolutionalFusion,
    "low_rank": LowRankFusion,
    "tensor": TensorFusion,
    "mfb": MfbFusion,
    "cross_attention": CrossAttentionFusion,
    "self_attention": SelfAttentionFusion,
    "bottleneck": BottleneckFusion,
    "perceiver": PerceiverFusion,
    "pooled": PooledFusion,
}

__all__ = [
    "FUSIONS",
    "BottleneckFusion",
    "ConcatFusion",
    "ConvolutionalFusion",
    "CrossAttentionFusion",
    "FilmFusion",
    "GatedFusion",
    "LowRankFusion",
    "MfbFusion",
    "PerceiverFusion",
    "PooledFusion",
    "SelfAttentionFusion",
    "SumFusion",
    "TensorFusion",
    "WeightedSumFusion",
]
