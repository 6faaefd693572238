"""Agreement weights by hand-written formulas of unisd.md 1.4, their floors and caps, and their independence of the ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.mechanisms import Agreement, agreement_weights
from world import World

K, B, T = 3, 4, 5
VIEWS = -torch.rand(K, B, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])


def weights(views: Tensor = VIEWS, mask: Tensor = MASK, **setting: object) -> Agreement:
    return agreement_weights(views, mask, **({"granularity": "token", "statistic": "var", "gamma": 1.0} | setting))


def spread(values: list[float], statistic: str, ddof: int) -> float:
    mean = sum(values) / len(values)
    return max(values) - min(values) if statistic == "range" else sum((v - mean) ** 2 for v in values) / (len(values) - ddof)


@pytest.mark.parametrize("statistic", ["var", "range"])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0, 50.0])
def test_token_formula(statistic: str, gamma: float) -> None:
    found = weights(statistic=statistic, gamma=gamma, quantile=0.7, cap=1.5)
    d = torch.tensor([[spread(VIEWS[:, b, t].tolist(), statistic, 1) for t in range(T)] for b in range(B)]).double()
    scale = torch.quantile(d[MASK.bool()], 0.7)
    expected = (1 / (1 + gamma * (d / scale).clamp(max=1.5))).clamp(min=0.01)
    torch.testing.assert_close(found.disagreement, d, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("statistic", ["var", "range"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1e4])
def test_sequence_formula(statistic: str, gamma: float) -> None:
    found = weights(granularity="sequence", statistic=statistic, gamma=gamma)
    means = (VIEWS * MASK).sum(-1) / MASK.sum(-1).clamp(min=1)
    d = [spread(means[:, b].tolist(), statistic, 0) for b in range(B)]
    expected = torch.tensor([max(math.exp(-gamma * x), 1e-6) for x in d]).double()[:, None] * MASK
    assert found.disagreement.tolist() == pytest.approx(d)
    torch.testing.assert_close(found.weights, expected, rtol=1e-6, atol=0)


def test_extremes_reach_the_floors() -> None:
    views = torch.zeros(2, 1, 100)
    views[1, 0, 0] = -1000.0  # one wild token; the quantile of the others is 0, its scale the floor 1e-6
    found = weights(views, torch.ones(1, 100), gamma=1.0)
    assert found.weights[0, 0] == pytest.approx(1 / 11) and (found.weights[0, 1:] == 1).all()  # capped at 10
    assert weights(views, torch.ones(1, 100), gamma=100.0).weights.min() == pytest.approx(0.01)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("statistic", ["var", "range"])
def test_a_single_view_cannot_disagree(granularity: str, statistic: str) -> None:
    found = weights(VIEWS[:1], granularity=granularity, statistic=statistic)
    assert (found.disagreement == 0).all()
    assert torch.equal(found.weights, torch.ones(B, T).double() * (MASK if granularity == "sequence" else 1))


def test_nothing_kept() -> None:
    assert torch.equal(weights(mask=torch.zeros_like(MASK)).weights, torch.ones(B, T).double())
    assert (weights(mask=torch.zeros_like(MASK), granularity="sequence").weights == 0).all()


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("statistic", ["var", "range"])
def test_garbage_at_masked_positions_stays_there(granularity: str, statistic: str) -> None:
    views = VIEWS.clone()
    views[0, ~MASK.bool()] = math.nan
    views[1, ~MASK.bool()] = -math.inf
    found, clean = (weights(v, granularity=granularity, statistic=statistic) for v in (views, VIEWS))
    assert torch.equal(found.weights * MASK, clean.weights * MASK)


def test_results_are_fp32_and_detached() -> None:
    views = VIEWS.bfloat16().requires_grad_()
    for granularity in ("token", "sequence"):
        found = weights(views, granularity=granularity)
        assert found.weights.dtype == found.disagreement.dtype == torch.float32
        assert not found.weights.requires_grad and not found.disagreement.requires_grad


def on_rank(rank: int, group: dist.ProcessGroup, granularity: str) -> Agreement:
    rows = slice(rank * B // dist.get_world_size(group), (rank + 1) * B // dist.get_world_size(group))
    return weights(VIEWS[:, rows], MASK[rows], granularity=granularity, group=group)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_data_parallel_ranks_get_the_weights_of_the_whole_batch(world: World, size: int, granularity: str) -> None:
    """Rank 2 of 4 has no kept token at all and still scales like the others."""
    parts = world.run(size, on_rank, granularity)
    whole = weights(granularity=granularity)
    torch.testing.assert_close(torch.cat([p.weights for p in parts]), whole.weights, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([p.disagreement for p in parts]), whole.disagreement, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"granularity": "word"}, "granularity must be"),
        ({"statistic": "std"}, "statistic must be"),
        ({"gamma": -0.1}, "gamma must be at least 0"),
        ({"gamma": math.nan}, "gamma must be at least 0"),
        ({"cap": 0.0}, "cap must be positive"),
        ({"quantile": -1.0}, "a quantile lies in"),
        ({"mask": MASK[:1]}, r"must be \[K, B, T\]"),
        ({"views": VIEWS[:0]}, r"must be \[K, B, T\]"),
    ],
)
def test_wrong_requests(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights(**setting)
