"""Questions whose answer changed from wrong to right, or back, between two evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unisd_megatron.evaluate.statistics import mcnemar
from unisd_megatron.report.reading import Answers

SHOWN = 6
"""Samples of each kind on a page."""


@dataclass(frozen=True)
class Flips:
    """`to_right`, `to_wrong`: how many; samples of both as rows with id, prompt, before, after, spread over the questions."""

    before: Answers
    after: Answers
    both_right: int
    both_wrong: int
    to_right: int
    to_wrong: int
    p: float
    samples_right: Sequence[dict[str, Any]]
    samples_wrong: Sequence[dict[str, Any]]


def flips(before: Answers, after: Answers) -> Flips | None:
    """None where the two have no question in common."""
    common = [name for name in before.rows if name in after.rows]
    if not common:
        return None
    pairs = {name: (bool(before.rows[name]["correct"]), bool(after.rows[name]["correct"])) for name in common}
    gained = [name for name, pair in pairs.items() if pair == (False, True)]
    lost = [name for name, pair in pairs.items() if pair == (True, False)]
    values = list(pairs.values())
    return Flips(
        before,
        after,
        values.count((True, True)),
        values.count((False, False)),
        len(gained),
        len(lost),
        mcnemar(len(gained), len(lost)),
        _samples(gained, before, after),
        _samples(lost, before, after),
    )


def _samples(names: Sequence[str], before: Answers, after: Answers) -> list[dict[str, Any]]:
    every = max(1, len(names) // SHOWN)
    return [
        {
            "id": name,
            "prompt": str(after.rows[name].get("prompt", "")),
            "before": str(before.rows[name].get("completion", "")),
            "after": str(after.rows[name].get("completion", "")),
            "failure": (before.rows[name] if after.rows[name]["correct"] else after.rows[name]).get("failure"),
        }
        for name in names[::every][:SHOWN]
    ]
