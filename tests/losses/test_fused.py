"""The fused loss equals the dense fp64 definition at every layout and chunk size, in value and in both gradients.

Tolerances relative to the largest entry: fp64 1e-12; fp32 5e-6 (the matmuls add roundings to those of the loss); bf16 see the
test. The hidden gradient is checked through `enter_shards` (replicated) and `gather_rows` (sequence parallel).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_cases as cases
import loss_oracles as oracle
from loss_oracles import Answer
from unisd_megatron.losses import (
    enter_shards,
    fused_divergence,
    fused_log_probs,
    gather_rows,
    passes,
    replicated_use,
    token_divergence,
    token_entropy,
    token_log_probs,
)
from unisd_megatron.mechanisms import feature_distance
from world import World

ALPHAS = (0.0, 0.3, 1.0)


@pytest.mark.parametrize("rows", [False, True], ids=["replicated", "sequence_parallel"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=str)
def test_equals_the_dense_definition(
    world: World, size: int, rows: bool, alpha: float, dtype: torch.dtype, tolerance: float
) -> None:
    case = cases.make(20, 44, dtype)
    found = cases.run(world, size, case, 44 // size, rows=rows, alpha=alpha, temperature=0.7, chunk_tokens=7)
    assert found.values["divergence"].dtype == dtype
    oracle.assert_equal(found, cases.expected(case, alpha, 0.7), tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 20, 1000])
def test_chunks_change_nothing(world: World, chunk_tokens: int) -> None:
    case = cases.make(20, 10, torch.float64)
    oracle.assert_equal(cases.run(world, 2, case, 5, alpha=0.3, chunk_tokens=chunk_tokens), cases.expected(case, 0.3), 1e-12)


def test_blocks_inside_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make(20, 10, torch.float64)
    monkeypatch.setattr(passes, "CPU_BLOCK_LOGITS", 25)  # three columns of 7 tokens at a time
    for alpha in ALPHAS:
        result = cases.sharded(0, None, case, 10, 0.0, False, {"alpha": alpha, "chunk_tokens": 7})
        oracle.assert_equal(cases.assemble([result], 10, False), cases.expected(case, alpha), 1e-12)


@pytest.mark.parametrize("name", oracle.UPSTREAM)
def test_each_upstream_gradient_alone(world: World, name: str) -> None:
    case = cases.make(9, 12, torch.float64)
    case |= {k: torch.zeros(9, dtype=torch.float64) for k in oracle.UPSTREAM if k != name}
    oracle.assert_equal(cases.run(world, 2, case, 6, alpha=0.3, chunk_tokens=4), cases.expected(case, 0.3), 1e-12)


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("real", "width"), [(11, 3), (5, 3), (1, 1)])
def test_padding_rows_of_the_heads_count_for_nothing(world: World, real: int, width: int, padding: float) -> None:
    for alpha in ALPHAS:
        case = cases.make(8, real, torch.float64)
        found = cases.run(world, 4, case, width, padding=padding, alpha=alpha, chunk_tokens=3)
        oracle.assert_equal(found, cases.expected(case, alpha), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bf16_loses_only_what_bf16_logits_and_gradients_lose(world: World, size: int) -> None:
    """Logits and logit gradients are rounded to bf16 (2^-9), as by any bf16 output layer; sums over chunks are fp32.

    Compared with the same rounded logits put through the (separately tested) losses in fp64, which isolates the walk.
    """
    case = cases.make(64, 96, torch.bfloat16, hidden=32, teacher=32)
    case["hidden"], case["teacher_hidden"] = case["hidden"] / 4, case["teacher_hidden"] / 4
    found = cases.run(world, size, case, 96 // size, alpha=0.3, chunk_tokens=16)
    logits = (case["hidden"] @ case["head"].t()).double().requires_grad_()
    teacher = (case["teacher_hidden"] @ case["teacher_head"].t()).double()
    values = {
        "divergence": token_divergence(logits, teacher, alpha=0.3),
        "student_log_probs": token_log_probs(logits, case["ids"]),
        "teacher_log_probs": token_log_probs(teacher, case["ids"]),
        "entropy": token_entropy(logits),
    }
    cases.weighted(values, case).backward()
    of_logits = logits.grad
    gradients = {"hidden": of_logits @ case["head"].double(), "head": of_logits.t() @ case["hidden"].double()}
    assert found.gradients["hidden"].dtype == found.gradients["head"].dtype == torch.bfloat16
    errors = oracle.compare(found, Answer({k: v.detach() for k, v in values.items()}, gradients))
    assert max(errors[k] for k in cases.VALUES) < 2e-6
    assert max(errors["d/dhidden"], errors["d/dhead"]) < 2.0**-7, errors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_student_equal_to_teacher_is_exactly_zero(world: World, size: int, alpha: float) -> None:
    case = cases.make(33, 512, torch.float32, hidden=16)
    case |= {"teacher_hidden": case["hidden"], "teacher_head": case["head"]}
    case |= {k: torch.zeros(33) for k in ("student_log_probs", "entropy")}
    found = cases.run(world, size, case, 512 // size, alpha=alpha, temperature=0.7, chunk_tokens=10)
    assert all((x == 0).all() for x in (found.values["divergence"], *found.gradients.values()))


def log_probs_of(rank: int, group: dist.ProcessGroup, case: cases.Case, width: int, rows: bool) -> tuple[Tensor, ...]:
    hidden, head, _ = cases.leaves(rank, group, case, width, math.nan, rows)
    full = gather_rows(hidden, group) if rows else enter_shards(hidden, group)
    real = case["head"].shape[0]
    out = fused_log_probs(full, head, token_ids=case["ids"], temperature=0.7, vocab_size=real, group=group, chunk_tokens=3)
    with torch.no_grad():
        silent = fused_log_probs(full, head, token_ids=case["ids"], temperature=0.7, vocab_size=real, group=group)
    assert not silent.requires_grad and torch.allclose(silent, out.detach(), rtol=1e-12)
    (out * case["student_log_probs"]).sum().backward()
    return {"student_log_probs": out.detach()}, hidden.grad, head.grad


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_log_probs_alone(world: World, size: int, rows: bool) -> None:
    case = cases.make(8, 11, torch.float64)
    results = world.run(size, log_probs_of, case, 12 // size, rows)
    case |= {k: torch.zeros(8) for k in ("divergence", "entropy")}
    oracle.assert_equal(cases.assemble(results, 11, rows), cases.expected(case, 0.0, 0.7), 1e-12)


def joint(rank: int, group: dist.ProcessGroup, case: cases.Case, width: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Fused loss and feature distance of the same gathered hidden states, as a sequence-parallel last stage computes them."""
    hidden, head, teacher_head = cases.leaves(rank, group, case, width, math.nan, True)
    full = gather_rows(hidden, group)
    out = fused_divergence(full, head, case["teacher_hidden"], teacher_head, token_ids=case["ids"], alpha=0.3, group=group)
    features = feature_distance(replicated_use(full, group), case["target"])
    (cases.weighted({k: getattr(out, k) for k in cases.VALUES}, case) + (features * case["features"]).sum()).backward()
    return {"divergence": out.divergence.detach()}, hidden.grad, head.grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_second_replicated_use_of_the_hidden_states_counts_once(world: World, size: int) -> None:
    case = cases.make(8, 12, torch.float64)
    g = torch.Generator().manual_seed(9)
    case |= {"target": torch.randn(8, 6, generator=g).double(), "features": torch.randn(8, generator=g).double()}
    want = cases.expected(case, 0.3)
    leaf = case["hidden"].clone().requires_grad_()
    (((leaf - case["target"]) ** 2).mean(-1) * case["features"]).sum().backward()
    want.gradients["hidden"] += leaf.grad
    oracle.assert_equal(cases.assemble(world.run(size, joint, case, 12 // size), 12, True), want, 1e-12)


def count(rank: int, group: dist.ProcessGroup, alpha: float, tokens: int, chunk_tokens: int) -> dict[str, list]:
    """(collective, bytes this rank contributes) of forward and backward, by wrapping torch.distributed."""
    seen: dict[str, list] = {"forward": [], "backward": []}
    phase = "forward"

    def wrap(name: str, position: int) -> Any:
        original = getattr(dist, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen[phase].append((name, args[position].numel() * args[position].element_size()))
            return original(*args, **kwargs)

        setattr(dist, name, wrapped)
        return lambda: setattr(dist, name, original)

    names = {"all_reduce": 0, "all_gather": 1, "broadcast": 0, "all_gather_into_tensor": 1, "all_gather_single": 1}
    names |= {"reduce_scatter_tensor": 1, "reduce_scatter_single": 1, "all_to_all_single": 1}
    restore = [wrap(name, position) for name, position in names.items() if hasattr(dist, name)]
    try:
        case = cases.make(tokens, 12, torch.float32)
        hidden, head, teacher_head = cases.leaves(rank, group, case, 6, 0.0, False)
        out = fused_divergence(
            hidden, head, case["teacher_hidden"], teacher_head, token_ids=case["ids"], alpha=alpha, group=group,
            chunk_tokens=chunk_tokens,
        )  # fmt: skip
        phase = "backward"
        (out.divergence + out.student_log_probs + out.entropy).sum().backward()
    finally:
        for undo in restore:
            undo()
    return seen


@pytest.mark.parametrize(("alpha", "closing"), [(0.0, 16), (1.0, 16), (0.3, 20)])
def test_collectives_and_bytes(world: World, alpha: float, closing: int) -> None:
    """Per chunk one all-gather of 16 bytes per token, one all-reduce per call, nothing in the backward."""
    for seen in world.run(2, count, alpha, 20, 8):
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        gathers = [(name, 16 * n) for n in (8, 8, 4)]
        assert seen == {"forward": [*gathers, ("all_reduce", closing * 20)], "backward": []}


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return out


def test_full_logits_are_never_held() -> None:
    tokens, columns, chunk = 96, 500, 8
    case = cases.make(tokens, columns, torch.float32)
    hidden, head, teacher_head = cases.leaves(0, None, case, columns, 0.0, False)
    saved: list[int] = []
    with _Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = fused_divergence(
            hidden, head, case["teacher_hidden"], teacher_head, token_ids=case["ids"], alpha=0.3, chunk_tokens=chunk
        )
        (out.divergence + out.student_log_probs + out.entropy).sum().backward()
    assert largest.numel <= max(chunk * columns, head.numel()) < tokens * columns / 10
    assert max(saved) <= head.numel()


def test_no_tokens_still_have_a_graph(world: World) -> None:
    """A micro-batch without kept tokens must take part in the collectives of the backward like any other."""
    for rows in (False, True):
        found = cases.run(world, 2, cases.make(0, 12, torch.float32), 6, rows=rows, alpha=0.3)
        assert all(v.shape == (0,) for v in found.values.values())
        assert found.gradients["hidden"].shape == (0, 6) and (found.gradients["head"] == 0).all()


def test_head_gradient_into_main_grad() -> None:
    """main_grad grows by the gradient; autograd sees zeros, so that a second use of the weight still counts in DDP's hook."""
    case = cases.make(20, 10, torch.bfloat16)
    hidden, head, teacher_head = cases.leaves(0, None, case, 10, 0.0, False)
    setting = {"token_ids": case["ids"], "alpha": 0.3, "chunk_tokens": 6}
    args = (hidden, head, case["teacher_hidden"], teacher_head)
    fused_divergence(*args, **setting).divergence.sum().backward()
    plain, head.grad = head.grad.clone(), None
    head.main_grad, head.grad_added_to_main_grad = torch.ones(10, 6), False
    out = fused_divergence(*args, **setting)
    (out.divergence.sum() + head[3, 2]).backward()
    assert torch.allclose(head.main_grad - 1, plain.float(), rtol=2**-7, atol=1e-5)
    assert not head.grad_added_to_main_grad and head.grad.sum() == 1 == head.grad[3, 2]
    head.grad, head.main_grad = None, torch.zeros(10, 6, dtype=torch.bfloat16)  # summed in fp32, added once
    fused_divergence(*args, **setting).divergence.sum().backward()
    assert torch.allclose(head.main_grad.float(), plain.float(), rtol=2**-7, atol=1e-5)
    head.grad, head.main_grad = None, None  # no buffer yet: autograd's own
    fused_divergence(*args, **setting).divergence.sum().backward()
    assert torch.equal(head.grad, plain)
    head.main_grad = torch.zeros(10, 6)
    del head.grad_added_to_main_grad  # a parameter outside Megatron's DDP: autograd gets nothing for the head
    before, head.grad = head.main_grad.clone(), None
    fused_divergence(*args, **setting).divergence.sum().backward()
    assert head.grad is None and torch.allclose(head.main_grad - before, plain.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_head": torch.zeros(6, 2)}, "student head has 5 vocabulary rows and teacher head 6"),
        ({"student_hidden": torch.zeros(3, 3).half(), "student_head": torch.zeros(5, 3).half()}, "are float16"),
        ({"student_head": torch.zeros(5, 4)}, "must share D and dtype"),
        ({"student_hidden": torch.zeros(3, 3, dtype=torch.float64)}, "must share D and dtype"),
        ({"token_ids": torch.zeros(4, dtype=torch.long)}, "one id per row"),
        ({"token_ids": torch.tensor([0, 1, 5])}, r"token ids must lie in 0\.\.4, got 0\.\.5"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"alpha": 2.0}, "alpha must lie"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_wrong_requests_are_one_line(change: dict[str, Any], message: str) -> None:
    request = {
        "student_hidden": torch.zeros(3, 3), "student_head": torch.zeros(5, 3), "teacher_hidden": torch.zeros(3, 2),
        "teacher_head": torch.zeros(5, 2), "token_ids": torch.zeros(3, dtype=torch.long), "alpha": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message) as caught:
        fused_divergence(**(request | change))
    assert "\n" not in str(caught.value)
