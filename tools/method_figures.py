"""The figures of docs/method.md, from a real run on the demo's model: `python tools/method_figures.py` in the repository.

Trains 30 steps of UniSD* as the demo does, in one process, and draws the step whose completions are not the student's best yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.figure import Figure

from unisd_megatron.cli.commands import prepare_libraries
from unisd_megatron.mechanisms import clip_divergence, contrastive_hinge
from unisd_megatron.mechanisms.objective import Objective, Shares, TokenStats
from unisd_megatron.mechanisms.tally import Tally
from unisd_megatron.resolve import resolve

BLUE, ORANGE, GREEN, GREY = "#2a6fb0", "#d9822b", "#3a8f5c", "#9aa2ac"
STEP = 1
"""The step whose completions are drawn: the first has the base model's."""
TEACHER_STEPS = 5
"""From one move of the teacher to the next."""


class Watched(Objective):
    """The objective, which keeps what it was given."""

    def share_of_loss(self, stats: TokenStats, shares: Shares, tally: Tally) -> torch.Tensor:
        self.seen = (stats, shares)
        return super().share_of_loss(stats, shares, tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="docs")
    parser.add_argument("--steps", type=int, default=30)
    request = parser.parse_args()
    if request.steps < TEACHER_STEPS:
        parser.error(f"--steps {request.steps}: the teacher moves every {TEACHER_STEPS} steps; give as many or more")
    prepare_libraries()
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    with tempfile.TemporaryDirectory() as folder:
        drawn = train(request.steps, folder)
    output = Path(request.output_dir)
    tokens(drawn).savefig(output / "method_tokens.png", dpi=110)
    teacher(drawn).savefig(output / "method_teacher.png", dpi=110)


@dataclasses.dataclass
class Drawn:
    """One completion, token by token, and the run's curves."""

    text: list[str]
    values: dict[str, list[float]]
    ceiling: float
    margin: float
    metrics: list[dict[str, Any]]


def train(steps: int, folder: str) -> Drawn:
    from unisd_megatron.mcore import platform as platforms
    from unisd_megatron.mcore import start
    from unisd_megatron.train.build import assemble, prepare
    from unisd_megatron.train.step import train_step

    demo = yaml.safe_load(Path("examples/demo/demo.yaml").read_text())
    flags = {"tensor_model_parallel_size": 1, "max_steps": steps, "output_dir": folder, "seed": 0}
    run = resolve({**flags, "ref_model_sync_steps": TEACHER_STEPS, "eval_steps": 0}, demo)
    prepared = prepare(run, 1)
    found: dict[str, Any] = {}
    metrics = []
    with start.world(platforms.choose(), run.layout, run.schedule.seed) as grid:
        parts = assemble(run, prepared, platforms.choose(), grid)
        old = parts.learner.objective
        parts.learner.objective = watched = Watched(old.settings, old.data, old.tokens)
        for step in range(steps):
            report = train_step(parts, step)
            metrics.append(report.metrics)
            if step == STEP:
                found = _of_one_completion(watched, prepared.tokenizer, report.samples)
        parts.rollouts.engine.close()
    return Drawn(**found, metrics=metrics)


def _of_one_completion(objective: Watched, tokenizer: Any, samples: Any) -> dict[str, Any]:
    """Of the completion with the most tokens above the ceiling."""
    stats, shares = objective.seen
    settings, mask = objective.settings, shares.heard.mine
    assert settings.token_clip is not None and shares.heard.negative is not None and stats.feature is not None
    divergence, student = stats.divergence.detach(), stats.student_log_probs.detach()
    clipped = clip_divergence(divergence, mask, ceiling=settings.token_clip)
    hinge = contrastive_hinge(student, stats.teacher_log_probs, shares.heard.negative, margin=settings.contrastive_margin)
    row = int(((divergence > settings.token_clip) & mask).sum(1).argmax())
    kept = mask[row]
    # A row of the batch is found again by what the student said of its tokens.
    length = int(kept.sum())
    own = student[row][kept]
    best = min(
        (one for one in samples if len(one.completion.token_ids) == length),
        key=lambda one: float((torch.tensor(one.completion.log_probs) - own).abs().sum()),
    )
    text = [tokenizer.decode([i]) for i in best.completion.token_ids]
    rows = {
        "divergence": divergence,
        "clipped": clipped,
        "weight": shares.weights,
        "to_teacher": (student - stats.teacher_log_probs).abs(),
        "to_negative": (student - shares.heard.negative).abs(),
        "hinge": hinge.detach(),
        "feature": stats.feature.detach(),
    }
    values = {name: value[row][kept].tolist() for name, value in rows.items()}
    text = ["EOS" if token.startswith("<|") else token for token in text]
    return {"text": text, "values": values, "ceiling": settings.token_clip, "margin": settings.contrastive_margin}


