"""A checkpoint written while training goes on is of its moment, and complete or not there."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from runs import QUICK, STAR, TINY, one_run, run
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.mcore import store, writing
from unisd_megatron.resolve import resolve
from unisd_megatron.train import checkpoint
from unisd_megatron.validation import validate
from unisd_megatron.weights.tiny import write_tiny
from world import World

FLAGS: dict[str, Any] = {
    **STAR,
    "token_clip_quantile": 0.9,
    "ref_model_sync_steps": 1,
    "tensor_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "save_steps": 2,
    "save_total_limit": 0,
    "max_steps": 5,
}


def held_up(rank: int, group: Any, flags: dict[str, Any]) -> None:
    """A run whose first write waits until two more steps are done, and notes what could be picked up by then."""
    output, honest = Path(flags["output_dir"]), filesystem_async._write_item

    @functools.wraps(honest)  # its signature is looked at
    def late(*args: Any, **kwargs: Any) -> Any:
        for _ in range(600):
            if len((output / "metrics.jsonl").read_text().splitlines()) >= 4:
                break
            time.sleep(0.1)
        with (output / "seen").open("a") as stream:
            stream.write(json.dumps([path.name for path in checkpoint.complete(output)]) + "\n")
        return honest(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(filesystem_async, "_write_item", late)
        one_run(rank, group, flags)


def tensors(rank: int, group: Any, folder: Path) -> dict[str, torch.Tensor]:
    return store.tensors(folder / "shards")


def test_the_snapshot_is_of_its_moment_and_not_there_until_it_is_written(world: World, tmp_path: Path) -> None:
    run(world, 2, tmp_path / "waited", **FLAGS)
    meanwhile = {**QUICK, **FLAGS, "async_save": True, "output_dir": str(tmp_path / "meanwhile")}
    world.run(2, held_up, meanwhile, timeout_s=120)
    seen = [json.loads(line) for line in (tmp_path / "meanwhile" / "seen").read_text().splitlines()]
    assert seen[0] == []
    for name in ("step_000002", "step_000004", "step_000005"):
        folders = [tmp_path / which / "checkpoints" / name for which in ("waited", "meanwhile")]
        (wanted,), (found,) = [world.run(1, tensors, folder) for folder in folders]
        assert wanted.keys() == found.keys() and {name.partition(".")[0] for name in wanted} == {
            "student",
            "optimizer",
            "teacher",
        }
        assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
        states = [checkpoint.read_state(folder) for folder in folders]
        assert states[0]["clip_ceiling"] == states[1]["clip_ceiling"]
        assert states[0]["steps_done"] == states[1]["steps_done"] == int(name[-6:])
    assert [path.name for path in (tmp_path / "meanwhile" / "checkpoints").iterdir() if path.suffix == ".partial"] == []


def message_of_stop(rank: int, group: Any, flags: dict[str, Any], sabotage: Callable[[Any], None]) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        honest = checkpoint.Saver.save

        def save(self: checkpoint.Saver, steps_done: int) -> None:
            if steps_done == 4 and rank == 1:
                sabotage(monkeypatch)
            honest(self, steps_done)

        monkeypatch.setattr(checkpoint.Saver, "save", save)
        try:
            one_run(rank, group, flags)
        except CheckFailed as error:
            return str(error)
    return "did not stop"


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem_async, "_write_item", write)


def killed_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing._Results, "put", lambda self, results: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(("sabotage", "async_save"), [(full_disk, True), (full_disk, False), (killed_writer, True)])
def test_a_write_that_fails_on_one_rank_stops_all(
    world: World, tmp_path: Path, sabotage: Callable[[Any], None], async_save: bool
) -> None:
    if not TINY.exists():
        write_tiny("qwen2", TINY, seed=0)
    output = tmp_path / "run"
    flags = {**QUICK, **FLAGS, "async_save": async_save, "output_dir": str(output)}
    messages = world.run(2, message_of_stop, flags, sabotage, timeout_s=120)
    assert all("step_000004" in message and "could not be written" in message for message in messages), messages
    assert checkpoint.find(output, "latest").name == "step_000002"


def test_a_platform_that_cannot_fork_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    asked = resolve({**QUICK, **FLAGS, "async_save": True, "output_dir": "run"}, {})
    with pytest.raises(ConfigError, match="cannot fork"):
        validate(asked, 2)
