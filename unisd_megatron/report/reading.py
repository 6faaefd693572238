"""What a run, an evaluation or a sweep has left in its folder. What a kill cut short is left out, and said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.errors import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """One answer to each of the same questions, by id: rows with `prompt`, `completion`, `correct`."""

    name: str
    rows: Mapping[str, Row]

    @property
    def accuracy(self) -> float:
        return sum(bool(row["correct"]) for row in self.rows.values()) / len(self.rows)


@dataclass(frozen=True)
class RunRecord:
    """A training run. `wanted`: its optimizer steps when it is finished; `answers`: of its held-out evaluations, by steps done;
    `problems`: what could not be read or drawn, and that it is not finished."""

    name: str
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    wanted: int | None = None
    finished: bool = True
    metrics: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    answers: Mapping[int, Answers] = field(default_factory=dict)
    problems: Sequence[str] = ()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """`(steps, values)` of a metric, where it was recorded and is finite. Steps count from 1: what is done after it."""
        found = [(row["step"] + 1, row[name]) for row in self.metrics if is_number(row.get(name))]
        return [step for step, _ in found], [value for _, value in found]

    def names(self) -> list[str]:
        """Of all metrics that are one number, in the order of the first row that has each."""
        return list(dict.fromkeys(name for row in self.metrics for name, value in row.items() if is_number(value)))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """A run, finished or not. Raises `ConfigError` where the folder holds none."""
    path, problems = folder / "run.json", list[str]()
    if not path.is_file():
        raise ConfigError(f"{folder}: no run (run.json is missing) and no sweep (sweep.json is missing)")
    about = _json(path, problems)
    if problems or not isinstance(about.get("settings"), dict) or "seed" not in about["settings"]:
        raise ConfigError(f"{path}: {problems[0] if problems else 'no `settings` with a seed'}; it is no run's")
    finished = (folder / "finished.json").is_file()
    metrics = [row for row in read_rows(folder / "metrics.jsonl", problems) if "step" in row]
    wanted = about.get("identity", {}).get("max_steps")
    if not finished:
        problems.append(f"not finished: {len(metrics)} of {wanted or 'its'} steps are recorded, finished.json is missing")
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        settings=about["settings"],
        origins=about.get("origins", {}),
        versions=about.get("versions", {}),
        edges=about.get("histograms", {}),
        wanted=wanted,
        finished=finished,
        metrics=metrics,
        evaluations=[row for row in read_rows(folder / "evaluations.jsonl", problems) if {"step", "accuracy"} <= row.keys()],
        answers=_answers_by_step(folder / "answers", problems),
        problems=[*problems, *_not_finite(metrics)],
    )


def _not_finite(metrics: Sequence[Row]) -> list[str]:
    """What curves and tables leave out."""
    found: dict[str, int] = {}
    for row in metrics:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                found[name] = found.get(name, 0) + 1
    return [f"{name}: {count} step{'s' * (count > 1)} not finite" for name, count in found.items()]


def read_evaluation(folder: Path) -> tuple[Row, list[Row]]:
    """`(result, rows)` of a finished `unisd evaluate`. Raises `ConfigError` for anything else."""
    if not (folder / "result.json").is_file():
        raise ConfigError(f"{folder}: no finished evaluation (result.json is missing)")
    problems: list[str] = []
    result, rows = _json(folder / "result.json", problems), read_rows(folder / "answers.jsonl", problems)
    if problems or len(rows) != result.get("answers"):
        found = problems or [f"{len(rows)} answers, and result.json speaks of {result.get('answers')}"]
        raise ConfigError(f"{folder}: {'; '.join(found)}; evaluate again")
    return result, rows


def answers_of(name: str, rows: Sequence[Row]) -> Answers:
    """Of an evaluation: the first answer to each question."""
    return Answers(name, {str(row["id"]): row for row in rows if row.get("sample", 0) == 0})


def read_rows(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a JSONL file up to the first that cannot be read, which becomes a problem; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            left = len(lines) - number + 1
            problems.append(f"{path.name}: line {number} is cut short or broken; {left} line{'s' * (left > 1)} left out")
            break
        rows.append(row)
    return rows


def _answers_by_step(folder: Path, problems: list[str]) -> dict[int, Answers]:
    found = {}
    for path in sorted(folder.glob("step_*.jsonl")):
        rows = read_rows(path, problems)
        if rows and path.stem[5:].isdigit():
            steps = int(path.stem[5:])
            found[steps] = Answers(f"step {steps}", {str(row["id"]): row for row in rows})
    return found


def _json(path: Path, problems: list[str]) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {error}")
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `record` is None where it never began; `missing`: by data set, why there is no result."""

    row: Row
    record: RunRecord | None
    results: Mapping[str, tuple[Row, list[Row]]]
    missing: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.row['name']}, seed {self.row['seed']}"


