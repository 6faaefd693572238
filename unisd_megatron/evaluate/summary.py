"""From rows to numbers: what `result.json` says about the answers. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unisd_megatron.errors import CheckpointError
from unisd_megatron.evaluate import statistics
from unisd_megatron.evaluate.results import Finished, Row

_DIGESTS = ("data", "prompts", "model", "base")


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy with its interval, pass@k, groups, failures and metrics of scored answers.

    A metric is a mean over all answers; one that was never scored counts as 0 in it.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for one in rows:
        if one["group"] is not None:
            groups[one["group"]].append(one)
    names = sorted({name for one in rows for name in one["metrics"]})
    return {
        **_accuracy(rows),
        "pass_at_k": _pass_at_k(rows),
        "groups": {name: _accuracy(part) for name, part in sorted(groups.items())},
        "finished": sum(one["finished"] for one in rows) / len(rows),
        "mean_tokens": sum(one["tokens"] for one in rows) / len(rows),
        "failures": dict(Counter(one["failure"] for one in rows if one["failure"] is not None).most_common()),
        "metrics": {name: math.fsum(one["metrics"].get(name, 0.0) for one in rows) / len(rows) for name in names},
    }


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    shares = list(shares_by_question(rows).values())
    correct = sum(one["correct"] for one in rows)
    single = len(shares) == len(rows)
    low, high = statistics.accuracy_interval(shares, len(rows))
    return {
        "examples": len(shares),
        "answers": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "interval": [low, high],
        "interval_method": "Wilson" if single else "Wilson, effective number of answers",
    }


def _pass_at_k(rows: Sequence[Row]) -> dict[str, float]:
    counts = Counter(one["id"] for one in rows)
    right = Counter(one["id"] for one in rows if one["correct"])
    samples = min(counts.values())
    return {
        str(k): math.fsum(statistics.pass_at_k(right[name], counts[name], k) for name in counts) / len(counts)
        for k in statistics.ks_for(samples)
    }


def shares_by_question(rows: Sequence[Row]) -> dict[str, float]:
    """The share of right answers to each question, in order."""
    answers: dict[str, list[bool]] = defaultdict(list)
    for one in rows:
        answers[one["id"]].append(one["correct"])
    return {name: sum(found) / len(found) for name, found in answers.items()}


def check_same_questions(other: Path, theirs: Finished, data: str, questions: Mapping[str, str]) -> None:
    """Raises `CheckpointError` unless another evaluation asked the same: ids are row numbers in any split of any file.

    Args: data: digest of the records here; questions: what is asked here, by id. Texts are compared, not token ids: another
    model may have another tokenizer.
    """
    asked = {one["id"]: one["prompt"] for one in theirs.rows}
    if asked.keys() != questions.keys():
        there, here = asked.keys() - questions.keys(), questions.keys() - asked.keys()
        name, where = min([*((one, "there") for one in there), *((one, "here") for one in here)])
        raise CheckpointError(f"{other}: other questions ({name} is asked {where} only); compare answers to the same")
    different = [name for name, text in questions.items() if asked[name] != text]
    if different:
        raise CheckpointError(
            f"{other}: other questions ({len(different)}, the first {different[0]}, are worded otherwise there); "
            "compare answers to the same"
        )
    if theirs.key.get("data") != data:
        raise CheckpointError(f"{other}: other data (the same questions, other answers or fields); compare answers to the same")


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that shaped two evaluations and are not the same in both, which a comparison may be about."""
    here, there = ({name: json.loads(json.dumps(value)) for name, value in key.items()} for key in (here, there))
    names = [name for name in here if name in there and name not in _DIGESTS and here[name] != there[name]]
    return {name: {"here": here[name], "there": there[name]} for name in names}


def compare(rows: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """This evaluation against another of the same questions: the difference is ours minus theirs."""
    ours, others = shares_by_question(rows), shares_by_question(theirs)
    found = statistics.paired(list(ours.values()), [others[name] for name in ours], (len(rows), len(theirs)))
    return {
        "accuracy": math.fsum(others.values()) / len(others),
        "difference": found.mean,
        "interval": list(found.interval),
        "better_here": found.only_first,
        "better_there": found.only_second,
        "mcnemar_p": found.p,
    }
