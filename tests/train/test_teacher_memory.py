"""Where the teacher's weights are kept changes no number, and a run may change it when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import STAR, curve, run
from test_resume import broken_before_the_last
from world import World

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2, distributed optimizer": {"use_distributed_optimizer": True},
    "tp2, bf16": {"tensor_model_parallel_size": 2, "bf16": True},
}
KEEP = {"ref_model_sync_steps": 1, "micro_batch_size": 4, "save_steps": 2, "max_steps": 4}


def numbers(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that was recorded but times and memory."""
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "tokens_per_second", "memory/"))} for row in metrics]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_run_bit_for_bit_also_when_resumed_under_another(world: World, tmp_path: Path, name: str) -> None:
    flags = {**STAR, **KEEP, **LAYOUTS[name]}
    beside, swap, host = (run(world, 2, tmp_path / way, **flags, teacher_memory=way) for way in ("beside", "swap", "host"))
    assert len(beside) == 4 and all(row["teacher/moved"] for row in beside)
    assert numbers(beside) == numbers(swap) == numbers(host)
    for before, after in (("beside", "swap"), ("host", "beside")):
        output = broken_before_the_last(tmp_path / before, tmp_path / f"{before} {after}")
        resumed = run(world, 2, output, **flags, teacher_memory=after, resume_from_checkpoint="latest")
        assert numbers(resumed) == numbers(beside), (before, after)


def test_resumes_under_another_layout_and_another_memory(world: World, tmp_path: Path) -> None:
    """The average is cut over two ranks, then whole, then over another two of four with half the weights each."""
    flags = {**STAR, **KEEP}
    expected = run(world, 2, tmp_path / "run", **flags, teacher_memory="swap")
    replay = {"rollout": "replay", "replay_path": str(tmp_path / "run" / "rollouts")}
    for size, change in (
        (1, {"teacher_memory": "beside"}),
        (4, {"teacher_memory": "host", "pipeline_model_parallel_size": 2}),
    ):
        output = broken_before_the_last(tmp_path / "run", tmp_path / f"resumed{size}")
        metrics = run(world, size, output, **flags, **change, **replay, resume_from_checkpoint="latest")
        for found, wanted in zip(curve(metrics), curve(expected), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4), size


def test_a_frozen_teacher_too(world: World, tmp_path: Path) -> None:
    """Its weights are in the checkpoint, and not those of the student it shares a module with."""
    flags = {"mode": "clip", "micro_batch_size": 4, "save_steps": 2, "max_steps": 3}
    beside = run(world, 2, tmp_path / "beside", **flags)
    assert numbers(run(world, 2, tmp_path / "swap", **flags, teacher_memory="swap")) == numbers(beside)
    output = broken_before_the_last(tmp_path / "swap", tmp_path / "resumed")
    resumed = run(world, 2, output, **flags, teacher_memory="host", resume_from_checkpoint="latest")
    assert numbers(resumed) == numbers(beside)
    assert len({json.dumps(row["loss"]) for row in beside}) == 3
