"""Pages of HTML: everything in one file, nothing fetched, all text escaped by the template engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from unisd_megatron.evaluate.statistics import wilson
from unisd_megatron.report import comparison, plots
from unisd_megatron.report.comparison import Line
from unisd_megatron.report.drawing import Picture
from unisd_megatron.report.flips import Flips, flips
from unisd_megatron.report.reading import Answers, Base, RunRecord, Sweep
from unisd_megatron.report.statistics import Interval

GENERATOR = "unisd report"
"""Stands in the head of every page: a folder that holds one may be written anew."""


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    found = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    found.filters |= {
        "number": number,
        "percent": percent,
        "points": points,
        "percents": percents,
        "differences": differences,
        "p": p_value,
        "inline": _inline,
    }
    found.globals["generator"] = GENERATOR
    return found


def _inline(one: Picture) -> Markup:
    return Markup(one.svg)


def number(value: float | None) -> str:
    """Four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference in percentage points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def percents(bounds: Interval | None, seeds: int) -> str:
    """An interval over so many seeds, of accuracies."""
    return _between(bounds, seeds, percent)


def differences(bounds: Interval | None, seeds: int) -> str:
    """An interval over so many seeds, of differences of accuracies."""
    return _between(bounds, seeds, points)


def _between(bounds: Interval | None, seeds: int, form: Callable[[float], str]) -> str:
    if bounds is None:
        return "– all seeds equal" if seeds > 1 else "–"
    return f"{form(bounds[0])} to {form(bounds[1])}"


def p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def of_run(record: RunRecord, pair: tuple[Answers, Answers] | None, folder: str, home: str | None) -> tuple[str, list[Picture]]:
    """The page of a run and its pictures. Args: pair: answers before and after, else the run's own first and last held-out
    evaluations; folder: of the PNG files, as the page names it; home: the overview's file."""
    drawn = plots.pictures(record)
    if pair is None and len(record.answers) > 1:
        first, last = min(record.answers), max(record.answers)
        pair = record.answers[first], record.answers[last]
    found: Flips | None = flips(*pair) if pair is not None else None
    text = (
        _environment()
        .get_template("run.html")
        .render(
            title=record.name,
            record=record,
            pictures=drawn,
            folder=folder,
            home=home,
            tiles=_tiles(record),
            table=_table(record),
            evaluations=_evaluations(record),
            stated={
                name: value for name, value in record.settings.items() if record.origins.get(name) in ("flag", "file", "mode")
            },
            flips=found,
        )
    )
    return text, drawn


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value, small print."""
    tiles = []
    rows = _evaluations(record)
    if rows:
        last = rows[-1]
        tiles.append(("held-out accuracy, %", percent(last["accuracy"]), f"{percent(last['low'])} to {percent(last['high'])}"))
        if len(rows) > 1:
            tiles.append(
                (
                    "before training, %" if rows[0]["step"] == 0 else "first, %",
                    percent(rows[0]["accuracy"]),
                    f"step {rows[0]['step']}",
                )
            )
    steps, losses = record.series("loss")
    told = [f"of {record.wanted}"] if record.wanted else []
    tiles.append(("steps", str(len(record.metrics)), ", ".join([*told, *([] if record.finished else ["not finished"])])))
    if steps:
        tiles.append(("loss", number(losses[-1]), f"from {number(losses[0])}"))
    seconds = sum(record.series("seconds/step")[1])
    if seconds:
        tokens = sum(record.series("completions/tokens")[1])
        tiles.append(("tokens per second", f"{tokens / seconds:.0f}", f"{seconds:.0f} s of steps"))
    if peak := record.series("memory/peak_bytes")[1]:
        tiles.append(("peak memory, GiB", f"{max(peak) / plots.GIB:.2f}", "of the largest rank"))
    return tiles


def _table(record: RunRecord) -> list[dict[str, Any]]:
    """Of every metric: first, last, mean of the last tenth, least, largest."""
    rows = []
    for name in record.names():
        if name == "step":
            continue
        values = record.series(name)[1]
        tail = values[-max(1, len(values) // 10) :]
        rows.append(
            {
                "name": name,
                "first": values[0],
                "last": values[-1],
                "tail": sum(tail) / len(tail),
                "least": min(values),
                "largest": max(values),
            }
        )
    return rows


def _evaluations(record: RunRecord) -> list[dict[str, Any]]:
    rows = []
    for row in record.evaluations:
        count = row.get("examples", 0)
        low, high = wilson(row["accuracy"] * count, count) if count else (None, None)
        rows.append({"step": row["step"], "accuracy": row["accuracy"], "examples": count, "low": low, "high": high})
    return rows


def of_sweep(sweep: Sweep, pages: dict[str, str]) -> tuple[str, list[Picture]]:
    """The overview of a sweep. Args: pages: file of each run's page, by `train` of its row."""
    parts, drawn = [], []
    for dataset in sweep.datasets:
        lines = comparison.lines(sweep, dataset)
        before = sweep.before(dataset)
        accuracy = next(iter(before.values())).result["accuracy"] if len(before) == 1 else None
        shown = plots.sweep(lines, dataset, accuracy)
        drawn += [shown] if shown is not None else []
        bases = _bases(sweep, dataset, before)
        parts.append({"dataset": dataset, "lines": lines, "picture": shown, "bases": bases, "seeds": _seeds(lines)})
    missing = [
        {"title": cell.title, "dataset": dataset, "why": why} for cell in sweep.cells for dataset, why in cell.missing.items()
    ]
    text = (
        _environment()
        .get_template("sweep.html")
        .render(
            title=sweep.name, parts=parts, missing=missing, not_run=sweep.not_run, cells=sweep.cells, pages=pages, gib=plots.GIB
        )
    )
    return text, drawn


def _bases(sweep: Sweep, dataset: str, before: Mapping[str, Base]) -> list[dict[str, Any]]:
    """Results of what runs start from; `of`: the checkpoint and the settings that start from it, where there are several."""
    names: dict[str, list[str]] = {}
    for cell in sweep.cells:
        found = names.setdefault(cell.row.get("base", {}).get(dataset, ""), [])
        found += [cell.row["name"]] if cell.row["name"] not in found else []
    return [
        {"of": f"{base.model_name}: {', '.join(names.get(place, []))}" if len(before) > 1 else "", "result": base.result}
        for place, base in before.items()
    ]


def _seeds(lines: Sequence[Line]) -> list[int]:
    return sorted({seed for line in lines for seed in [*line.accuracies, *line.missing]})


def of_several(records: Sequence[RunRecord], pages: Sequence[str]) -> str:
    """The overview of runs that are no sweep. Args: pages: file of each run's page, in the same order."""
    rows = [{"record": record, "page": page, "tiles": _tiles(record)} for record, page in zip(records, pages, strict=True)]
    return _environment().get_template("runs.html").render(title=f"{len(records)} runs", rows=rows)
