"""Token contrast: the student should be nearer to the good teacher than to the one that saw a wrong solution.

Source: unisd.md 1.6 (paper Eq. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def contrastive_hinge(student: Tensor, positive: Tensor, negative: Tensor, *, margin: float) -> Tensor:
    """max(0, margin + |s - p| - |s - n|) per token, any shape (usually [B, T]), from log-probabilities of the sampled token.

    s is the student's, p the teacher's, n the log-probability under the teacher with a wrong demonstration, all in nats at the
    same temperature. Gradient flows through s only: sign(s - p) - sign(s - n) where the hinge is active, so a token whose s
    lies below or above both receives none. fp32, or fp64 for fp64 input. Raises ValueError for shapes that differ.
    """
    if not student.shape == positive.shape == negative.shape:
        shapes = f"{tuple(student.shape)}, {tuple(positive.shape)} and {tuple(negative.shape)}"
        raise ValueError(f"student, positive and negative must have one shape, got {shapes}")
    student, positive, negative = (
        x if x.dtype == torch.float64 else x.float() for x in (student, positive.detach(), negative.detach())
    )
    return (margin + (student - positive).abs() - (student - negative).abs()).relu()
