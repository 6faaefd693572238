"""A run stops when asked, with a checkpoint, on all ranks alike; one command line then serves every further start."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from runs import QUICK, STAR, TINY, curve, outcome_of_run, run
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.resolve import resolve
from unisd_megatron.train import checkpoint
from unisd_megatron.train.loop import train
from unisd_megatron.train.metrics import read_metrics
from unisd_megatron.weights.tiny import write_tiny
from world import World

AUTO: dict[str, Any] = {**STAR, "pipeline_model_parallel_size": 2, "max_steps": 4, "resume_from_checkpoint": "auto"}


@pytest.fixture(autouse=True)
def tiny() -> None:
    if not TINY.exists():
        write_tiny("qwen2", TINY, seed=0)


def signalled_after_a_step(rank: int, group: Any, flags: dict[str, Any]) -> tuple[str | None, bool]:
    """Only the last rank gets the signal, while it records nothing: what was said at the end, and whether handlers are back."""
    from unisd_megatron.train import loop

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        honest = loop.train_step

        def then_a_signal(parts: Any, step: int) -> Any:
            report = honest(parts, step)
            if rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return report

        patch.setattr(loop, "train_step", then_a_signal)
        said = train(resolve(flags, {}))
    return said, signal.getsignal(signal.SIGTERM) is before


def test_a_signal_to_one_rank_stops_all_and_the_next_start_goes_on(world: World, tmp_path: Path) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    said = world.run(2, signalled_after_a_step, {**QUICK, **AUTO, "output_dir": str(output)}, timeout_s=250)
    assert said[0] == said[1] and said[0][1]
    assert str(said[0][0]).startswith("stopped after step 2 of 4 (SIGTERM)")
    assert [path.name for path in checkpoint.complete(output)] == ["step_000002"]
    assert not (output / "finished.json").exists()
    metrics = run(world, 2, output, **AUTO)
    assert curve(metrics, "entropy") == curve(run(world, 2, whole, **AUTO), "entropy")

    # Finished: nothing moves, and settings of another run are still refused.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    run(world, 2, output, **AUTO)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match=r"finished.json was written with --seed 42; this run has 7"):
        run(world, 2, output, **AUTO, seed=7)
    # An older course taken up again is not over until it is.
    assert (output / "finished.json").is_file()
    run(world, 2, output, **{**AUTO, "resume_from_checkpoint": "latest", "exit_duration_in_mins": 60.0})
    assert (output / "finished.json").is_file()


def test_its_own_time_limit_and_a_run_without_a_checkpoint_yet(world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(world, 2, output, **AUTO, exit_duration_in_mins=1e-6)
    assert len(read_metrics(output)) == 1  # every start makes a step
    first = curve(read_metrics(output))
    shutil.rmtree(output / "checkpoints")  # as if it had been killed before
    run(world, 2, output, **AUTO, exit_duration_in_mins=1e-6)
    assert curve(read_metrics(output)) == first
    shutil.rmtree(output / "checkpoints")
    with pytest.raises(ConfigError, match=r"run.json was written with --learning_rate 0.001; this run has 0.002"):
        run(world, 2, output, **{**AUTO, "learning_rate": 2e-3})
    stated = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**stated, "identity": {**stated["identity"], "data": "other"}}))
    with pytest.raises(ConfigError, match="run.json was written with data other"):
        run(world, 2, output, **AUTO)


def test_a_folder_of_something_else_is_not_touched(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    outcome = world.run(
        1,
        outcome_of_run,
        {**QUICK, "mode": "vanilla", "max_steps": 1, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"},
        timeout_s=200,
    )[0]
    assert isinstance(outcome, CheckpointError) and "no run that could be continued" in str(outcome)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def seen_differently(rank: int, group: Any, flags: dict[str, Any]) -> str:
    """The second rank's host does not see the checkpoint yet."""
    from unisd_megatron.train import folder

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(folder.checkpoint, "complete", lambda output: [])
        return str(outcome_of_run(rank, group, flags))


def test_hosts_that_see_different_checkpoints_stop(world: World, tmp_path: Path) -> None:
    flags = {**QUICK, **AUTO, "output_dir": str(tmp_path / "run"), "exit_duration_in_mins": 1e-6}
    world.run(2, outcome_of_run, flags, timeout_s=200)
    said = world.run(2, seen_differently, flags, timeout_s=200)
    assert said[0] == said[1] and "ranks see different checkpoints to resume from" in said[0]
