"""The numbers of an evaluation as a file, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd_megatron.evaluate.results import RESULT, write_beside

MOST_BARS = 25


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes table.md, accuracy.png and, last, result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / "table.md", table(result) + "\n")
    draw(result, folder / "accuracy.png")
    write_beside(folder / RESULT, json.dumps(result, indent=2) + "\n")


def headline(result: Mapping[str, Any]) -> str:
    """One line for people."""
    low, high = (100 * bound for bound in result["interval"])
    counted = f"({result['correct']} of {result['answers']})"
    return f"{result['dataset']}: {100 * result['accuracy']:.1f} % {counted}, 95 % interval {low:.1f} to {high:.1f} %"


def table(result: Mapping[str, Any]) -> str:
    """All numbers in Markdown."""
    lines = [
        f"# {result['dataset']}: {result['model']}",
        "",
        "| | answers | accuracy, % | 95 % interval |",
        "| --- | --- | --- | --- |",
    ]
    for name, part in [("all", result), *result["groups"].items()]:
        low, high = (100 * bound for bound in part["interval"])
        lines.append(f"| {name} | {part['answers']} | {100 * part['accuracy']:.2f} | {low:.1f} to {high:.1f} |")
    lines += ["", f"Interval: {result['interval_method']}.", "", "| measure | value |", "| --- | --- |"]
    lines += [f"| pass@{k} | {value:.4f} |" for k, value in result["pass_at_k"].items()]
    lines += [f"| finished | {result['finished']:.4f} |", f"| tokens per completion | {result['mean_tokens']:.1f} |"]
    lines += [f"| {name} | {value:.4f} |" for name, value in result["metrics"].items()]
    for part in ("retention", "reverse", "fit"):
        lines += [f"| {part}: {name} | {_number(value)} |" for name, value in result.get(part, {}).items()]
    if result["failures"]:
        lines += ["", "| failure | answers |", "| --- | --- |"]
        lines += [f"| {name} | {count} |" for name, count in result["failures"].items()]
    if result.get("comparisons"):
        head = "compared with | its accuracy, % | difference | 95 % interval | better here / there | McNemar p | other settings"
        lines += ["", f"| {head} |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |", *map(_comparison, result["comparisons"])]
    return "\n".join(lines)


def _comparison(found: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in found["interval"])
    p = "several answers each" if found["mcnemar_p"] is None else f"{found['mcnemar_p']:.3g}"
    numbers = f"{100 * found['accuracy']:.2f} | {100 * found['difference']:+.2f} | {low:+.1f} to {high:+.1f}"
    return f"| {found['with']} | {numbers} | {found['better_here']} / {found['better_there']} | {p} | {apart(found)} |"


def apart(comparison: Mapping[str, Any]) -> str:
    """The settings in which two evaluations differ."""
    differ = comparison["differ"].items()
    return ", ".join(f"{name} {json.dumps(one['here'])} here, {json.dumps(one['there'])} there" for name, one in differ)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy with intervals, of all and of each group, beside the kinds of failure; the largest where there are many."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = sorted(result["groups"].items(), key=lambda item: -item[1]["answers"])[:MOST_BARS]
    parts = [("all", result), *sorted(largest)]
    failures = list(result["failures"].items())[:MOST_BARS]
    height = 1.6 + 0.32 * max(len(parts), len(failures), 3)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    places = range(len(parts))
    values = [100 * part["accuracy"] for _, part in parts]
    low = [max(0.0, value - 100 * part["interval"][0]) for value, (_, part) in zip(values, parts, strict=True)]
    high = [max(0.0, 100 * part["interval"][1] - value) for value, (_, part) in zip(values, parts, strict=True)]
    colours = ["tab:blue", *["tab:cyan"] * (len(parts) - 1)]
    left.barh(places, values, color=colours, xerr=[low, high], capsize=3, ecolor="black")
    left.set_yticks(places, [f"{name} ({part['answers']})" for name, part in parts])
    left.set(xlim=(0, 100), xlabel="accuracy, %, with 95 % intervals (answers in brackets)")
    left.invert_yaxis()
    bars = right.barh(range(len(failures)), [count for _, count in failures], color="tab:red")
    right.bar_label(bars, padding=3)
    right.margins(x=0.12)
    right.set_yticks(range(len(failures)), [name for name, _ in failures])
    right.set(xlabel="wrong answers, by kind of failure", xlim=(0, None) if failures else (0, 1))
    right.invert_yaxis()
    figure.suptitle(f"{result['dataset']}: {result['model']}", fontsize=10)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
    partial.replace(path)
