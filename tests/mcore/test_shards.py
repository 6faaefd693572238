"""The EMA in fp32 pieces: exact, 1/DP of the memory, and whole again bit for bit when gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Axis
from unisd_megatron.mcore.shards import WeightShards
from world import World

SHAPES = {"a": (33, 7), "b": (5,), "c": (64, 3), "d": (1,)}  # 429 weights: neither even nor a multiple of any bucket


def some_weights(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def axis_of(rank: int, group: Any) -> Axis:
    return Axis(rank, group.size(), group if group.size() > 1 else None)


def thousand_updates(rank: int, group: Any, beta: float) -> tuple[float, float, float]:
    """The student drifts by 1.5 % of itself in 1,000 steps, in bf16. Worst relative error of the pieces, and the shares of
    the way that the pieces and an average kept in bf16 have fallen short of the closed form in fp64."""
    start = some_weights(0)
    direction = some_weights(1, torch.float64)
    shards = WeightShards(start.items(), axis_of(rank, group), dtype=torch.float32, bucket=100)
    in_bf16 = {name: value.clone() for name, value in start.items()}
    exact = {name: value.double() for name, value in start.items()}
    for step in range(1, 1001):
        student = {
            name: (value.double() * (1 + 1.5e-5 * step * direction[name].sign())).bfloat16() for name, value in start.items()
        }
        shards.mix_(student.items(), beta)
        for name, value in student.items():
            exact[name] = beta * exact[name] + (1 - beta) * value.double()
            in_bf16[name].mul_(beta).add_(value, alpha=1 - beta)
    gathered = {name: torch.empty(shape, dtype=torch.float32) for name, shape in SHAPES.items()}
    shards.write_(gathered.items())

    def row(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([value.double().flatten() for value in values.values()])

    way = (row(exact) - row(start)).norm()
    worst = ((row(gathered) - row(exact)) / row(exact)).abs().max()
    return (
        float(worst),
        float((row(gathered) - row(exact)).norm() / way),
        float((row(in_bf16) - row(exact)).norm() / way),
    )


@pytest.mark.parametrize(("size", "beta"), [(1, 0.9), (3, 0.99)])
def test_a_thousand_updates_equal_the_closed_form_where_bf16_stands_still(world: World, size: int, beta: float) -> None:
    for worst, short, short_in_bf16 in world.run(size, thousand_updates, beta):
        print(f"fp32 pieces: {worst:.1e} relative, {short:.1e} of the way; bf16: {short_in_bf16:.2f} of the way")
        assert worst <= 1e-6 and short <= 1e-4
        assert short_in_bf16 > 0.5


def taken_and_given_back(rank: int, group: Any, dtype: torch.dtype, bucket: int) -> tuple[bool, int, int]:
    """Whether the weights come back bit for bit after others stood in their place; bytes held; pieces of the row."""
    weights = some_weights(2, dtype)
    shards = WeightShards(weights.items(), axis_of(rank, group), bucket=bucket)
    before = {name: value.clone() for name, value in weights.items()}
    for value in weights.values():
        value.zero_()
    shards.write_(weights.items())
    host = shards.to_host()
    same = all(torch.equal(weights[name], value) and weights[name].dtype == value.dtype for name, value in before.items())
    same &= all(value.is_meta if rank else torch.equal(value, before[name]) for name, value in host.items())
    total = sum(value.numel() for value in weights.values())
    return same, shards.values.untyped_storage().nbytes(), -(-total // bucket)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bucket", [10, 100, 2**25])
def test_whole_again_bit_for_bit_in_a_share_of_the_memory(world: World, size: int, bucket: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for same, held, buckets in world.run(size, taken_and_given_back, dtype, bucket):
            assert same
            assert 429 <= held / dtype.itemsize * size < 429 + buckets * size  # less than DP of padding per bucket


def test_narrower_weights_beside_wider_ones_come_back_exactly() -> None:
    mixed = some_weights(3) | {"c": torch.randn(64, 3)}
    shards = WeightShards(mixed.items(), Axis())
    back = {name: torch.zeros_like(value) for name, value in mixed.items()}
    shards.write_(back.items())
    assert shards.values.dtype == torch.float32
    assert all(torch.equal(back[name], value) for name, value in mixed.items())


@pytest.mark.parametrize(
    "change", [{"a": torch.zeros(33, 8)}, {"e": torch.zeros(2)}, {"b": None}], ids=["shape", "one more", "one less"]
)
def test_other_weights_are_refused_and_change_nothing(change: dict[str, Tensor | None]) -> None:
    shards = WeightShards(some_weights(4).items(), Axis(), dtype=torch.float32)
    before = shards.values.clone()
    other = {name: value for name, value in {**some_weights(5), **change}.items() if value is not None}
    for operation in (lambda: shards.mix_(other.items(), 0.5), lambda: shards.take(other.items())):
        with pytest.raises(CheckFailed, match="student and teacher do not match"):
            operation()
    assert torch.equal(shards.values, before)
