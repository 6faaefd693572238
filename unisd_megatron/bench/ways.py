"""The divergence three ways, from hidden states to per-token values: eager, materialised, fused.

Each takes hidden states [T, H] and this rank's heads [V/t, H] and gives per-token values whose weighted sum has gradients to
the student's hidden states and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from unisd_megatron.losses import fused_divergence, token_divergence

Way = Callable[..., Tensor]


def eager(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    alpha: float,
    group: ProcessGroup | None,
    **_: object,
) -> Tensor:
    """The formula as UniSD's released trainer writes it (after TRL's generalised JSD), operation by operation.

    It knows no shards: under tensor parallelism every rank gathers all columns first, as its users would have to.
    """
    student_logits = _all_columns(hidden @ head.t(), group) / 1.0
    with torch.no_grad():
        teacher_logits = _all_columns(teacher_hidden @ teacher_head.t(), group) / 1.0
    student, teacher = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    if alpha == 0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if alpha == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mixture = torch.logsumexp(torch.stack([student + math.log1p(-alpha), teacher + math.log(alpha)]), dim=0)
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return (alpha * of_teacher + (1 - alpha) * of_student).sum(-1)


def materialized(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    alpha: float,
    group: ProcessGroup | None,
    **_: object,
) -> Tensor:
    """`token_divergence` on logits held as a whole."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_head.t()
    return token_divergence(hidden @ head.t(), teacher_logits, alpha=alpha, group=group)


def fused(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    alpha: float,
    group: ProcessGroup | None,
    token_ids: Tensor,
) -> Tensor:
    """`fused_divergence`, which also computes both log-probabilities of the sampled token and the entropy."""
    return fused_divergence(
        hidden, head, teacher_hidden, teacher_head, token_ids=token_ids, alpha=alpha, group=group
    ).divergence


WAYS: dict[str, Way] = {"eager": eager, "materialized": materialized, "fused": fused}


def _all_columns(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    return logits if group is None else _Gather.apply(logits, group)


class _Gather(torch.autograd.Function):
    """All ranks' columns; each rank's gradient is its own columns' (every rank computes the same loss)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mine = slice(dist.get_rank(group) * x.shape[1], (dist.get_rank(group) + 1) * x.shape[1])  # type: ignore[attr-defined]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, ctx.mine], None  # type: ignore[attr-defined]
