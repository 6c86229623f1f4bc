"""Fusion blocks: from the tokens of several modalities to one vector a row."""

from distill.fusion.concat import ConcatFusion
from distill.fusion.cross_attention import CrossAttentionFusion

FUSIONS = {"concat": ConcatFusion, "cross_attention": CrossAttentionFusion}

__all__ = ["FUSIONS", "ConcatFusion", "CrossAttentionFusion"]
