"""Small real training runs for the tests, in the worker pool: the product's own `train`, a tiny model, real layouts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from unisd_megatron.errors import UnisdError
from unisd_megatron.resolve import resolve
from unisd_megatron.train.loop import train
from unisd_megatron.train.metrics import read_metrics
from unisd_megatron.weights.tiny import write_tiny
from world import World

_TINY = tempfile.TemporaryDirectory(prefix="unisd-tiny-")
TINY = Path(_TINY.name) / "tiny"  # four layers, written by the first run of the session

QUICK: dict[str, Any] = {
    "dataset": "addition",
    "model_name": str(TINY),
    "num_train_examples": 64,
    "global_batch_size": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "export_hf": False,
}
STAR: dict[str, Any] = {
    "mode": "unisd_star",
    "num_auxiliary_contexts": 2,
    "fewshot_method": "random",
    "ref_model_sync_steps": 2,
}


def one_run(rank: int, group: Any, flags: dict[str, Any]) -> None:
    """On every rank of the pool."""
    train(resolve(flags, {}))


def outcome_of_run(rank: int, group: Any, flags: dict[str, Any]) -> UnisdError | None:
    """A refusal that all ranks agree on is an answer, and the pool lives on."""
    try:
        one_run(rank, group, flags)
    except UnisdError as error:
        return error
    return None


def run(world: World, size: int, output: Path, **flags: Any) -> list[dict[str, Any]]:
    """Trains on `size` ranks and returns the recorded metrics."""
    if not TINY.exists():
        write_tiny("qwen2", TINY, seed=0)
    outcomes = world.run(size, outcome_of_run, {**QUICK, **flags, "output_dir": str(output)}, timeout_s=200)
    if outcomes[0] is not None:
        raise outcomes[0]
    return read_metrics(output)


def curve(metrics: list[dict[str, Any]], *names: str) -> list[list[float]]:
    """Loss and gradient norm (and what else is named) of each step."""
    return [[row[name] for name in ("loss", "grad_norm", *names)] for row in metrics]
