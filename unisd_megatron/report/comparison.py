"""A sweep as a table: each setting over its seeds, and against vanilla on the same questions.

Two sources of chance are kept apart. Over seeds: a t interval of the mean, and of the paired differences from vanilla's run
with the same seed. Over questions: for every question the difference of the number of right answers, added over the seeds that
both have; under the null hypothesis its sign is a coin's (`statistics.sign_flip`). The second says whether these trained models
differ on such questions, and nothing about what other seeds would give; Holm's adjustment counts all comparisons of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unisd_megatron.evaluate import statistics as of_proportions
from unisd_megatron.report import statistics
from unisd_megatron.report.reading import Cell, Row, Sweep

CONTROL = "vanilla"


@dataclass(frozen=True)
class Against:
    """A setting minus the control, over the seeds of both. `p` is None where questions were not answered equally often."""

    seeds: Sequence[int]
    mean: float
    interval: tuple[float, float] | None
    per_seed: Sequence[tuple[int, float, float | None]]  # seed, difference, McNemar p
    p: float | None
    p_holm: float | None = None


@dataclass(frozen=True)
class Line:
    """One setting on one data set. `missing`: seeds without a result, and why; `runs`: by seed, `train` of its row."""

    name: str
    mode: str
    accuracies: Mapping[int, float]  # by seed
    mean: float | None
    interval: tuple[float, float] | None
    missing: Mapping[int, str]
    runs: Mapping[int, str]
    against: Against | None
    cost: Mapping[str, float | None]

    @property
    def is_control(self) -> bool:
        return self.mode == CONTROL


def lines(sweep: Sweep, dataset: str) -> list[Line]:
    """Every setting that was to be evaluated on a data set, in the order of the sweep."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in sweep.cells:
        if dataset in cell.row["evaluations"]:
            groups.setdefault((cell.row["name"], str(cell.row.get("identity", ""))), []).append(cell)
    found = [_line(cells, _control(cells, list(groups.values())), dataset) for cells in groups.values()]
    tested = [i for i, line in enumerate(found) if line.against is not None and line.against.p is not None]
    adjusted = statistics.holm([found[i].against.p for i in tested])  # type: ignore[union-attr, misc]
    for i, p in zip(tested, adjusted, strict=True):
        against = found[i].against
        assert against is not None
        found[i] = replace(found[i], against=replace(against, p_holm=p))
    return found


def _control(cells: Sequence[Cell], groups: Sequence[Sequence[Cell]]) -> Sequence[Cell] | None:
    """The vanilla runs of the same training data, from the same checkpoint and evaluated alike (`base` names both), that share
    whatever settings both vary; None where that is not one group."""
    first = cells[0].row
    if first["mode"] == CONTROL:
        return None

    def fits(other: Row) -> bool:
        ours, theirs = first.get("settings", {}), other.get("settings", {})
        same = all(theirs[name] == ours[name] for name in theirs.keys() & ours.keys())
        alike = all(other.get(name) == first.get(name) for name in ("dataset", "base"))
        return other["mode"] == CONTROL and alike and same

    fitting = [group for group in groups if fits(group[0].row)]
    return fitting[0] if len(fitting) == 1 else None


def _line(cells: Sequence[Cell], control: Sequence[Cell] | None, dataset: str) -> Line:
    accuracies = {cell.row["seed"]: _accuracy(cell.results[dataset][1]) for cell in cells if dataset in cell.results}
    mean, interval = statistics.mean_interval(list(accuracies.values())) if accuracies else (None, None)
    first = cells[0].row
    missing = {cell.row["seed"]: cell.missing[dataset] for cell in cells if dataset in cell.missing}
    against = _against(cells, control, dataset) if control is not None else None
    runs = {cell.row["seed"]: cell.row["train"] for cell in cells}
    return Line(first["name"], first["mode"], accuracies, mean, interval, missing, runs, against, _cost(cells))


def _accuracy(rows: Sequence[Row]) -> float:
    return sum(bool(row["correct"]) for row in rows) / len(rows)


def _right(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """By question: right answers, answers."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        right, count = found.get(str(row["id"]), (0, 0))
        found[str(row["id"])] = right + bool(row["correct"]), count + 1
    return found


def _against(cells: Sequence[Cell], control: Sequence[Cell], dataset: str) -> Against | None:
    ours = {cell.row["seed"]: _right(cell.results[dataset][1]) for cell in cells if dataset in cell.results}
    theirs = {cell.row["seed"]: _right(cell.results[dataset][1]) for cell in control if dataset in cell.results}
    seeds = [seed for seed in ours if seed in theirs and ours[seed].keys() == theirs[seed].keys()]
    if not seeds:
        return None
    per_seed, total, samples = [], dict.fromkeys(ours[seeds[0]], 0), set()
    comparable = True
    for seed in seeds:
        comparable &= ours[seed].keys() == total.keys()
        for name, (right, count) in ours[seed].items():
            other, others = theirs[seed][name]
            samples |= {count, others}
            total[name] = total.get(name, 0) + right - other
        shares = [[right / count for right, count in one[seed].values()] for one in (ours, _in_order(theirs, ours, seed))]
        answers = tuple(sum(count for _, count in one[seed].values()) for one in (ours, theirs))
        pair = of_proportions.paired(shares[0], shares[1], (answers[0], answers[1]))
        per_seed.append((seed, pair.mean, pair.p))
    mean, interval = statistics.mean_interval([difference for _, difference, _ in per_seed])
    p = statistics.sign_flip(list(total.values())) if comparable and len(samples) == 1 else None
    return Against(seeds, mean, interval, per_seed, p)


def _in_order(theirs: Mapping[int, Any], ours: Mapping[int, Any], seed: int) -> dict[int, Any]:
    return {seed: {name: theirs[seed][name] for name in ours[seed]}}


def _cost(cells: Sequence[Cell]) -> dict[str, float | None]:
    """Means over the runs that have them, None where no run has: seconds of all steps, tokens per second, peak memory."""
    records = [cell.record for cell in cells if cell.record is not None and cell.record.metrics]
    found: dict[str, list[float]] = {"seconds": [], "tokens_per_second": [], "peak_bytes": []}
    for record in records:
        seconds, tokens = (math.fsum(record.series(name)[1]) for name in ("seconds/step", "completions/tokens"))
        if seconds:
            found["seconds"].append(seconds)
            found["tokens_per_second"].append(tokens / seconds)
        if peak := record.series("memory/peak_bytes")[1]:
            found["peak_bytes"].append(max(peak))
    return {name: math.fsum(values) / len(values) if values else None for name, values in found.items()}
