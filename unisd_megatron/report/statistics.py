"""Intervals over seeds, and a paired test over questions. Exact, without scipy and without random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

Interval = tuple[float, float]


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution with so many degrees of freedom (1 or more)."""
    low, high = 0.0, 13.0  # 12.71 with one degree of freedom
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t), the finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    term = total = math.sin(angle) * (math.cos(angle) if freedom % 2 else 1.0)
    first = 3 if freedom % 2 else 2
    for i in range(first, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    if freedom % 2 == 0:
        return total
    return 2 / math.pi * (angle + (total if freedom > 1 else 0.0))


def mean_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """The mean and its 95 % t interval over independent values.

    None for the interval of a single value, and of values that are all equal: a width of 0 would claim to know other seeds.
    """
    mean = math.fsum(values) / len(values)
    if max(values) - min(values) < 1e-12:  # differences of equal accuracies are equal but for rounding
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return mean, (mean - half, mean + half)


def sign_flip(differences: Sequence[int]) -> float:
    """The two-sided p-value that whole-numbered differences are as likely to be d as -d, each by itself.

    The share of all 2^n choices of signs whose sum is at least as far from 0: the exact permutation test, by the distribution
    of the sum. With differences of 0 and 1 it is McNemar's exact test.
    """
    observed = abs(sum(differences))
    sizes: dict[int, int] = {}
    for one in differences:
        if one:
            sizes[abs(one)] = sizes.get(abs(one), 0) + 1
    spread: numpy.ndarray = numpy.ones(1)  # of the sum, over every second whole number around 0
    for size, count in sizes.items():
        coins = numpy.zeros(size * count + 1)  # heads among `count` coins, each worth `size`
        logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)]
        coins[::size] = numpy.exp(numpy.array(logs) - count * math.log(2))
        spread = numpy.convolve(spread, coins)
    sums = 2 * numpy.arange(len(spread)) - (len(spread) - 1)
    return min(1.0, float(spread[numpy.abs(sums) >= observed].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """p-values of as many tests, adjusted so that the chance of any false rejection stays at the level (Holm 1979)."""
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        worst = max(worst, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = worst
    return adjusted
