"""Contrastive image-text losses (CLIP, SigLIP), alone and with a teacher.

All but :func:`clip_fd` are batch-relational: rows of all ranks are gathered before the call. Row i of the images pairs
with row i of the texts. Scales are inverse temperatures, already exponentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import UserError
from distill.losses.bounds import Bias, Positive, Scale
from distill.losses.numeric import full_precision, need_one_shape, unit


@full_precision
def clip_infonce(
    student_img: Tensor, student_txt: Tensor, keys: Tensor | None = None, *, logit_scale: Scale = 20.0
) -> Tensor:
    """Symmetric InfoNCE: each image finds its text in the batch and back (Radford et al. 2021, arXiv 2103.00020).

    With ``keys`` a row has the positives P(i) = {j: rows i and j have an equal key}, itself among them, and its target
    is spread evenly over these: ``-1/B · Σ_i 1/|P(i)| · Σ_{j in P(i)} log softmax_j(scale · <x_i, y_j>)``, and the same
    for texts over images (UniCL: Yang et al. 2022, arXiv 2204.03610; SupCon's outer sum: Khosla et al. 2020, arXiv
    2004.11362). Without, two rows of one text are negatives of each other, which no embedding can tell apart.

    Args:
        student_img: L2-normalised embeddings [B, D]; row i pairs with text i.
        student_txt: L2-normalised embeddings [B, D].
        keys: int64 [B, K], K keys a row; rows are positives where any of them is equal.
        logit_scale: inverse temperature.

    Returns:
        A scalar, the mean of both directions.
    """
    return _find_each_other(logit_scale * student_img @ student_txt.T, keys)


@full_precision
def siglip(
    student_img: Tensor,
    student_txt: Tensor,
    keys: Tensor | None = None,
    *,
    logit_scale: Scale = 10.0,
    logit_bias: Bias = -10.0,
) -> Tensor:
    """Sigmoid loss: each pair of the batch is a match or none, on its own (Zhai et al. 2023, arXiv 2303.15343).

    ``-1/B · Σ_ij log sigmoid(z_ij · (scale · <x_i, y_j> + bias))`` with z = 1 on the diagonal and -1 elsewhere. Divided
    by B and not by the B² pairs. With ``keys``, z = 1 wherever two rows have an equal key.

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        keys: as in :func:`clip_infonce`.
        logit_scale: inverse temperature; the paper begins at 10.
        logit_bias: the paper begins at -10, as nearly all pairs are none.

    Returns:
        A scalar.
    """
    logits = logit_scale * student_img @ student_txt.T + logit_bias
    matches = torch.eye(len(logits)) if keys is None else _positives(keys)
    signs = 2 * matches.to(logits) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


@full_precision
def clip_relational_ce(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    *,
    student_scale: Scale = 20.0,
    teacher_scale: Scale = 50.0,
) -> Tensor:
    """Affinity mimicking: the student's image-text softmax learns the teacher's (TinyCLIP: Wu et al. 2023, arXiv
    2309.12314).

    ``½ · mean_i [-Σ_j p_ij log q_ij]`` for images over texts, plus the same for texts over images, with p the teacher's
    and q the student's softmax. Larger than :func:`clip_relational_kl` by the teacher's entropy, same gradient.

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        teacher_img: L2-normalised embeddings [B, D'] of the same rows; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D']; no gradient flows into it.
        student_scale: the student's inverse temperature.
        teacher_scale: the teacher's own; a larger one than it was trained with makes it more certain.

    Returns:
        A scalar.
    """
    return _soft_cross_entropy(
        student_scale * student_img @ student_txt.T, teacher_scale * teacher_img.detach() @ teacher_txt.detach().T
    )


@full_precision
def clip_relational_kl(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    *,
    student_scale: Scale = 20.0,
    teacher_scale: Scale = 50.0,
) -> Tensor:
    """Contrastive relational distillation of CLIP-KD, "CRD" there (Yang et al. 2024, arXiv 2307.12732).

    ``½ · mean_i KL(p_i || q_i)`` for images over texts, plus the same for texts over images, with p the teacher's and q
    the student's softmax. Text rows are a softmax of their own, not the transposed one of images. Not the CRD of Tian
    et al. (:func:`distill.losses.crd`).

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        teacher_img: L2-normalised embeddings [B, D'] of the same rows; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D']; no gradient flows into it.
        student_scale: the student's inverse temperature.
        teacher_scale: the teacher's own.

    Returns:
        A scalar.
    """
    student = student_scale * student_img @ student_txt.T
    teacher = teacher_scale * teacher_img.detach() @ teacher_txt.detach().T
    parts = [
        F.kl_div(F.log_softmax(s, dim=1), F.log_softmax(t, dim=1), reduction="batchmean", log_target=True)
        for s, t in ((student, teacher), (student.T, teacher.T))
    ]
    return torch.stack(parts).mean()


@full_precision
def siglip_relational(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    *,
    student_scale: Scale = 10.0,
    student_bias: Bias = -10.0,
    teacher_scale: Scale = 10.0,
    teacher_bias: Bias = -10.0,
) -> Tensor:
    """Sigmoid counterpart of :func:`clip_relational_ce`: the teacher says how much each pair is a match.

    ``-1/B · Σ_ij [p_ij log q_ij + (1 - p_ij) log(1 - q_ij)]`` with ``p = sigmoid(scale · <x_i, y_j> + bias)`` of the
    teacher and q of the student: :func:`siglip` (Zhai et al. 2023, arXiv 2303.15343) with soft targets, and equal to it
    for a teacher that is certain of the diagonal. A cross-entropy, so not 0 for equal models.

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        teacher_img: L2-normalised embeddings [B, D'] of the same rows; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D']; no gradient flows into it.
        student_scale: the student's inverse temperature.
        student_bias: the student's bias.
        teacher_scale: the teacher's own.
        teacher_bias: the teacher's own.

    Returns:
        A scalar.
    """
    student = student_scale * student_img @ student_txt.T + student_bias
    teacher = teacher_scale * teacher_img.detach() @ teacher_txt.detach().T + teacher_bias
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum") / len(student)


@full_precision
def clip_fd(student_img: Tensor, student_txt: Tensor, teacher_img: Tensor, teacher_txt: Tensor) -> Tensor:
    """Feature distillation of CLIP-KD (Yang et al. 2024, arXiv 2307.12732).

    ``mse(images) + mse(texts)``, each a mean over rows and dimensions: a D-th of the paper's squared distance, which is
    why the authors' weight is 2000. Row by row.

    Args:
        student_img: L2-normalised embeddings [B, D], projected to the teacher's width.
        student_txt: L2-normalised embeddings [B, D], projected to the teacher's width.
        teacher_img: L2-normalised embeddings [B, D]; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D]; no gradient flows into it.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("clip_fd", student=student_img, teacher=teacher_img)
    need_one_shape("clip_fd", student=student_txt, teacher=teacher_txt)
    return F.mse_loss(student_img, teacher_img.detach()) + F.mse_loss(student_txt, teacher_txt.detach())


