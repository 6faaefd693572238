"""Each collective's value, and its gradient against one process that computes the same loss from all the pieces at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron import losses
from world import World


def pieces(size: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(size)
    return [torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(size)]


def weight(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(rank: int, group: dist.ProcessGroup | None, name: str) -> tuple[Tensor, Tensor, bool]:
    """(value, gradient of this rank's piece, whether the piece was left alone) for a loss that all ranks share."""
    size = losses.group_size(group)
    x = pieces(size)[rank if name in ("sum_over", "gather_rows", "replicated_use") else 0].requires_grad_()
    before = x.detach().clone()
    if name == "sum_over":  # nonlinear behind the sum: a local upstream gradient would show
        value = losses.sum_over(x, group)
        loss = (value.sin() * weight(2, 1)).sum()
    elif name == "enter_shards":  # each rank uses the same x against its own shard; the loss is the sum over shards
        value = losses.enter_shards(x, group)
        loss = losses.sum_over((value.sin() * weight(2, 10 + rank)).sum(), group)
    elif name == "gather_rows":  # all rows against this rank's shard
        value = losses.gather_rows(x, group)
        loss = losses.sum_over((value.sin() * weight(2 * size, 10 + rank)).sum(), group)
    else:  # all rows twice: against this rank's shard, and in a term that every rank computes alike
        value = losses.gather_rows(x, group)
        loss = losses.sum_over((value.sin() * weight(2 * size, 10 + rank)).sum(), group)
        loss = loss + (losses.replicated_use(value, group).cos() * weight(2 * size, 1)).sum()
    loss.backward()
    return value.detach(), x.grad, torch.equal(before, x.detach())


def dense(size: int, name: str) -> list[tuple[Tensor, Tensor]]:
    xs = [p.requires_grad_() for p in pieces(size)]
    if name == "sum_over":
        value = sum(xs)
        loss = (value.sin() * weight(2, 1)).sum()
    elif name == "enter_shards":
        value = xs[0]
        loss = sum((value.sin() * weight(2, 10 + r)).sum() for r in range(size))
    else:
        value = torch.cat(xs)
        loss = sum((value.sin() * weight(2 * size, 10 + r)).sum() for r in range(size))
        if name == "replicated_use":
            loss = loss + (value.cos() * weight(2 * size, 1)).sum()
    loss.backward()
    return [(value.detach(), (xs[0] if name == "enter_shards" else x).grad) for x in xs]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["sum_over", "enter_shards", "gather_rows", "replicated_use"])
def test_value_and_gradient(world: World, name: str, size: int) -> None:
    for found, expected in zip(world.run(size, gradient_of, name), dense(size, name), strict=True):
        assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-14)
        assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-13)
        assert found[2], "the argument was written into"
    if size == 1:  # not sharded: the same without any process group
        for a, b in zip(gradient_of(0, None, name)[:2], dense(1, name)[0], strict=True):
            assert torch.equal(a, b)


def without_gradient(rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    x = torch.tensor([float(rank), -float(rank)], requires_grad=True)
    counted = torch.arange(rank, dtype=torch.float32)  # rank 0 has none
    out = {
        "max": losses.max_over(x, group),
        "stack": losses.stack_over(x, group),
        "scalar": losses.stack_over(torch.tensor(rank), group),
        "concat": losses.concat_over(counted, group),
        "empty": losses.stack_over(torch.zeros(3, 0), group),
    }
    assert not any(v.requires_grad for v in out.values()) and x.tolist() == [rank, -rank]
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
def test_those_without_gradient(world: World, size: int) -> None:
    for out in world.run(size, without_gradient):
        assert out["max"].tolist() == [size - 1, 0]
        assert out["stack"].tolist() == [[r, -r] for r in range(size)]
        assert out["scalar"].tolist() == list(range(size))
        assert out["concat"].tolist() == [float(i) for r in range(size) for i in range(r)]
        assert out["empty"].shape == (size, 3, 0)


def test_none_never_means_everyone(world: World) -> None:
    """slime reduces over the world when the group is None; here a None inside a world of two changes nothing."""
    for rank, (value, concatenated) in enumerate(world.run(2, none_in_a_world)):
        assert value.tolist() == [float(rank)] and concatenated.tolist() == [float(rank)]


def none_in_a_world(rank: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    x = torch.tensor([float(rank)])
    return losses.max_over(losses.sum_over(x, None), None), losses.concat_over(losses.gather_rows(x, None), None)
