"""Graphs of shell commands in the place of `unisd`: what the engine does with nodes does not depend on what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unisd_megatron.experiments.graph import Node, Sweep

ANSWERED = 'mkdir -p "$0" && echo \'{"accuracy": 0.5}\' > "$0/result.json"'


def train(sweep: Path, name: str, script: str, needs: Sequence[str] = ()) -> Node:
    """A training: `$0` is its folder, `$@` what the worker adds. Finished with its script, unless that says `exit 0`."""
    folder = f"runs/{name}/seed0/train"
    text = f'{script} && mkdir -p "$0/hf" && echo "{{}}" | tee "$0/hf/config.json" > "$0/finished.json"'
    return Node(f"train-{name}", "train", folder, ("bash", "-c", text, str(sweep / folder)), name, tuple(needs))


def evaluate(sweep: Path, name: str, script: str = "true") -> Node:
    """The evaluation of that training."""
    folder = f"runs/{name}/seed0/evaluate"
    command = ("bash", "-c", f"{script} && {ANSWERED}", str(sweep / folder))
    return Node(f"evaluate-{name}", "evaluate", folder, command, name, (f"train-{name}",))


def graph(sweep: Path, nodes: Sequence[Node], stated: dict[str, object] | None = None) -> Sweep:
    """A sweep of these nodes; a row for every training."""
    names = [node.name.removeprefix("train-") for node in nodes if node.kind == "train"]
    rows = [
        {"name": one, "mode": one, "dataset": "addition", "seed": 0, "settings": {}, "identity": one}
        | {"train": f"runs/{one}/seed0/train", "evaluations": {"addition": f"runs/{one}/seed0/evaluate"}}
        for one in names
    ]
    settings = stated or {"dataset": "addition", "model_name": "m", "mode": "vanilla"}
    return Sweep("stand-in", rows, [], [], list(nodes), {f"runs/{one}": settings for one in names})
