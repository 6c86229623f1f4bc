"""Distillation losses: pure functions of tensors, and the objective that weighs them."""

from distill.losses.contrastive import clip_infonce
from distill.losses.features import cosine, fitnet
from distill.losses.logits import cross_entropy, dkd, kd, logit_adjusted, mse_logits

__all__ = ["clip_infonce", "cosine", "cross_entropy", "dkd", "fitnet", "kd", "logit_adjusted", "mse_logits"]
