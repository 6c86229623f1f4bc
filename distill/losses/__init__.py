"""Distillation losses: pure functions of tensors, and the objective that weighs them."""

from distill.losses.contrastive import (
    clip_afd,
    clip_ensemble_ce,
    clip_fd,
    clip_gd,
    clip_icl,
    clip_infonce,
    clip_relational_ce,
    clip_relational_kl,
    siglip,
    siglip_relational,
)
from distill.losses.features import cosine, fitnet, simkd, srrl
from distill.losses.logits import cross_entropy, dist, dkd, kd, logit_adjusted, logit_standardized_kd, mse_logits, nkd
from distill.losses.maps import at, cwd, fsp, hcl, mgd, nst, ofd, review_fusion, vid
from distill.losses.outputs import ctkd, multilabel_kd, regression_kd, reverse_gradient
from distill.losses.relations import cckd, crd, crd_constant, pkt, queue_kl, rkd, sp
from distill.losses.tokens import attention_transfer, minilm_relations, token_mse

__all__ = [
    "at",
    "attention_transfer",
    "cckd",
    "clip_afd",
    "clip_ensemble_ce",
    "clip_fd",
    "clip_gd",
    "clip_icl",
    "clip_infonce",
    "clip_relational_ce",
    "clip_relational_kl",
    "cosine",
    "crd",
    "crd_constant",
    "cross_entropy",
    "ctkd",
    "cwd",
    "dist",
    "dkd",
    "fitnet",
    "fsp",
    "hcl",
    "kd",
    "logit_adjusted",
    "logit_standardized_kd",
    "mgd",
    "minilm_relations",
    "mse_logits",
    "multilabel_kd",
    "nkd",
    "nst",
    "ofd",
    "pkt",
    "queue_kl",
    "regression_kd",
    "reverse_gradient",
    "review_fusion",
    "rkd",
    "siglip",
    "siglip_relational",
    "simkd",
    "sp",
    "srrl",
    "token_mse",
    "vid",
]
