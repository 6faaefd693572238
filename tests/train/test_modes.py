"""Every mode and every kind of teacher trains, in fp32 and bf16, and what a mode promises to move, moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from runs import STAR, curve, run
from test_resume import broken_before_the_last
from unisd_megatron.modes import MODES
from world import World

RANDOM_CONTEXTS = {"num_auxiliary_contexts": 2}
RUNNABLE = [mode for mode in MODES if not mode.endswith(("_retrieval", "_induction"))]


def flags_of(mode: str) -> dict[str, Any]:
    if mode == "unisd_star":
        return STAR
    references = {"max_completion_length": 40} if MODES[mode].completions in ("reference", "mixed") else {}
    return {"mode": mode, **(RANDOM_CONTEXTS if mode.startswith("agreement") else {}), **references}


@pytest.mark.parametrize("mode", RUNNABLE)
def test_every_mode_trains(world: World, tmp_path: Path, mode: str) -> None:
    metrics = run(world, 2, tmp_path / "run", **flags_of(mode), tensor_model_parallel_size=2, micro_batch_size=4, max_steps=3)
    assert len(metrics) == 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in metrics)


def test_a_live_teacher_is_the_student(world: World, tmp_path: Path) -> None:
    """It reads with today's weights: unlike a frozen one, from the second step on."""
    live, frozen = (
        run(world, 1, tmp_path / teacher, mode="vanilla", teacher=teacher, max_steps=2, micro_batch_size=4)
        for teacher in ("live", "frozen")
    )
    assert live[0]["loss"] == frozen[0]["loss"]
    assert live[1]["loss"] != frozen[1]["loss"]


def test_released_ema_never_moves_and_corrected_does(world: World, tmp_path: Path) -> None:
    for semantics, moves in (("released", 0.0), ("corrected", 1.0)):
        metrics = run(
            world,
            1,
            tmp_path / semantics,
            mode="ema",
            ref_model_sync_steps=1,
            semantics=semantics,
            max_steps=1,
            micro_batch_size=8,
        )
        assert metrics[0]["teacher/moved"] == moves


@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_trains_and_resumes_bit_for_bit(world: World, tmp_path: Path, sharded: bool) -> None:
    """Main parameters, Adam moments and EMA masters are fp32 and survive the checkpoint."""
    flags = {
        **STAR,
        "bf16": True,
        "tensor_model_parallel_size": 2,
        "use_distributed_optimizer": sharded,
        "micro_batch_size": 2,
        "save_steps": 2,
        "max_steps": 4,
    }
    size = 4 if sharded else 2
    expected = run(world, size, tmp_path / "run", **flags)
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    assert curve(run(world, size, output, **flags, resume_from_checkpoint="latest")) == curve(expected)
