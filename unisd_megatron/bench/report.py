"""The costs of the loss as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from unisd_megatron.bench.loss import Cell, Cost
from unisd_megatron.bench.ways import WAYS

Costs = Mapping[Cell, Cost | None]
Setting = tuple[int, int, int, int]


def write(costs: Costs, folder: Path, machine: str) -> str:
    """Writes loss.json, loss.md and loss.png into `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = f"{machine}\n\n{markdown(costs)}\n"
    rows = [asdict(cell) | (asdict(cost) if cost else {"seconds": None, "bytes": None}) for cell, cost in costs.items()]
    (folder / "loss.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (folder / "loss.md").write_text(table)
    draw(costs, folder / "loss.png", machine)
    return table


def settings(costs: Costs) -> list[Setting]:
    """(T, V, H, TP) in the order measured."""
    return list(dict.fromkeys((c.tokens, c.vocab_size, c.hidden, c.tensor) for c in costs))


def at(costs: Costs, setting: Setting, way: str) -> Cost | None:
    """What a way cost in a setting."""
    return next(cost for c, cost in costs.items() if (c.tokens, c.vocab_size, c.hidden, c.tensor) == setting and c.way == way)


def markdown(costs: Costs) -> str:
    """One row per setting; in brackets what part of the eager cost it is."""
    head = " | ".join(f"{way} s | {way} GB" for way in WAYS)
    lines = [f"| T | V | H | TP | {head} |", "|" + " --- |" * (4 + 2 * len(WAYS))]
    for setting in settings(costs):
        eager = at(costs, setting, "eager")
        cells = [cell for way in WAYS for cell in _cells(at(costs, setting, way), None if way == "eager" else eager)]
        lines.append(f"| {' | '.join(f'{n:,}' for n in setting)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(cost: Cost | None, eager: Cost | None) -> tuple[str, str]:
    if cost is None:
        return "does not fit", ""
    seconds, gigabytes = f"{cost.seconds:.3g}", f"{cost.bytes / 1e9:.3g}"
    if eager is None:
        return seconds, gigabytes
    return f"{seconds} ({cost.seconds / eager.seconds:.2f})", f"{gigabytes} (1/{eager.bytes / max(1, cost.bytes):.0f})"


def draw(costs: Costs, path: Path, machine: str) -> None:
    """Time and memory of every way, side by side, a group of bars per setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = settings(costs)
    figure, axes = plt.subplots(1, 2, figsize=(max(9.0, 1.3 * len(found)), 4.2))
    for axis, field, unit, scale in ((axes[0], "seconds", "s", 1.0), (axes[1], "bytes", "GB", 1e-9)):
        for i, way in enumerate(WAYS):
            heights = [getattr(cost, field) * scale if (cost := at(costs, s, way)) else 0.0 for s in found]
            bars = axis.bar([x + 0.27 * (i - 1) for x in range(len(found))], heights, 0.25, label=way)
            axis.bar_label(bars, [f"{h:.2g}" if h else "-" for h in heights], fontsize=6)
        axis.set_xticks(range(len(found)), [f"T {t}\nV {v // 1000}k\nTP {p}" for t, v, _, p in found], fontsize=7)
        axis.set_yscale("log")
        axis.set_ylabel(unit)
    axes[0].set_title("time, forward and backward")
    axes[1].set_title("peak memory beyond the inputs")
    axes[0].legend()
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
