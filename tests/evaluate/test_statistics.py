"""Intervals, pass@k and paired tests against published and hand-computed numbers, and against brute force."""

from __future__ import annotations

import itertools

import pytest

from unisd_megatron.evaluate.statistics import accuracy_interval, effective_answers, ks_for, mcnemar, paired, pass_at_k, wilson


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


@pytest.mark.parametrize(
    ("shares", "answers", "worth"),
    [
        ([1.0, 0.0, 0.0], 3, 3),  # one answer to each question
        ([0.5, 0.0], 4, 3),  # variance of the mean 1/16, of one answer 3/16
        ([1.0, 0.0, 1.0, 0.0], 8, 3),  # 1/12 and 1/4: the second answers say nothing more
        ([0.5, 0.5, 0.25, 0.75], 16, 16),  # 1/96 and 1/4: 24, and yet no more than there are answers
        ([0.0, 0.0, 0.0], 9, 3),  # nothing varies: the questions
        ([1 / 3] * 7, 21, 7),
    ],
)
def test_several_answers_are_worth_their_number_over_the_design_effect(shares: list[float], answers: int, worth: float) -> None:
    assert effective_answers(shares, answers) == pytest.approx(worth, abs=1e-12)
    mean = sum(shares) / len(shares)
    assert accuracy_interval(shares, answers) == pytest.approx(wilson(mean * worth, worth), abs=1e-12)


def test_an_interval_has_a_width_where_all_are_wrong_or_right() -> None:
    """0 of 9 answers to three questions: the upper end is z^2 / (3 + z^2) = 3.8415 / 6.8415."""
    assert accuracy_interval([0.0] * 3, 9) == pytest.approx((0.0, 0.5615), abs=5e-5)
    assert accuracy_interval([1.0] * 3, 9) == pytest.approx((0.4385, 1.0), abs=5e-5)


def shares(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    return [1.0] * (both + first) + [0.0] * (second + neither), [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292), ((53, 0, 0, 1), -0.0729, 0.0729)],
)
def test_interval_of_a_difference_is_method_10_of_newcombe_1998(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    first, second = shares(*cells)
    assert paired(first, second).interval == pytest.approx((low, high), abs=5e-5)
    assert paired(second, first).interval == pytest.approx((-high, -low), abs=5e-5)


def test_paired_difference_pairs_the_questions() -> None:
    """Accuracies 3/4 and 2/4 with opposite answers to three questions: two better here, one there."""
    found = paired([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0])
    assert (found.mean, found.only_first, found.only_second, found.p) == (0.25, 2, 1, 1.0)
    assert found.interval[0] < 0 < found.interval[1]
    together, apart = paired(*shares(20, 5, 0, 20)).interval, paired(*shares(12, 13, 8, 12)).interval
    assert together[1] - together[0] < 0.6 * (apart[1] - apart[0])  # the same two accuracies


def test_there_is_no_mcnemar_p_of_several_answers_even_if_all_agree() -> None:
    found = paired([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], (8, 8))
    assert (found.mean, found.p) == (0.25, None)
    assert paired([1.0, 0.0], [0.0, 0.0], (2, 4)).p is None


def test_no_difference_on_four_questions_is_not_certain() -> None:
    """All wrong in both: each upper end is z^2 / (4 + z^2) = 3.8415 / 7.8415, and nothing ties the two."""
    for answers in ((4, 4), (12, 12)):
        found = paired([0.0] * 4, [0.0] * 4, answers)
        assert found.mean == 0.0 and found.interval == pytest.approx((-0.4899, 0.4899), abs=5e-5)
