"""Intervals and tests of sweeps, against scipy and by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from unisd_megatron.evaluate.statistics import mcnemar
from unisd_megatron.report.statistics import holm, mean_interval, sign_flip, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 31, 100])
def test_t_quantile_is_scipys(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_t_quantile_of_a_printed_table() -> None:
    assert [round(t_quantile(n), 3) for n in (1, 2, 3, 4, 5, 9)] == [12.706, 4.303, 3.182, 2.776, 2.571, 2.262]


def test_interval_over_seeds_by_hand() -> None:
    mean, interval = mean_interval([0.90, 0.94, 0.98])  # sd 0.04, standard error 0.04 / sqrt 3
    assert mean == pytest.approx(0.94) and interval is not None
    assert interval[1] - mean == pytest.approx(4.302653 * 0.04 / 3**0.5, rel=1e-6)
    assert mean_interval([0.5]) == (0.5, None)
    assert mean_interval([0.9 - 0.8, 0.5 - 0.4, 0.3 - 0.2])[1] is None  # equal but for rounding


@pytest.mark.parametrize("seed", range(6))
def test_sign_flip_is_the_share_of_all_choices_of_signs(seed: int) -> None:
    draw = random.Random(seed)
    values = [draw.choice([-3, -1, 0, 0, 1, 2, 3]) for _ in range(11)]
    sums = [
        sum(sign * value for sign, value in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=11)
    ]
    expected = sum(abs(one) >= abs(sum(values)) for one in sums) / len(sums)
    assert sign_flip(values) == pytest.approx(expected, rel=1e-12)


def test_sign_flip_of_one_seed_is_mcnemars_test() -> None:
    for gained, lost in [(0, 0), (5, 0), (8, 3), (40, 61), (700, 500)]:
        assert sign_flip([1] * gained + [-1] * lost + [0] * 50) == pytest.approx(mcnemar(gained, lost), rel=1e-9, abs=1e-15)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
