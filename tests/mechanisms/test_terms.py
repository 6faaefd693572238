"""Contrast and feature matching: values and gradients by hand, gradients to the student only."""

from __future__ import annotations

import pytest
import torch

from unisd_megatron.mechanisms import contrastive_hinge, feature_distance


def test_hinge_by_hand() -> None:
    """margin 0.5. s below both: sign terms cancel; between: pulled to p and pushed from n; far enough: silent."""
    student = torch.tensor([-3.0, -1.5, -1.0, -1.0], requires_grad=True)
    positive = torch.tensor([-1.0, -1.0, -1.0, -1.2], requires_grad=True)
    negative = torch.tensor([-2.0, -2.0, -9.0, -1.0], requires_grad=True)
    out = contrastive_hinge(student, positive, negative, margin=0.5)
    assert out.tolist() == pytest.approx([0.5 + 2 - 1, 0.5 + 0.5 - 0.5, 0.0, 0.5 + 0.2 - 0.0])
    out.sum().backward()
    assert student.grad.tolist() == [0.0, -1.0 - 1.0, 0.0, 1.0]
    assert positive.grad is None and negative.grad is None


def test_hinge_dtype_and_shapes() -> None:
    x = torch.randn(2, 3)
    assert contrastive_hinge(x.bfloat16(), x.bfloat16(), x.bfloat16(), margin=0.1).dtype == torch.float32
    assert contrastive_hinge(x.double(), x.double(), x.double(), margin=0.1).dtype == torch.float64
    with pytest.raises(ValueError, match="must have one shape"):
        contrastive_hinge(x, x, x[:1], margin=0.1)


def test_feature_distance() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    out = feature_distance(student, teacher)
    weight = torch.randn(2, 3, generator=g, dtype=torch.float64)
    (out * weight).sum().backward()
    difference = (student - teacher).detach()
    torch.testing.assert_close(out.detach(), sum(difference[..., i] ** 2 for i in range(8)) / 8)
    torch.testing.assert_close(student.grad, weight[..., None] * 2 * difference / 8)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: feature_distance(x, teacher), student)


def test_feature_distance_of_bf16_is_taken_in_fp32() -> None:
    student, teacher = torch.full((1, 4), 256.0).bfloat16(), torch.full((1, 4), 255.0).bfloat16()
    assert feature_distance(student, teacher).item() == 1.0 and feature_distance(student, teacher).dtype == torch.float32
    with pytest.raises(ValueError, match="must have one shape"):
        feature_distance(student, teacher[:, :1])
