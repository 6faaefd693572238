"""The comparison that passes for the real losses must fail for the mistakes this field ships.

Each broken variant below returns the right loss value wherever the original mistake did, so only the gradient comparison sees
it. Same inputs, same oracle, same `assert_equal`, same tolerance as in test_divergence.py and test_fused.py; two ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fused_cases as cases
import loss_oracles as oracle
from loss_oracles import Answer
from unisd_megatron.losses import enter_shards, fused_divergence, gather_rows, replicated_use, sum_over, token_divergence
from unisd_megatron.mechanisms import feature_distance
from world import World

SIZE, WIDTH, TOLERANCE = 2, 6, 1e-12
Pieces = tuple[dict[str, Tensor], Tensor]


def real_divergence(student: Tensor, teacher: Tensor, group: dist.ProcessGroup, real: int) -> Tensor:
    return token_divergence(student, teacher, alpha=0.0, vocab_size=real, group=group)


def autograd_through_sum_over(student: Tensor, teacher: Tensor, group: dist.ProcessGroup, real: int) -> Tensor:
    """Composed by autograd from the right collectives: right too, up to the padding it does not know (there is none here).

    The softmax sum is *used per shard* behind the reduction, so its upstream gradients are partial: `enter_shards`.
    """

    def log_softmax(z: Tensor) -> Tensor:
        total = sum_over(z.exp().sum(-1, keepdim=True), group)
        return z - enter_shards(total, group).log()

    s, t = log_softmax(student), log_softmax(teacher)
    return sum_over((t.exp() * (t - s)).sum(-1), group)


def plain_all_reduce(student: Tensor, teacher: Tensor, group: dist.ProcessGroup, real: int) -> Tensor:
    """ms-swift's mistake: c10d's in-place all_reduce inside the graph, which autograd does not see."""

    def log_softmax(z: Tensor) -> Tensor:
        total = z.exp().sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        return z - total.log()

    s, t = log_softmax(student), log_softmax(teacher)
    divergence = (t.exp() * (t - s)).sum(-1)
    dist.all_reduce(divergence, group=group)
    return divergence


def missing_partial_sum(student: Tensor, teacher: Tensor, group: dist.ProcessGroup, real: int) -> Tensor:
    """Right reductions forward, but the per-shard use of the softmax sum is not reduced backward."""

    def log_softmax(z: Tensor) -> Tensor:
        return z - sum_over(z.exp().sum(-1, keepdim=True), group).log()

    s, t = log_softmax(student), log_softmax(teacher)
    return sum_over((t.exp() * (t - s)).sum(-1), group)


def padding_that_counts(student: Tensor, teacher: Tensor, group: dist.ProcessGroup, real: int) -> Tensor:
    """Liger's mistake: padding columns take part."""
    return token_divergence(student, teacher, alpha=0.0, group=group)


def of_logits(rank: int, group: dist.ProcessGroup, variant: Callable[..., Tensor], case: cases.Case) -> Pieces:
    student, teacher = (oracle.cut(case[k], rank, SIZE, WIDTH, 0.0) for k in ("student", "teacher"))
    student.requires_grad_()
    value = variant(student, teacher, group, case["student"].shape[-1])
    (value * case["divergence"]).sum().backward()
    return {"divergence": value.detach()}, student.grad


def logits_answer(world: World, variant: Callable[..., Tensor], real: int) -> tuple[Answer, Answer]:
    """(found, expected) for logits of `real` columns, zero-padded to two shards of six."""
    g = torch.Generator().manual_seed(3)
    case = {k: torch.randn(7, real, generator=g, dtype=torch.float64) for k in ("student", "teacher")}
    case["divergence"] = torch.randn(7, generator=g, dtype=torch.float64)
    results = world.run(SIZE, of_logits, variant, case)
    found = Answer(results[0][0], {"logits": torch.cat([r[1] for r in results], -1)[..., :real]})
    upstream, ids = {"divergence": case["divergence"]}, torch.zeros(7, dtype=torch.long)
    want = oracle.from_logits(case["student"], case["teacher"], ids, upstream, alpha=0.0, temperature=1.0, vocab_size=None)
    return found, want


@pytest.mark.parametrize(("variant", "real"), [(real_divergence, 12), (real_divergence, 10), (autograd_through_sum_over, 12)])
def test_right_ones_pass(world: World, variant: Callable[..., Tensor], real: int) -> None:
    oracle.assert_equal(*logits_answer(world, variant, real), TOLERANCE)


@pytest.mark.parametrize("variant", [plain_all_reduce, missing_partial_sum])
def test_a_missing_gradient_reduction_is_caught(world: World, variant: Callable[..., Tensor]) -> None:
    found, want = logits_answer(world, variant, 12)
    errors = oracle.compare(found, want)
    assert errors["divergence"] < TOLERANCE and errors["d/dlogits"] > 0.1, "the loss is right, which is why nobody notices"
    with pytest.raises(AssertionError, match="d/dlogits"):
        oracle.assert_equal(found, want, TOLERANCE)


def test_a_zero_padded_vocabulary_is_caught(world: World) -> None:
    found, want = logits_answer(world, padding_that_counts, 10)
    with pytest.raises(AssertionError, match="divergence"):
        oracle.assert_equal(found, want, TOLERANCE)


def right(hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    full = gather_rows(hidden, group)
    return full, replicated_use(full, group)


def reduced_twice(hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sequence parallelism with a head that all-reduces its input gradient although the gather reduce-scatters it."""
    full = gather_rows(hidden, group)
    return enter_shards(full, group), replicated_use(full, group)


def replicated_use_forgotten(hidden: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The feature distance, which every rank computes alike, counts once per rank."""
    full = gather_rows(hidden, group)
    return full, full


def of_hidden(rank: int, group: dist.ProcessGroup, variant: Callable[..., tuple[Tensor, Tensor]], case: cases.Case) -> tuple:
    hidden, head, teacher_head = cases.leaves(rank, group, case, WIDTH, math.nan, True)
    for_head, for_features = variant(hidden, group)
    out = fused_divergence(for_head, head, case["teacher_hidden"], teacher_head, token_ids=case["ids"], alpha=0.3, group=group)
    features = feature_distance(for_features, case["target"])
    (cases.weighted({k: getattr(out, k) for k in cases.VALUES}, case) + features.sum()).backward()
    return {k: getattr(out, k).detach() for k in cases.VALUES}, hidden.grad, head.grad


@pytest.mark.parametrize(("variant", "caught"), [(right, False), (reduced_twice, True), (replicated_use_forgotten, True)])
def test_a_doubled_reduction_under_sequence_parallelism_is_caught(
    world: World, variant: Callable[..., tuple[Tensor, Tensor]], caught: bool
) -> None:
    case = cases.make(8, SIZE * WIDTH, torch.float64)
    case["target"] = torch.randn(8, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    want = cases.expected(case, 0.3)
    want.gradients["hidden"] += 2 * (case["hidden"] - case["target"]) / 6
    found = cases.assemble(world.run(SIZE, of_hidden, variant, case), SIZE * WIDTH, True)
    errors = oracle.compare(found, want)
    assert (errors.pop("d/dhidden") > 0.1) == caught
    assert max(errors.values()) < TOLERANCE, "values and the head's gradient do not show the mistake"
    if caught:
        with pytest.raises(AssertionError, match="d/dhidden"):
            oracle.assert_equal(found, want, TOLERANCE)
    else:
        oracle.assert_equal(found, want, TOLERANCE)