@dataclass(frozen=True)
class Base:
    """A checkpoint that runs start from, evaluated as they are."""

    model_name: str
    dataset: str
    result: Row
    rows: Sequence[Row]


@dataclass(frozen=True)
class Sweep:
    """`sweep.json` with everything it names. `base`: finished evaluations of what the runs start from, by folder."""

    name: str
    cells: Sequence[Cell]
    base: Mapping[str, Base]
    not_run: Sequence[Row]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(name for cell in self.cells for name in cell.row["evaluations"]))

    def before(self, dataset: str) -> dict[str, Base]:
        """All evaluations of starting checkpoints on a data set, by folder."""
        return {place: base for place, base in self.base.items() if base.dataset == dataset}

    def before_run(self, cell: Cell, dataset: str) -> Base | None:
        """Of the checkpoint that this run started from, asked the same questions with the same settings."""
        return self.base.get(cell.row.get("base", {}).get(dataset, ""))


def read_sweep(folder: Path) -> Sweep:
    """A sweep, finished or not. Raises `ConfigError` where `sweep.json` is not one."""
    problems: list[str] = []
    content = _json(folder / "sweep.json", problems)
    rows = content.get("runs")
    needed = {"name", "mode", "dataset", "seed", "train", "evaluations"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        why = problems[0] if problems else f"needs `runs`, each with {', '.join(sorted(needed))}"
        raise ConfigError(f"{folder}/sweep.json: {why}")
    base = {
        row["evaluation"]: Base(row["model_name"], row["dataset"], *read_evaluation(folder / row["evaluation"]))
        for row in content.get("base", [])
        if (folder / row["evaluation"] / "result.json").is_file()
    }
    return Sweep(content.get("name", folder.name), [_cell(folder, row) for row in rows], base, content.get("not_run", []))


def _cell(folder: Path, row: Row) -> Cell:
    train = folder / row["train"]
    record = read_run(train, f"{row['name']}, seed {row['seed']}") if (train / "run.json").is_file() else None
    results, missing = {}, {}
    for dataset, place in row["evaluations"].items():
        try:
            results[dataset] = read_evaluation(folder / place)
        except ConfigError as error:
            missing[dataset] = _why(train) or _why(folder / place) or str(error).removeprefix(f"{folder / place}: ")
    return Cell(row, record, results, missing)


def _why(folder: Path) -> str | None:
    """Of a piece of work that failed: its exit status and the last line of its log, both beside its folder."""
    failed = folder.with_name(f"{folder.name}.failed.json")
    if not failed.is_file():
        return None
    log = folder.with_name(f"{folder.name}.log")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    said = [line.rsplit("\r", 1)[-1].strip() for line in lines if line.strip()]
    status = _json(failed, []).get("exit", "unknown")
    kind = "training" if folder.name == "train" else "evaluation"
    return f"{kind} failed, exit status {status}" + (f": {said[-1]}" if said else "")


def slug(text: str) -> str:
    """A name as part of a file name and an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
