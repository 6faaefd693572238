"""Clipping of what single entries of the vocabulary contribute, in value and gradient, along every path of the loss.

The oracle clamps the summands p log(p/q) of the dense definition in fp64 and leaves the gradient to autograd.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_cases as cases
import loss_oracles as oracle
import test_divergence as logits_cases
from unisd_megatron.losses import enter_shards, fused_divergence, token_divergence
from unisd_megatron.losses.collectives import ProcessGroup
from world import World

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of the -inf that interpreted kernels mask

ALPHAS = (0.0, 0.3, 1.0)
CLIP = 0.05


def clipped_share(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> float:
    """The part of the tokens with a clipped entry: a test in which none is clipped would test nothing."""
    s, t = (oracle.log_softmax(x, 1.0, None) for x in (student, teacher))
    return float((oracle.divergence(s, t, alpha, clip) < oracle.divergence(s, t, alpha) - 1e-6).double().mean())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)], ids=str)
def test_logits_equal_the_dense_definition(world: World, size: int, alpha: float, dtype: torch.dtype, tolerance: float) -> None:
    """With 41 of 44 columns real: the last shard ends in padding."""
    case = logits_cases.make(41, dtype)
    assert clipped_share(case["student"], case["teacher"], alpha, CLIP) > 0.9
    found = logits_cases.run(world, size, case, 44 // size, alpha=alpha, temperature=0.7, entry_clip=CLIP)
    upstream = {k: case[k] for k in oracle.UPSTREAM}
    inputs = case["student"], case["teacher"], case["ids"], upstream
    want = oracle.from_logits(*inputs, alpha=alpha, temperature=0.7, vocab_size=None, entry_clip=CLIP)
    oracle.assert_equal(found, want, tolerance)


def fused(rank: int, group: ProcessGroup | None, case: cases.Case, width: int, setting: dict) -> tuple:
    setting = {"vocab_size": case["head"].shape[0], "chunk_tokens": 7} | setting
    return cases.sharded(rank, group, case, width, math.nan, False, setting)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_chunks_equal_the_dense_definition(world: World, alpha: float, kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 and Arm only")
    dtype, tolerance = (torch.float64, 1e-12) if kernels == "torch" else (torch.float32, 5e-6)
    case = cases.make(9, 37, dtype)
    for size, temperature in ((1, 0.7), (2, 1.0)):
        setting = {"alpha": alpha, "temperature": temperature, "entry_clip": CLIP, "kernels": kernels}
        found = cases.assemble(world.run(size, fused, case, 38 // size, setting), 37, False)
        oracle.assert_equal(found, cases.expected(case, alpha, temperature, CLIP), tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_equals_finite_differences(alpha: float) -> None:
    case = logits_cases.make(7, torch.float64, scale=1.0)
    student = case["student"].requires_grad_()
    for clip in (0.0, 0.02, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, clip=clip: token_divergence(
                x, case["teacher"], alpha=alpha, temperature=0.7, vocab_size=6, entry_clip=clip
            ),
            student,
        )


@pytest.mark.parametrize("kernels", ["materialized", "torch", "triton"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_ceiling_that_nothing_reaches_changes_no_bit(alpha: float, kernels: str) -> None:
    case = cases.make(6, 37, torch.float32)
    found = []
    for clip in (None, math.inf, 50.0):
        hidden, head = (case[k].clone().requires_grad_() for k in ("hidden", "head"))
        teacher = case["teacher_hidden"], case["teacher_head"]
        if kernels == "materialized":
            out = token_divergence(hidden @ head.t(), teacher[0] @ teacher[1].t(), alpha=alpha, entry_clip=clip)
        else:
            setting = {"alpha": alpha, "kernels": kernels, "entry_clip": clip}
            out = fused_divergence(enter_shards(hidden, None), head, *teacher, token_ids=case["ids"], **setting).divergence
        (out * case["divergence"].float()).sum().backward()
        found.append((out.detach(), hidden.grad, head.grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_by_hand_two_entries() -> None:
    """T = (0.9, 0.1), S = (0.5, 0.5), ceiling 0.2: 0.9 log 1.8 = 0.529 is cut, 0.1 log 0.2 = -0.161 is not."""
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    out = token_divergence(student, teacher, alpha=0.0, entry_clip=0.2)
    assert out.item() == pytest.approx(0.2 + 0.1 * math.log(0.2))
    out.sum().backward()
    # only -0.1 log S_2 depends on the student: its gradient is 0.1 (S - (0, 1))
    assert student.grad[0].tolist() == pytest.approx([0.05, -0.05])


def test_a_ceiling_of_zero_leaves_what_is_negative() -> None:
    """A KL keeps its negative summands, the JSD has none and vanishes with its gradient."""
    case = logits_cases.make(20, torch.float64)
    pair = case["student"].requires_grad_(), case["teacher"]
    assert (token_divergence(*pair, alpha=0.0, entry_clip=0.0) < 0).all()
    out = token_divergence(*pair, alpha=0.4, entry_clip=0.0)
    out.sum().backward()
    assert (out == 0).all() and (pair[0].grad == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_probability_of_zero_cannot_make_a_clipped_divergence_infinite(alpha: float) -> None:
    case = logits_cases.make(8, torch.float32)
    case["student"][0, ..., :2] = case["teacher"][1, ..., 2:4] = -math.inf
    student = case["student"].requires_grad_()
    out = token_divergence(student, case["teacher"], alpha=alpha, entry_clip=CLIP)
    out.sum().backward()
    assert out.isfinite().all() and student.grad.isfinite().all()
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_a_negative_ceiling_is_refused() -> None:
    with pytest.raises(ValueError, match="entry_clip must not be negative, got -1"):
        token_divergence(torch.zeros(2, 5), torch.zeros(2, 5), alpha=0.5, entry_clip=-1.0)
