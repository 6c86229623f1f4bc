"""Fusion blocks: from the tokens of several modalities to one vector a row."""

from distill.fusion.concat import ConcatFusion
from distill.fusion.cross_attention import CrossAttentionFusion
from distill.fusion.pooled import PooledFusion

FUSIONS: dict[str, type[ConcatFusion | CrossAttentionFusion | PooledFusion]] = {
    "concat": ConcatFusion,
    "cross_attention": CrossAttentionFusion,
    "pooled": PooledFusion,
}

__all__ = ["FUSIONS", "ConcatFusion", "CrossAttentionFusion", "PooledFusion"]
