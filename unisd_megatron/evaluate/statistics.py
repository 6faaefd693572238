"""How sure a number is: intervals of accuracies, pass@k, and tests of two models on the same questions. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The 0.975 quantile of the standard normal distribution."""
KS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)

Interval = tuple[float, float]


def wilson(correct: float, total: float) -> Interval:
    """The 95 % score interval of a proportion of independent trials (Wilson 1927); within [0, 1] however few there are."""
    share, weight = correct / total, Z_95**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def accuracy_interval(shares: Sequence[float], answers: int) -> Interval:
    """The 95 % interval of an accuracy from the share of right answers to each question, of so many answers in all.

    Wilson's, of as many independent answers as know as much about it: all of them where each has a question of its own.
    """
    mean, worth = math.fsum(shares) / len(shares), effective_answers(shares, answers)
    return wilson(mean * worth, worth)


def effective_answers(shares: Sequence[float], answers: int) -> float:
    """Answers divided by the design effect: how much more the questions' shares vary than those of independent answers would.

    At least an effect of 1. Where the shares do not vary at all they say nothing about it: as many as there are questions.
    """
    count = len(shares)
    if answers == count or min(shares) == max(shares):
        return count
    mean = math.fsum(shares) / count
    of_mean = math.fsum((share - mean) ** 2 for share in shares) / (count - 1) / count
    return min(answers, mean * (1 - mean) / of_mean)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The chance that at least one of k answers is right, from `samples` >= k answers of which `correct` are.

    1 - C(n - c, k) / C(n, k): without bias (Chen et al. 2021, Eq. 1), exact in integers.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def ks_for(samples: int) -> list[int]:
    """The k for which pass@k is reported: the customary ones that the samples allow, and all of them."""
    return sorted({*(k for k in KS if k <= samples), samples})


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value that two models are equally often right, from the questions that only one of them got right.

    Twice the smaller tail of a fair coin thrown that often (McNemar 1947, binomial form), at most 1.
    """
    thrown = only_first + only_second
    tail = sum(math.comb(thrown, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**thrown)  # integers: exact however many there are


@dataclass(frozen=True)
class Difference:
    """Two models on the same questions; `p` is None where a question has several answers and McNemar's test no pairs."""

    mean: float
    interval: Interval
    only_first: int
    only_second: int
    p: float | None


def paired(first: Sequence[float], second: Sequence[float], answers: tuple[int, int] | None = None) -> Difference:
    """The difference of accuracy, first minus second, from the share of right answers to each question, in one order.

    Args: answers: of each model; None: one to each question.
    """
    count = len(first)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    ahead, behind = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    answers = answers or (count, count)
    p = mcnemar(ahead, behind) if answers == (count, count) else None
    return Difference(math.fsum(differences) / count, _difference_interval(first, second, answers), ahead, behind, p)


def _difference_interval(first: Sequence[float], second: Sequence[float], answers: tuple[int, int]) -> Interval:
    """Newcombe's 95 % interval of a difference of paired proportions (1998, method 10): it does not collapse where none differ.

    The distances from the two accuracies to the ends of their own intervals, added as the sides of a triangle whose angle is
    the correlation of the questions' shares.
    """
    (low, high), (other_low, other_high) = (
        accuracy_interval(shares, n) for shares, n in zip((first, second), answers, strict=True)
    )
    here, there = math.fsum(first) / len(first), math.fsum(second) / len(second)
    together = _correlation(first, second)

    def side(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * together * one * other + other**2))

    difference = here - there
    return difference - side(here - low, other_high - there), difference + side(high - here, there - other_low)


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the questions' shares, phi where they are 0 or 1; a positive one with Newcombe's correction for continuity."""
    count, a, b = len(first), math.fsum(first), math.fsum(second)
    if min(first) == max(first) or min(second) == max(second):
        return 0.0
    common = count * math.fsum(x * y for x, y in zip(first, second, strict=True)) - a * b
    spread = (count * math.fsum(x * x for x in first) - a * a) * (count * math.fsum(y * y for y in second) - b * b)
    return (max(common - count / 2, 0.0) if common > 0 else common) / math.sqrt(spread)
