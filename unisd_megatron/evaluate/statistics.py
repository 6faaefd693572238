"""How sure a number is: intervals of accuracies, pass@k, and tests of two models on the same questions. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
"""The 0.975 quantile of the standard normal distribution."""
RESAMPLES = 10_000
KS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)

Interval = tuple[float, float]


def wilson(correct: int, total: int) -> Interval:
    """The 95 % score interval of a proportion of independent trials (Wilson 1927); within [0, 1] however few there are."""
    share, weight = correct / total, Z_95**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z_95 / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == total else middle + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The 95 % percentile interval of the mean when the values, one for each question, are drawn anew with replacement.

    Drawn as counts of the distinct values, which is the same distribution and does not grow with the number of questions.
    """
    counts = sorted(Counter(values).items())
    distinct, times = np.array([value for value, _ in counts]), np.array([n for _, n in counts])
    drawn = np.random.default_rng(seed).multinomial(len(values), times / len(values), size=RESAMPLES)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


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


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The difference of accuracy, first minus second, from the share of right answers to each question, in one order."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    ahead, behind = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    binary = {*first, *second} <= {0.0, 1.0}
    mean = math.fsum(differences) / len(differences)
    return Difference(mean, bootstrap(differences), ahead, behind, mcnemar(ahead, behind) if binary else None)
