"""A run that must not go on stops on every rank, says where, and leaves the last good checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import QUICK, TINY, one_run
from unisd_megatron.errors import CheckFailed
from unisd_megatron.mechanisms.objective import TokenStats
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.train import checkpoint, step
from unisd_megatron.weights.tiny import write_tiny
from world import World

FLAGS: dict[str, Any] = {
    **QUICK,
    "mode": "match_joint",
    "tensor_model_parallel_size": 2,
    "max_steps": 4,
    "save_steps": 2,
    "micro_batch_size": 4,
}


def message_of_stop(rank: int, group: Any, flags: dict[str, Any], sabotage: Callable[[pytest.MonkeyPatch], None]) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sabotage(monkeypatch)
        try:
            one_run(rank, group, flags)
        except CheckFailed as error:
            return str(error)
    return "did not stop"


def infinite_feature_in_step_three(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = step._compare, [0]

    def broken(*args: Any) -> TokenStats:
        stats = honest(*args)
        calls[0] += 1
        if calls[0] == 5:  # two micro-batches per step
            object.__setattr__(stats, "feature", stats.feature + torch.inf)
        return stats

    monkeypatch.setattr(step, "_compare", broken)


def infinite_auxiliary_log_prob(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = step.sampled_log_probs
    monkeypatch.setattr(step, "sampled_log_probs", lambda *args, **kwargs: honest(*args, **kwargs) * torch.nan)


def stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TransformersEngine.refresh

    def once(self: TransformersEngine, weights: Any, number: int) -> None:
        if number == 0:
            honest(self, weights, number)

    monkeypatch.setattr(TransformersEngine, "refresh", once)


@pytest.fixture(autouse=True)
def tiny() -> None:
    if not TINY.exists():
        write_tiny("qwen2", TINY, seed=0)


def test_a_loss_that_is_not_finite(world: World, tmp_path: Path) -> None:
    flags = {**FLAGS, "output_dir": str(tmp_path / "run")}
    messages = world.run(2, message_of_stop, flags, infinite_feature_in_step_three, timeout_s=120)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 2: not finite: feature distance (rank 0)")
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["step_000002"]


def test_an_agreement_that_is_not_finite(world: World, tmp_path: Path) -> None:
    flags = {**FLAGS, "mode": "agreement_tok_random", "num_auxiliary_contexts": 2, "output_dir": str(tmp_path / "run")}
    messages = world.run(2, message_of_stop, flags, infinite_auxiliary_log_prob, timeout_s=120)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 0: not finite: agreement weights (rank 0)")


def test_an_engine_with_stale_weights(world: World, tmp_path: Path) -> None:
    flags = {**FLAGS, "output_dir": str(tmp_path / "run")}
    messages = world.run(2, message_of_stop, flags, stale_weights, timeout_s=120)
    assert messages[0] == messages[1]
    assert "step 1: the rollout engine's log-probs differ from Megatron's" in messages[0]
