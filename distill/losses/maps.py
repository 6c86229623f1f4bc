"""Losses on feature maps [B, C, H, W] of convolutional networks, one stage a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import UserError
from distill.losses.bounds import AtLeastOne, Count, Positive, Temperature
from distill.losses.numeric import full_precision, need_one_shape, unit


@full_precision
def at(student_map: Tensor, teacher_map: Tensor, *, p: AtLeastOne = 2) -> Tensor:
    """Attention transfer: where a stage looks (Zagoruyko & Komodakis 2017, arXiv 1612.03928).

    ``mean (q(A_s) - q(A_t))²`` over rows and positions, with ``A = mean_c |F_c|^p`` and q its division by its length.
    The authors' code takes this mean; the paper's formula is the length of the difference, and both leave the scale of
    either map out. Widths may differ, and maps of unequal size are pooled to the smaller one.

    Args:
        student_map: [B, C, H, W].
        teacher_map: [B, C', H', W']; no gradient flows into it.
        p: power, at least 1.

    Returns:
        A scalar.

    Raises:
        UserError: these are no maps, or p is less than 1, whose slope at 0 is infinite.
    """
    _need_maps("at", student_map, teacher_map)
    if p < 1:
        raise UserError(f"at needs a power p of at least 1, got {p}")
    student, teacher = of_one_size(student_map, teacher_map.detach())
    one, other = (unit(x.abs().pow(p).mean(dim=1).flatten(1)) for x in (student, teacher))
    return F.mse_loss(one, other)


@full_precision
def fsp(student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor) -> Tensor:
    """Flow of the solution procedure: how one stage's channels go with a later one's (Yim et al., CVPR 2017, without
    an arXiv number).

    ``mean_b ||G_s - G_t||²`` (squared Frobenius length) with ``G_ij = mean_xy first_i(x, y) · second_j(x, y)``: the
    paper's formula for one pair of stages. Re-implementations that average over the matrix as well are m · n times
    smaller. Of two stages the larger map is pooled to the smaller one.

    Args:
        student_first: [B, m, H, W].
        student_second: [B, n, h, w].
        teacher_first: [B, m, ., .], of the same width as the student's; no gradient flows into it.
        teacher_second: [B, n, ., .]; no gradient flows into it.

    Returns:
        A scalar.

    Raises:
        UserError: the stages of both have not the same widths.
    """
    student = _flow(student_first, student_second)
    teacher = _flow(teacher_first.detach(), teacher_second.detach())
    need_one_shape("fsp", student=student, teacher=teacher)
    return (student - teacher).square().sum(dim=(1, 2)).mean()


@full_precision
def nst(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Neuron selectivity transfer: MMD between the channels' activation patterns (Huang & Wang 2017, arXiv 1707.01219).

    ``mean_b [mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 · mean_ij k(s_i, t_j)]`` with ``k(x, y) = <x, y>²`` and the
    channels' maps ``s_i``, ``t_j`` divided by their lengths: the polynomial kernel of degree 2 without a constant. The
    teacher's own part is kept, so that equal maps give 0; leaving it out changes no gradient. Widths may differ, and
    maps of unequal size are pooled to the smaller one. A channel that is silent on a row gets no gradient there.

    Args:
        student_map: [B, C, H, W].
        teacher_map: [B, C', H', W']; no gradient flows into it.

    Returns:
        A scalar, blind to the order and the scale of channels.

    Raises:
        UserError: these are no maps.
    """
    _need_maps("nst", student_map, teacher_map)
    student, teacher = (unit(x.flatten(2)) for x in of_one_size(student_map, teacher_map.detach()))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.mT).square().mean()

    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


