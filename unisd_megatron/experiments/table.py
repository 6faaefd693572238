"""The accuracies of a sweep as lines of text, read from `result.json` of each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lines(sweep: Path, content: Mapping[str, Any]) -> list[str]:
    """A table for each evaluated data set: every setting with its seeds, what was not run and why."""
    datasets = list(dict.fromkeys(one for row in content["runs"] for one in row["evaluations"]))
    found: list[str] = []
    for dataset in datasets:
        rows: dict[tuple[str, str], list[float | None]] = {}
        for row in content["base"]:
            if row["dataset"] == dataset:
                rows[("base", Path(row["model_name"]).name)] = [_accuracy(sweep / row["evaluation"])]
        for row in content["runs"]:
            if dataset in row["evaluations"]:
                key = (row["name"], row["identity"])
                rows.setdefault(key, []).append(_accuracy(sweep / row["evaluations"][dataset]))
        width = max(len(name) for name, _ in rows)
        found.append(f"{dataset + ', accuracy %':{width}}   mean   each seed")
        found += [_line(name, values, width) for (name, _), values in rows.items()]
        found += [f"{row['mode']:{width}}   not run: {row['why']}" for row in content["not_run"]]
    return found


def _accuracy(folder: Path) -> float | None:
    path = folder / "result.json"
    return float(json.loads(path.read_text())["accuracy"]) if path.is_file() else None


def _line(name: str, values: list[float | None], width: int) -> str:
    known = [value for value in values if value is not None]
    mean = f"{100 * sum(known) / len(known):6.2f}" if known else "   -  "
    return f"{name:{width}} {mean}   {' '.join('-' if value is None else f'{100 * value:.2f}' for value in values)}"
