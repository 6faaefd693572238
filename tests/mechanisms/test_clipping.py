"""A clipped token keeps the ceiling's value and no gradient; a quantile is that of all kept tokens, wherever they live."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.mechanisms import clip_divergence, masked_quantile
from world import World

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
VALUES = torch.tensor([[0.5, 2.0, 1.0, 99.0], [4.0, 3.0, 77.0, 55.0]])


def clipped(values: Tensor, **setting: object) -> tuple[Tensor, Tensor]:
    leaf = values.clone().requires_grad_()
    out = clip_divergence(leaf, MASK, **setting)
    out.sum().backward()
    return out.detach(), leaf.grad


def test_static_ceiling() -> None:
    out, gradient = clipped(VALUES, ceiling=2.0)
    assert out.tolist() == [[0.5, 2.0, 1.0, 2.0], [2.0, 2.0, 2.0, 2.0]]
    assert gradient.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]  # the token at 2.0 exactly is not clipped: a whole gradient


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.75, 0.9, 1.0])
def test_quantile_is_torchs_over_the_kept_tokens(q: float) -> None:
    cap = torch.quantile(VALUES[MASK.bool()].double(), q)
    out, gradient = clipped(VALUES.double(), quantile=q)
    torch.testing.assert_close(out, VALUES.double().clamp(max=cap.item()), rtol=1e-15, atol=0)
    assert torch.equal(gradient == 0, VALUES.double() > cap)


def test_quantile_has_a_floor_no_gradient_and_survives_inf() -> None:
    assert clipped(torch.full((2, 4), 1e-9), quantile=0.5)[0].eq(1e-9).all()  # below the floor of 1e-6
    out, gradient = clipped(torch.where(MASK.bool(), 0.0, 1.0), quantile=0.9)
    assert out.max() == pytest.approx(1e-6) and gradient.sum() == MASK.sum()
    infinite = VALUES.clone()
    infinite[0, 1] = math.inf
    assert masked_quantile(infinite, MASK, 0.75) == 4.0 and masked_quantile(infinite, MASK, 1.0) == math.inf
    out, gradient = clipped(infinite, quantile=0.5)
    assert out[0, 1] == 3.0 and gradient[0, 1] == 0
    infinite[0, 0] = math.nan
    assert masked_quantile(infinite, MASK, 0.1).isnan()


def test_nothing_kept_clips_nothing() -> None:
    nothing = torch.zeros_like(MASK)
    assert torch.equal(clip_divergence(VALUES, nothing, quantile=0.5), VALUES)
    assert masked_quantile(VALUES, nothing, 0.5) == math.inf


def test_more_values_than_torch_quantile_takes() -> None:
    values = torch.arange(17_000_001, dtype=torch.float64).flip(0)
    assert masked_quantile(values, torch.ones_like(values, dtype=torch.bool), 0.25) == 4_250_000


COUNTS = (3, 0, 5, 1)  # kept tokens per rank


def on_rank(rank: int, group: dist.ProcessGroup | None, parts: list[Tensor], q: float) -> tuple[Tensor, Tensor]:
    values, mask = parts[rank], torch.arange(parts[rank].numel()).lt(COUNTS[rank])[None]
    return masked_quantile(values[None], mask, q, group), clip_divergence(values[None], mask, quantile=q, group=group)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("q", [0.0, 0.37, 0.95])
def test_quantile_over_data_parallel_ranks(world: World, size: int, q: float) -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.rand(6, generator=g) for _ in range(size)]
    kept = torch.cat([p[:n] for p, n in zip(parts, COUNTS, strict=False)])
    expected = torch.quantile(kept, q)
    for part, (quantile, out) in zip(parts, world.run(size, on_rank, parts, q), strict=True):
        torch.testing.assert_close(quantile, expected, rtol=1e-6, atol=0)
        assert torch.equal(out[0], part.clamp(max=quantile.item()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, "exactly one of ceiling and quantile"),
        ({"ceiling": 1.0, "quantile": 0.5}, "exactly one of ceiling and quantile"),
        ({"ceiling": 0.0}, "must be positive"),
        ({"ceiling": math.nan}, "must be positive"),
        ({"quantile": 1.5}, r"a quantile lies in \[0, 1\]"),
    ],
)
def test_wrong_requests(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_divergence(VALUES, MASK, **setting)
    with pytest.raises(ValueError, match="differ in shape"):
        clip_divergence(VALUES, MASK[:1], ceiling=1.0)