@full_precision
def vid(student_map: Tensor, teacher_map: Tensor, weight: Tensor, log_scale: Tensor, *, eps: Positive = 1e-5) -> Tensor:
    """Variational information distillation: how surprising the teacher is to the student (Ahn et al. 2019, arXiv
    1904.05835).

    ``mean ½ · [(t - μ)² / σ² + log σ²]`` over all elements, with ``μ = conv1x1(student)`` and a variance for each of
    the teacher's channels, ``σ² = softplus(log_scale) + eps``. The constant ½ log 2π is left out; the value may be
    negative. The authors' regressor has three such layers with ReLU between: run the others before the call. Maps of
    unequal size are pooled to the smaller one.

    Args:
        student_map: [B, C, H, W].
        teacher_map: [B, C', H', W']; no gradient flows into it.
        weight: [C', C, 1, 1], learned.
        log_scale: [C'], learned; ``log(exp(5 - eps) - 1)`` starts with the authors' variance of 5.
        eps: least variance.

    Returns:
        A scalar.
    """
    student, teacher = of_one_size(student_map, teacher_map.detach())
    variance = (F.softplus(log_scale) + eps)[:, None, None]
    return 0.5 * ((F.conv2d(student, weight) - teacher).square() / variance + variance.log()).mean()


@full_precision
def ofd(student_map: Tensor, teacher_map: Tensor, margins: Tensor) -> Tensor:
    """Overhaul of feature distillation: margin ReLU and partial L2 (Heo et al. 2019, arXiv 1904.01866).

    ``mean_b Σ (s - t)²`` over the elements with ``s > t`` or ``t > 0``, where ``t = max(teacher, margin)``: where the
    teacher is silent, a student that is more silent still is left alone. Features are those *before* ReLU, the
    student's behind a 1x1 convolution with BatchNorm. A sum over elements as in the authors' code, which then divides
    by 2 a stage away from the last and weighs with 1e-3 or 1e-4; averaging over elements makes C · H · W of it.

    Args:
        student_map: [B, C, H, W].
        teacher_map: [B, C, H', W'], pooled to the student's size if larger; no gradient flows into it.
        margins: [C] or [1, C, 1, 1], at most 0: each channel's expected value when negative. From the BatchNorm before
            the ReLU with weight σ and bias μ: ``μ - |σ| · φ(μ/σ) / Φ(-μ/|σ|)``.

    Returns:
        A scalar.

    Raises:
        UserError: the maps have not one width.
    """
    student, teacher = of_one_size(student_map, teacher_map.detach())
    need_one_shape("ofd", student=student, teacher=teacher)
    target = torch.maximum(teacher, margins.detach().to(teacher).reshape(1, -1, 1, 1))
    counted = (student > target) | (target > 0)
    return (student - target).square().masked_fill(~counted, 0.0).flatten(1).sum(dim=1).mean()


@full_precision
def hcl(student_map: Tensor, teacher_map: Tensor, *, levels: Sequence[Count] = (4, 2, 1)) -> Tensor:
    """Hierarchical context loss of ReviewKD: L2 at several resolutions (Chen et al. 2021, arXiv 2104.09044).

    ``[mse(s, t) + Σ_k 2^-k · mse(pool_k(s), pool_k(t))] / Σ of the weights``, where pool_k averages to the k-th of the
    levels that are smaller than the map. Levels that are not smaller are left out and do not halve the weight, and the
    sum is divided by its weights, both as in the authors' code.

    Args:
        student_map: [B, C, H, W], the output of a fusion (:func:`review_fusion`).
        teacher_map: the same shape; no gradient flows into it.
        levels: sides of the pooled squares.

    Returns:
        A scalar.

    Raises:
        UserError: these are no maps, or not of one shape.
    """
    _need_maps("hcl", student_map, teacher_map, alike=True)
    teacher = teacher_map.detach()
    total, weight, weights = F.mse_loss(student_map, teacher), 1.0, 1.0
    for side in (level for level in levels if level < min(teacher.shape[-2:])):
        weight /= 2
        weights += weight
        student, target = (F.adaptive_avg_pool2d(x, side) for x in (student_map, teacher))
        total = total + weight * F.mse_loss(student, target)
    return total / weights