@full_precision
def clip_icl(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    keys: Tensor | None = None,
    *,
    scale: Scale = 20.0,
) -> Tensor:
    """Interactive contrastive learning of CLIP-KD (Yang et al. 2024, arXiv 2307.12732).

    InfoNCE of the student's images against the teacher's texts, and of the student's texts against the teacher's
    images; the mean of both. The authors' code multiplies with the *logarithm* of the scale that it learns; here the
    scale is what cosines are multiplied with.

    Args:
        student_img: L2-normalised embeddings [B, D], projected to the teacher's width.
        student_txt: L2-normalised embeddings [B, D], projected to the teacher's width.
        teacher_img: L2-normalised embeddings [B, D]; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D]; no gradient flows into it.
        keys: as in :func:`clip_infonce`.
        scale: inverse temperature.

    Returns:
        A scalar.
    """
    from_images = scale * student_img @ teacher_txt.detach().T
    targets = _targets(from_images, keys)
    from_texts = scale * student_txt @ teacher_img.detach().T
    return (F.cross_entropy(from_images, targets) + F.cross_entropy(from_texts, targets)) / 2


@full_precision
def clip_gd(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    *,
    student_scale: Scale = 20.0,
    teacher_scale: Scale = 50.0,
) -> Tensor:
    """Gradient distillation of CLIP-KD: the contrastive loss pulls both models alike (Yang et al. 2024, arXiv
    2307.12732).

    The sum of four mean squared differences between student and teacher, of the gradients of the InfoNCE of images over
    texts with respect to images and to texts, and of that of texts over images likewise. In closed form, with P the
    softmax of ``scale · X Yᵀ``: ``scale/B · (P - I) Y`` for X, ``scale/B · (P - I)ᵀ X`` for Y. The authors' code hands
    its scale to where the temperature belongs, and so computes this with 1/scale; that explains its weight of 1e8.

    Args:
        student_img: L2-normalised embeddings [B, D], projected to the teacher's width.
        student_txt: L2-normalised embeddings [B, D], projected to the teacher's width.
        teacher_img: L2-normalised embeddings [B, D]; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D]; no gradient flows into it.
        student_scale: the student's inverse temperature.
        teacher_scale: the teacher's own.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("clip_gd", student=student_img, teacher=teacher_img)
    need_one_shape("clip_gd", student=student_txt, teacher=teacher_txt)

    def gradients(one: Tensor, other: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        wrong = F.softmax(scale * one @ other.T, dim=1) - torch.eye(len(one)).to(one)
        return scale / len(one) * wrong @ other, scale / len(one) * wrong.T @ one

    total = student_img.new_zeros(())
    target_img, target_txt = teacher_img.detach(), teacher_txt.detach()
    for student, teacher in (
        (gradients(student_img, student_txt, student_scale), gradients(target_img, target_txt, teacher_scale)),
        (gradients(student_txt, student_img, student_scale), gradients(target_txt, target_img, teacher_scale)),
    ):
        total = total + sum(F.mse_loss(own, given) for own, given in zip(student, teacher, strict=True))
    return total


@full_precision
def clip_afd(
    student_img: Tensor,
    student_txt: Tensor,
    teacher_img: Tensor,
    teacher_txt: Tensor,
    img_weight: Tensor,
    img_bias: Tensor,
    txt_weight: Tensor,
    txt_bias: Tensor,
    *,
    scale: Scale = 20.0,
) -> Tensor:
    """Augmented feature distillation of CLIP-KD: student and teacher fused, then contrasted (Yang et al. 2024, arXiv
    2307.12732).

    :func:`clip_infonce` of ``unit(W_i [s_img, t_img] + b_i)`` and ``unit(W_t [s_txt, t_txt] + b_t)``. The fusing layers
    are learned and left behind. The authors' code multiplies with the logarithm of the scale, as in :func:`clip_icl`.

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        teacher_img: L2-normalised embeddings [B, D']; no gradient flows into it.
        teacher_txt: L2-normalised embeddings [B, D']; no gradient flows into it.
        img_weight: [M, D + D'], learned; the authors' M is D.
        img_bias: [M], learned.
        txt_weight: [M, D + D'], learned.
        txt_bias: [M], learned.
        scale: inverse temperature.

    Returns:
        A scalar.
    """
    img = unit(F.linear(torch.cat([student_img, teacher_img.detach()], dim=1), img_weight, img_bias))
    txt = unit(F.linear(torch.cat([student_txt, teacher_txt.detach()], dim=1), txt_weight, txt_bias))
    return _find_each_other(scale * img @ txt.T)


@full_precision
def clip_ensemble_ce(
    student_img: Tensor,
    student_txt: Tensor,
    *teacher_pairs: Tensor,
    student_scale: Scale = 20.0,
    teacher_scales: Sequence[Positive],
) -> Tensor:
    """Affinity mimicking of several teachers: their mean :func:`clip_relational_ce` (MobileCLIP: Vasu et al. 2023,
    arXiv 2311.17049).

    The student learns the mean of the teachers' *probabilities*, each with its own scale; means of their logits, or one
    softmax of all embeddings side by side, are other targets. The paper writes a KL: less by the teachers' entropy.

    Args:
        student_img: L2-normalised embeddings [B, D].
        student_txt: L2-normalised embeddings [B, D].
        teacher_pairs: images [B, D_k] and texts [B, D_k] of each teacher, one after the other; no gradient flows into
            them.
        student_scale: the student's inverse temperature.
        teacher_scales: each teacher's own.

    Returns:
        A scalar.

    Raises:
        UserError: there is not one scale for each pair.
    """
    if not teacher_scales or len(teacher_pairs) != 2 * len(teacher_scales):
        raise UserError(
            f"clip_ensemble_ce needs images and texts of each teacher and a scale for it, got {len(teacher_pairs)} "
            f"tensors and {len(teacher_scales)} scales"
        )
    student = student_scale * student_img @ student_txt.T
    each = [
        _soft_cross_entropy(student, scale * img.detach() @ txt.detach().T)
        for img, txt, scale in zip(teacher_pairs[::2], teacher_pairs[1::2], teacher_scales, strict=True)
    ]
    return torch.stack(each).mean()


def _find_each_other(logits: Tensor, keys: Tensor | None = None) -> Tensor:
    """Cross-entropy of rows and of columns with the diagonal, or with the positives, averaged."""
    targets = _targets(logits, keys)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _targets(logits: Tensor, keys: Tensor | None) -> Tensor:
    """What a cross-entropy of rows [B, B] aims at: the diagonal, or an even share for each positive."""
    if keys is None:
        return torch.arange(len(logits), device=logits.device)
    matches = _positives(keys).to(logits)
    return matches / matches.sum(dim=1, keepdim=True)


def _positives(keys: Tensor) -> Tensor:
    """Which rows have an equal key: int64 [B, K] to bool [B, B]."""
    return (keys[:, None] == keys[None]).any(dim=2)


def _soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of rows and of columns with the teacher's, averaged."""
    return (
        F.cross_entropy(student, F.softmax(teacher, dim=1)) + F.cross_entropy(student.T, F.softmax(teacher.T, dim=1))
    ) / 2
