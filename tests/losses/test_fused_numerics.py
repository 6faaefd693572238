"""The fused loss against the dense fp64 closed form over every kind of distribution, temperature, shard count and chunk size.

Bounds: fp64 inputs 1e-10 relative; fp32 inputs 1e-5 (1 + |value|) on values, 1e-4 relative on gradients (2e-3 where the
distributions are peaked: there a relative error of a probability is the absolute error of its logit).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_cases as cases
import loss_oracles as oracle
from unisd_megatron.losses import fused_divergence
from world import World

TOKENS, REAL = 19, 37
KINDS = ("random", "peaked", "nearly_equal", "equal", "huge")


def kind_of_case(kind: str, dtype: torch.dtype) -> cases.Case:
    """Logits of order 1 (random), 60 (peaked), 1e4 (huge); or a teacher that is 1e-3 away from the student, or equal to it."""
    case = cases.make(TOKENS, REAL, torch.float64, hidden=8, teacher=8)
    scale = {"peaked": 20.0, "huge": 3e3}.get(kind, 0.4)
    case |= {k: (case[k] * scale) for k in ("head", "teacher_head")}
    if kind in ("nearly_equal", "equal"):
        nudge = 1e-3 if kind == "nearly_equal" else 0.0
        case |= {"teacher_hidden": case["hidden"], "teacher_head": case["head"] * (1 + nudge * case["teacher_head"])}
    return {k: v.to(dtype) if k in ("hidden", "head", "teacher_hidden", "teacher_head") else v for k, v in case.items()}


def check(found: oracle.Answer, expected: oracle.Answer, dtype: torch.dtype, kind: str) -> None:
    for name, value in found.values.items():
        want, bound = expected.values[name], 1e-10 if dtype == torch.float64 else 1e-5
        assert value.isfinite().all() and ((value - want).abs() <= bound * (1 + want.abs())).all(), name
    assert (found.values["divergence"] >= 0).all()
    if kind == "equal":
        assert (found.values["divergence"] == 0).all()
    bound = 1e-10 if dtype == torch.float64 else 2e-3 if kind in ("peaked", "huge") else 1e-4
    for name, gradient in found.gradients.items():
        assert gradient.isfinite().all() and oracle.error(gradient, expected.gradients[name]) <= bound, name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_closed_form(world: World, kind: str, dtype: torch.dtype, size: int) -> None:
    """37 columns over 2 or 4 shards leave uneven padding, full of nan; chunks of 5 and 7 do not divide 19 tokens."""
    case = kind_of_case(kind, dtype)
    for alpha in (0.0, 0.1, 0.5, 1.0):
        for temperature, chunk in ((1.0, 5), (0.7, 7)):
            found = cases.run(
                world, size, case, math.ceil(REAL / size), alpha=alpha, temperature=temperature, chunk_tokens=chunk
            )
            check(found, cases.expected(case, alpha, temperature), dtype, kind)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(alpha: float) -> None:
    """Finite differences of all three differentiable results, through both inputs, with padding and chunks."""
    case = cases.make(5, 7, torch.float64, hidden=3, teacher=4)
    hidden, head, teacher_head = cases.leaves(0, None, case, 9, 0.0, False)

    def results(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        out = fused_divergence(
            hidden, head, case["teacher_hidden"], teacher_head,
            token_ids=case["ids"], alpha=alpha, temperature=0.7, vocab_size=7, chunk_tokens=2,
        )  # fmt: skip
        return out.divergence, out.student_log_probs, out.entropy

    assert torch.autograd.gradcheck(results, (hidden, head))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_nan_in_the_hidden_states_is_seen_in_its_row_only(alpha: float, kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    case = cases.make(6, 9, torch.float32)
    case["hidden"][2, 1] = math.nan
    hidden, head, teacher_head = cases.leaves(0, None, case, 9, 0.0, False)
    teacher = case["teacher_hidden"], teacher_head
    out = fused_divergence(hidden, head, *teacher, token_ids=case["ids"], alpha=alpha, kernels=kernels)
    cases.weighted({k: getattr(out, k) for k in cases.VALUES}, case).backward()
    for rows in (out.divergence, out.student_log_probs, out.entropy, hidden.grad.sum(1)):
        assert rows.isnan().nonzero().flatten().tolist() == [2]
