"""The pictures of a run. One that has nothing to show is not drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.colors import PowerNorm
from matplotlib.ticker import NullFormatter

from unisd_megatron.evaluate.statistics import wilson
from unisd_megatron.report.drawing import BLUE, COLORS, GREY, ORANGE, RED, Picture, picture
from unisd_megatron.report.reading import RunRecord

MOST_COLUMNS = 200
GIB = 2**30
WEIGHTS, DIVERGENCES = "agreement/weight_histogram", "divergence/histogram"

# name, title, what it says, metrics with their legends, logarithmic
_CURVES: tuple[tuple[str, str, str, dict[str, str], bool], ...] = (
    (
        "loss",
        "Loss",
        "What the optimizer minimises, and its terms with their weights.",
        {
            "loss": "loss",
            "loss/divergence": "divergence",
            "loss/likelihood": "likelihood",
            "loss/contrastive": "contrast",
            "loss/matching": "matching",
        },
        False,
    ),
    (
        "divergence",
        "Divergence from the teacher",
        "Nats per token before clipping; the approximation is of KL(student || teacher) on the sampled tokens. A ceiling that "
        "moves is the next step's.",
        {
            "divergence/mean": "mean",
            "divergence/max": "largest token",
            "kl_approx": "approximate KL",
            "clip/next_ceiling": "ceiling",
        },
        True,
    ),
    ("likelihood", "Negative log-likelihood", "Nats per token of what is trained on.", {"nll/mean": "mean"}, False),
    (
        "entropy",
        "Entropy of the student",
        "Nats per token. A fall to 0 is a collapse, a rise an explosion.",
        {"entropy": ""},
        False,
    ),
    (
        "clip",
        "Clip rate",
        "Share of the tokens whose divergence is above the ceiling; they have no gradient.",
        {"clip/clipped_fraction": ""},
        False,
    ),
    (
        "agreement",
        "Agreement weights",
        "Mean weight of tokens or sequences: 1 where the teacher's contexts agree.",
        {"agreement/weight_mean": "mean weight"},
        False,
    ),
    (
        "contrast",
        "Contrast",
        "Share of the tokens nearer to the wrong demonstration than the margin allows.",
        {"contrastive/margin_violations": ""},
        False,
    ),
    (
        "distances",
        "Contrast: distances",
        "Of the sampled tokens' log-probabilities, nats: |student - teacher|, and from the teacher with a wrong demonstration.",
        {"contrastive/positive_distance": "from the teacher", "contrastive/negative_distance": "from the wrong demonstration"},
        False,
    ),
    ("matching", "Feature distance", "Of final hidden states, student and teacher.", {"matching/distance": ""}, False),
    (
        "teacher",
        "Distance of the EMA teacher",
        "||teacher - student|| / ||student|| over all weights, each time the teacher moved.",
        {"teacher/distance": ""},
        False,
    ),
    (
        "gap",
        "Log-prob gap of the rollout engine",
        "|engine - trainer| of the sampled tokens, nats. It grows when the engine's weights are stale.",
        {"rollout/logp_gap": "mean", "rollout/logp_gap_max": "largest token"},
        True,
    ),
    (
        "length",
        "Length of completions",
        "Tokens.",
        {"completions/length": "mean", "completions/length_max": "longest"},
        False,
    ),
    (
        "truncated",
        "Truncated completions",
        "Share that was cut at the largest length.",
        {"completions/truncated_fraction": ""},
        False,
    ),
    ("gradient", "Gradient norm", "Before it is clipped.", {"grad_norm": ""}, True),
    ("rate", "Learning rate", "", {"learning_rate": ""}, False),
    (
        "speed",
        "Speed",
        "Completion tokens per second of a step, checkpoints and held-out evaluations apart.",
        {"tokens_per_second": ""},
        False,
    ),
)
_SHARES = {"clip", "contrast", "truncated", "agreement"}


def pictures(record: RunRecord) -> list[Picture]:
    """Of whatever the run has recorded."""
    curves = {one[0]: _curve(record, *one) for one in _CURVES}
    others = {
        "accuracy": _accuracy(record),
        "divergences": _histogram(record, DIVERGENCES, "divergences", "Divergences over steps", "divergence, nats", log=True),
        "weights": _histogram(record, WEIGHTS, "weights", "Agreement weights over steps", "weight", log=False),
        "phases": _phases(record),
        "memory": _memory(record),
    }
    found = curves | others
    order = ["accuracy", "loss", "divergence", "divergences", "likelihood", "entropy", "clip", "agreement", "weights"]
    order += ["contrast", "distances", "matching", "teacher", "gap", "length", "truncated", "gradient", "rate"]
    order += ["speed", "phases", "memory"]
    return [one for name in order if (one := found[name]) is not None]


def _curve(record: RunRecord, name: str, title: str, note: str, metrics: dict[str, str], log: bool) -> Picture | None:
    drawn = {legend: record.series(metric) for metric, legend in metrics.items()}
    drawn = {legend: series for legend, series in drawn.items() if series[0]}
    if not drawn:
        return None
    positive = [value for _, values in drawn.values() for value in values if value > 0]
    log = log and bool(positive) and max(positive) > 30 * min(positive)

    def draw(axes: Any) -> None:
        for (legend, (steps, values)), color in zip(drawn.items(), COLORS, strict=False):
            axes.plot(steps, values, color=color, label=legend, **_marks(steps))
        if log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif name in _SHARES:
            axes.set_ylim(-0.03, 1.03)
        else:
            values = [value for _, values in drawn.values() for value in values]
            least, largest = min(0.0, *values), max(0.0, *values)
            axes.set_ylim(least, largest + 0.08 * (largest - least or 1.0))
        if len(drawn) > 1:
            axes.legend(ncols=len(drawn), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        _steps(axes)

    return picture(name, title, note, draw)


def _marks(steps: Sequence[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if len(steps) <= 40 else {}


def _steps(axes: Any) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _accuracy(record: RunRecord) -> Picture | None:
    rows = [row for row in record.evaluations if row.get("examples")]
    if not rows:
        return None
    steps, shares = [row["step"] for row in rows], [row["accuracy"] for row in rows]
    bounds = [wilson(share * row["examples"], row["examples"]) for share, row in zip(shares, rows, strict=True)]

    def draw(axes: Any) -> None:
        axes.fill_between(
            steps, [100 * low for low, _ in bounds], [100 * high for _, high in bounds], color=BLUE, alpha=0.18, lw=0
        )
        axes.plot(steps, [100 * share for share in shares], color=BLUE, marker="o", markersize=4)
        axes.set_ylabel("held-out accuracy, %")
        axes.set_ylim(0, 100)
        _steps(axes)

    return picture("accuracy", "Held-out accuracy", f"Greedy, {rows[-1]['examples']} questions; band: 95 %, Wilson.", draw)


def _histogram(record: RunRecord, metric: str, name: str, title: str, label: str, *, log: bool) -> Picture | None:
    rows = [row for row in record.metrics if isinstance(row.get(metric), list) and sum(row[metric])]
    edges = record.edges.get(metric)
    if not rows or not edges or any(len(row[metric]) != len(edges) + 1 for row in rows):
        return None
    width = math.ceil(len(rows) / MOST_COLUMNS)
    groups = [rows[i : i + width] for i in range(0, len(rows), width)]
    counts = numpy.array([numpy.sum([row[metric] for row in group], axis=0) for group in groups], dtype=float)
    share = (counts / counts.sum(1, keepdims=True)).T
    starts = [group[0]["step"] + 0.5 for group in groups] + [rows[-1]["step"] + 1.5]

    def draw(axes: Any) -> None:
        heights = numpy.arange(len(edges) + 2)
        seen = numpy.where(share > 0, share, numpy.nan)
        mesh = axes.pcolormesh(starts, heights, seen, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), rasterized=True)
        axes.figure.colorbar(mesh, ax=axes, label="share", pad=0.01)
        axes.grid(False)
        axes.set_ylabel(label)
        # Every second power of ten, every fifth of the range of weights.
        places = [i for i in range(len(edges)) if i % 4 == (0 if log else 3)]
        axes.set_yticks([place + 1 for place in places], [f"{edges[place]:g}" for place in places])
        _steps(axes)

    note = "Share of the values in each bin, step by step; the lowest and the highest bin are open."
    return picture(name, title, note, draw)


def _phases(record: RunRecord) -> Picture | None:
    names = [name for name in record.names() if name.startswith("seconds/") and name != "seconds/step"]
    rows = [row for row in record.metrics if all(name in row for name in names)]
    if not rows or not names:
        return None
    width = math.ceil(len(rows) / MOST_COLUMNS)
    groups = [rows[i : i + width] for i in range(0, len(rows), width)]

    def draw(axes: Any) -> None:
        below = numpy.zeros(len(groups))
        steps = [group[0]["step"] + 1 for group in groups]
        for name, color in zip(names, (BLUE, ORANGE, *COLORS[2:]), strict=False):
            seconds = numpy.array([sum(row[name] for row in group) / len(group) for group in groups])
            axes.bar(steps, seconds, width=width, bottom=below, color=color, label=name.removeprefix("seconds/"), lw=0)
            below += seconds
        axes.set_ylabel("seconds")
        axes.legend(ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        _steps(axes)

    return picture("phases", "Time of a step by phase", "", draw)


def _memory(record: RunRecord) -> Picture | None:
    steps, values = record.series("memory/peak_bytes")
    if not steps:
        return None

    def draw(axes: Any) -> None:
        axes.plot(steps, [value / GIB for value in values], color=BLUE, **_marks(steps))
        axes.set_ylabel("GiB")
        axes.set_ylim(0, 1.15 * max(values) / GIB)
        _steps(axes)

    note = (
        "Of the rank that needs most, since its process began: on a GPU what was allocated there, on a CPU what was resident."
    )
    return picture("memory", "Peak memory", note, draw)


def sweep(lines: Sequence[Any], dataset: str, base: float | None) -> Picture | None:
    """Accuracy of every setting: each seed a dot, the mean and its t interval; the control's mean as a line."""
    shown = [line for line in lines if line.mean is not None]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        for place, line in enumerate(reversed(shown)):
            color = GREY if line.is_control else BLUE
            if line.interval is not None:
                low, high = (100 * min(max(bound, 0.0), 1.0) for bound in line.interval)
                axes.plot([low, high], [place, place], color=color, lw=5, alpha=0.25, solid_capstyle="butt")
            dots = [100 * value for value in line.accuracies.values()]
            axes.plot(dots, [place] * len(dots), "o", color=color, markersize=4, alpha=0.65)
            axes.plot([100 * line.mean], [place], "|", color=color, markersize=13, markeredgewidth=2.2)
        controls = [line.mean for line in shown if line.is_control]
        if len(controls) == 1:
            axes.axvline(100 * controls[0], color=GREY, lw=1, ls="--", label="vanilla")
        if base is not None:
            axes.axvline(100 * base, color=RED, lw=1, ls=":", label="before training")
        axes.set_yticks(range(len(shown)), [line.name for line in reversed(shown)])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy, %")
        if len(controls) == 1 or base is not None:
            axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    note = "A dot for each seed, a mark at their mean; band: 95 % t interval over seeds, where they differ."
    return picture(f"sweep-{dataset}", f"Accuracy on {dataset}", note, draw, size=(11.5, 1.3 + 0.28 * len(shown)))
