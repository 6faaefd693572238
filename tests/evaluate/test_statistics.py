"""Intervals, pass@k and paired tests against published and hand-computed numbers, and against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from unisd_megatron.evaluate.statistics import bootstrap, ks_for, mcnemar, paired, pass_at_k, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_that_of_newcombe_1998_table_i(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("samples", "correct"), [(6, 0), (6, 1), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(samples: int, correct: int) -> None:
    answers = [number < correct for number in range(samples)]
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(answers, k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_is_reported_for_customary_k_and_all() -> None:
    assert ks_for(1) == [1]
    assert ks_for(12) == [1, 5, 10, 12]
    assert ks_for(100) == [1, 5, 10, 20, 50, 100]


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096, abs=1e-15)
    assert mcnemar(2, 10) == mcnemar(10, 2)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(1, 0) == 1.0
    assert 0 < mcnemar(400, 600) < 1e-8  # more coins than a float has exponents for
    assert mcnemar(3000, 0) < 1e-300


def test_bootstrap_interval_is_that_of_resampling_one_by_one() -> None:
    rng = random.Random(3)
    values = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(40)]
    means = sorted(sum(rng.choices(values, k=40)) / 40 for _ in range(20_000))
    low, high = bootstrap(values)
    assert low == pytest.approx(means[500], abs=0.0126)  # two steps of the coarse distribution of means
    assert high == pytest.approx(means[19_500], abs=0.0126)
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.5] * 7) == (0.5, 0.5)


def test_paired_difference_pairs_the_questions() -> None:
    """Accuracies 3/4 and 2/4 with opposite answers to three questions: two better here, one there."""
    found = paired([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0])
    assert (found.mean, found.only_first, found.only_second, found.p) == (0.25, 2, 1, 1.0)
    assert found.interval[0] < 0 < found.interval[1]
    several = paired([0.5, 1.0], [0.5, 0.0])
    assert (several.mean, several.p) == (0.5, None)


def test_the_same_answers_twice_differ_by_nothing() -> None:
    found = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
