"""Histograms of a step: fixed edges, counts that add up over micro-batches and ranks."""

from __future__ import annotations

import json

import torch

from unisd_megatron.grid import Axis
from unisd_megatron.mechanisms.histograms import DIVERGENCES, EDGES, WEIGHTS
from unisd_megatron.mechanisms.objective import Heard, LossSettings, Objective, TokenStats
from unisd_megatron.mechanisms.tally import Tally


def test_a_bin_holds_its_lower_edge_and_the_last_one_full_agreement() -> None:
    tally = Tally()
    weights = torch.tensor([0.01, 0.0499, 0.5, 0.949, 0.951, 1.0, 0.3])
    tally.add_histogram(WEIGHTS, weights, torch.tensor([1, 1, 1, 1, 1, 1, 0]))
    expected = [0] * 20
    for place, count in {0: 2, 10: 1, 18: 1, 19: 2}.items():
        expected[place] = count
    assert tally.histograms[WEIGHTS] == expected
    tally.add_histogram(DIVERGENCES, torch.tensor([0.0, -1e-9, 1.0, 3.0, 1e6]), torch.ones(5))
    found = tally.histograms[DIVERGENCES]
    assert found[0] == 2 and found[-1] == 1 and found[EDGES[DIVERGENCES].index(1.0) + 1] == 2 and sum(found) == 5


def test_counts_do_not_depend_on_who_counted_what() -> None:
    values = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    alone = Tally()
    alone.add_histogram(WEIGHTS, values, mask)
    parts = []
    for rows in ([0], [1, 3], [2], []):
        part = Tally()
        for row in rows:
            part.add_histogram(WEIGHTS, values[row], mask[row])
        parts.append(json.loads(json.dumps(part.plain())))
    assert Tally.merge(parts).histograms == alone.histograms
    assert sum(alone.histograms[WEIGHTS]) == int(mask.sum())


def test_ranks_that_share_a_sequence_count_its_weight_once() -> None:
    """Under context parallelism both ranks know the weight of the sequence; the one with its first kept token counts it."""
    objective = Objective(LossSettings(agreement="sequence", gamma=1.0, views=2), Axis())
    mask = torch.tensor([[False, True, True, True], [True, True, False, False], [False] * 4])
    auxiliary = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    total = [0] * 20
    for mine in (torch.tensor([[1, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 1]]).bool()):
        heard = Heard(mask=mask, mine=mask & mine, auxiliary=auxiliary)
        zeros, tally = torch.zeros(3, 4), Tally()
        stats = TokenStats(divergence=zeros, student_log_probs=zeros, teacher_log_probs=zeros, entropy=zeros)
        objective.share_of_loss(stats, objective.prepare([heard])[0], tally)
        total = [a + b for a, b in zip(total, tally.histograms[WEIGHTS], strict=True)]
    assert sum(total) == 2  # the third sequence has no token that counts
