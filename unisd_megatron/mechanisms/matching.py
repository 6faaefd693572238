"""Feature matching: the student's final hidden state should resemble the teacher's. Source: unisd.md 1.7 (paper Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_distance(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Mean over the hidden dimension of (student - teacher)^2 per token: [..., D], [..., D] -> [...].

    Both are outputs after the final norm, at the positions that predict the token; no temperature. The paper's sum over the
    hidden dimension is D times this. The teacher is detached; fp32, or fp64 for fp64 input. Each rank computes it from full
    hidden states: where those come from `gather_rows` or `enter_shards`, pass them through `replicated_use` first, or the
    gradient counts once per rank. Raises ValueError for shapes that differ.
    """
    if student_hidden.shape != teacher_hidden.shape:
        shapes = f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        raise ValueError(f"student and teacher hidden states must have one shape, got {shapes}")
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student_hidden, teacher_hidden.detach()))
    return (student - teacher).square().mean(-1)