@full_precision
def review_fusion(lateral: Tensor, residual: Tensor, attention_weight: Tensor, attention_bias: Tensor) -> Tensor:
    """Attention-based fusion of ReviewKD: a stage with what came from deeper ones (Chen et al. 2021, arXiv 2104.09044).

    ``a_1 · lateral + a_2 · up(residual)`` with ``a = sigmoid(conv1x1([lateral, up(residual)]))``, two maps of weights
    for all channels that need not add up to 1, and ``up`` by nearest neighbours. What lies around it is the caller's:
    a 1x1 convolution with BatchNorm before (the lateral), a 3x3 one behind, whose output :func:`hcl` compares; the
    residual of the next stage is the fused map, not that output.

    Args:
        lateral: [B, M, H, W].
        residual: [B, M, h, w], the fused map of the stage above.
        attention_weight: [2, 2M, 1, 1], learned.
        attention_bias: [2], learned.

    Returns:
        The fused map, [B, M, H, W].
    """
    raised = F.interpolate(residual, lateral.shape[-2:], mode="nearest")
    shares = torch.sigmoid(F.conv2d(torch.cat([lateral, raised], dim=1), attention_weight, attention_bias))
    return lateral * shares[:, :1] + raised * shares[:, 1:]


@full_precision
def cwd(student_map: Tensor, teacher_map: Tensor, *, temperature: Temperature = 4.0) -> Tensor:
    """Channel-wise distillation: KL between each channel's distributions over positions (Shu et al. 2021, arXiv
    2011.13256).

    ``T² · mean_bc KL(softmax_xy(t_bc / T) || softmax_xy(s_bc / T))``: T² / C · Σ_c as in the paper, averaged over rows.
    Softmax over channels, or a mean over positions as well, are other losses.

    Args:
        student_map: [B, C, H, W], features or the logits of a segmentation.
        teacher_map: the same shape; no gradient flows into it.
        temperature: T > 0.

    Returns:
        A scalar, blind to a constant added to a channel.

    Raises:
        UserError: these are no maps, or not of one shape.
    """
    _need_maps("cwd", student_map, teacher_map, alike=True)
    student, teacher = (F.log_softmax(x.flatten(2) / temperature, dim=-1) for x in (student_map, teacher_map.detach()))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return divergence.mean() * temperature**2


@full_precision
def mgd(
    student_map: Tensor,
    teacher_map: Tensor,
    mask: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
) -> Tensor:
    """Masked generative distillation: the teacher's map from a part of the student's (Yang et al. 2022, arXiv
    2205.01529).

    ``1/B · Σ (conv3x3(relu(conv3x3(student · mask))) - teacher)²``. A sum over elements, for which the authors' weights
    (7e-5 for classification) are made. Masks are drawn anew in each step by the caller: positions
    [B, 1, H, W] for detection and segmentation, channels [B, C, 1, 1] for classification.

    Args:
        student_map: projected to the teacher's channels, [B, C, H, W].
        teacher_map: the same shape; no gradient flows into it.
        mask: 1 where the student's map is kept and 0 where it is hidden; any shape that broadcasts to the map's.
        first_weight: [M, C, 3, 3], learned; the authors' M is C.
        first_bias: [M], learned.
        second_weight: [C, M, 3, 3], learned.
        second_bias: [C], learned.

    Returns:
        A scalar.

    Raises:
        UserError: what is compared has not one shape.
    """
    need_one_shape("mgd", student=student_map, teacher=teacher_map)
    hidden = F.relu(F.conv2d(student_map * mask, first_weight, first_bias, padding=1))
    generated = F.conv2d(hidden, second_weight, second_bias, padding=1)
    return (generated - teacher_map.detach()).square().flatten(1).sum(dim=1).mean()


def of_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Average maps [B, C, H, W] over cells, down to the smaller height and width; other tensors stay as they are."""
    if one.ndim != 4 or one.shape[2:] == other.shape[2:]:
        return one, other
    size = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)


def _need_maps(loss: str, student: Tensor, teacher: Tensor, *, alike: bool = False) -> None:
    shapes = f"{list(student.shape)} of the student and {list(teacher.shape)} of the teacher"
    if student.ndim != 4 or teacher.ndim != 4:
        raise UserError(f"{loss} reads feature maps [B, C, H, W], got {shapes}; take those of convolutions, not pooled")
    if alike and student.shape != teacher.shape:
        raise UserError(f"{loss} compares maps of one shape, got {shapes}; project or pool the student's first")


def _flow(first: Tensor, second: Tensor) -> Tensor:
    first, second = (x.flatten(2) for x in of_one_size(first, second))
    return first @ second.mT / first.shape[-1]