def tokens(drawn: Drawn) -> Figure:
    """Every mechanism on the same tokens."""
    figure = Figure(figsize=(9.5, 8.6), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True)
    places, v = range(len(drawn.text)), drawn.values
    axes[0].bar(places, v["divergence"], color=ORANGE, label="KL(teacher || student)")
    axes[0].bar(places, v["clipped"], color=BLUE, label="after clipping")
    axes[0].axhline(drawn.ceiling, color=GREY, lw=1, ls="--", label=f"ceiling, {drawn.ceiling:g} nat")
    axes[0].set_ylabel("nats")
    axes[1].bar(places, v["weight"], color=GREEN, label="agreement weight")
    axes[1].set_ylim(0, 1.05)
    axes[2].plot(places, v["to_teacher"], "o-", color=BLUE, ms=3.5, label="|student - teacher|")
    axes[2].plot(places, v["to_negative"], "o-", color=ORANGE, ms=3.5, label="|student - wrong demonstration|")
    axes[2].bar(places, v["hinge"], color=GREY, alpha=0.5, label=f"hinge, margin {drawn.margin:g}")
    axes[2].set_yscale("symlog", linthresh=0.1)
    axes[2].set_ylabel("nats")
    axes[3].bar(places, v["feature"], color=BLUE, label="feature distance")
    total = sum(v["weight"])
    share = [w * c / total for w, c in zip(v["weight"], v["clipped"], strict=True)]
    plain = [d / len(drawn.text) for d in v["divergence"]]
    axes[4].bar(places, plain, color=ORANGE, label="part in the divergence term: vanilla")
    axes[4].bar(places, share, color=BLUE, label="clipped and weighted")
    axes[4].set_yscale("symlog", linthresh=1e-3)
    axes[4].set_ylabel("nats")
    for one in axes:
        one.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, fontsize=8.5)
        one.grid(axis="y", color="#e6e9ec")
        one.set_axisbelow(True)
    axes[4].set_xticks(list(places), [token.replace(" ", "␣") for token in drawn.text])
    axes[4].set_xlabel("the student's completion")
    return figure


def teacher(drawn: Drawn) -> Figure:
    """What moves over the steps: the teacher, and how much is clipped and weighted down."""
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    moved = [(i + 1, row["teacher/distance"]) for i, row in enumerate(drawn.metrics) if "teacher/distance" in row]
    left.plot(*zip(*moved, strict=True), "o-", color=BLUE, ms=4)
    left.set_title("distance of the EMA teacher", fontsize=9)
    steps = range(1, len(drawn.metrics) + 1)
    middle.plot(steps, [row["clip/clipped_fraction"] for row in drawn.metrics], color=ORANGE)
    middle.set_title("share of clipped tokens", fontsize=9)
    right.plot(steps, [row["agreement/weight_mean"] for row in drawn.metrics], color=GREEN)
    right.set_title("mean agreement weight", fontsize=9)
    for one in (left, middle, right):
        one.set_ylim(0, 1.1 * max(one.lines[0].get_ydata()))
        one.set_xlabel("optimizer step")
        one.grid(color="#e6e9ec")
    return figure


if __name__ == "__main__":
    sys.exit(main())
