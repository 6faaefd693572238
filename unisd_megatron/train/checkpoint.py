"""Checkpoint folders of a run: complete or not there, kept to a number, found again.

    RUN/checkpoints/step_000100/shards/     student, teacher and optimizer, any layout (`mcore/store.py`)
    RUN/checkpoints/step_000100/state.json  steps done, clip ceiling, the settings it was written under
    RUN/checkpoints/step_000100/config.json and the tokenizer, for `evaluate` and `convert export`

A folder is written as `step_000100.<random>.partial` and renamed when everything is on disk. Whatever is random derives from
(seed, purpose, step), so the number of steps done restores data order and sampling.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unisd_megatron.config import RELEASED_MAY_NOT_CHANGE, RESUME_MAY_CHANGE, Run
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.exchange import broadcast_json
from unisd_megatron.train.learner import Learner
from unisd_megatron.weights.hf import copy_companions, read_json, resolve_folder

_NAME = re.compile(r"step_(\d+)")
_ADVICE = {
    "model": "; --model_name is to be the checkpoint that it began from",
    "processes": "; start as many, since --semantics released normalises on each of them",
}
"""What would be right where a part of a run's identity is another."""


def complete(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find(output_dir: Path, asked: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names. Raises `CheckpointError` if it is missing or incomplete."""
    if asked == "latest":
        found = complete(output_dir)
        if not found:
            raise CheckpointError(f"{output_dir}: no complete checkpoint to resume from")
        path = found[-1]
    else:
        path = Path(asked)
    if path.name.endswith(".partial"):
        raise CheckpointError(f"{path}: half-written checkpoint; use `latest` or a folder without .partial")
    read_state(path)
    return path


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder; `CheckpointError` if the folder is no complete checkpoint."""
    for needed in ("state.json", "shards/metadata.json"):
        if not (path / needed).is_file():
            raise CheckpointError(f"{path}: not a complete checkpoint ({needed} is missing)")
    state = read_json(path / "state.json")
    if not {"steps_done", "clip_ceiling", "identity", "settings"} <= state.keys():
        raise CheckpointError(f"{path}/state.json: not written by this program")
    return state


def check_same_run(state: dict[str, Any], run: Run, identity: dict[str, Any], path: Path) -> None:
    """Raises `ConfigError` where a setting, or what else makes the run itself, differs from the checkpoint's."""
    fixed = RELEASED_MAY_NOT_CHANGE if run.objective.semantics == "released" else frozenset()
    for name, value in run.flat().items():
        before = state["settings"].get(name, value)
        if name not in RESUME_MAY_CHANGE - fixed and before != value:
            raise ConfigError(f"{path} was written with --{name} {before}; this run has {value}. Resume with the same settings")
    for name, value in identity.items():
        before = state["identity"].get(name)
        if before != value:
            raise ConfigError(f"{path} was written with {name} {before}; this run has {value}{_ADVICE.get(name, '')}")


class Saver:
    """Writes the checkpoints of a run and keeps them to a number; with `--async_save`, while training goes on.

    Args: identity: what makes the run itself beside its settings (`Prepared.identity`).
    """

    def __init__(self, learner: Learner, run: Run, identity: dict[str, Any]) -> None:
        from unisd_megatron.mcore.writing import Background

        assert run.schedule.output_dir is not None
        self._folder = Path(run.schedule.output_dir) / "checkpoints"
        self._learner, self._run, self._identity = learner, run, identity
        self._background = Background() if run.schedule.async_save else None
        self._on_its_way: tuple[Path, Path] | None = None  # partial folder, final name

    def save(self, steps_done: int) -> None:
        """Writes, or begins to write, the checkpoint of this moment, after `steps_done` optimizer steps. Collective."""
        from unisd_megatron.mcore import store

        self.finish(wait=True)
        learner = self._learner
        final = self._folder / f"step_{steps_done:06d}"
        # A name of its own, so that what a killed run's writer still writes can never mix with this.
        token = broadcast_json(secrets.token_hex(4), 0, learner.grid.world)
        partial = final.with_name(f"{final.name}.{token}.partial")
        if learner.grid.world.rank == 0:
            for abandoned in self._folder.glob("*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)
            (partial / "shards").mkdir(parents=True)
            self._describe(partial, steps_done)
        dist.barrier()
        store.save(partial / "shards", learner.student.model, learner.student, learner.teacher, self._background)
        self._on_its_way = partial, final
        if self._background is None:
            self._publish()

    def finish(self, *, wait: bool) -> None:
        """Makes a checkpoint that is on its way visible once every rank has written its part. Collective.

        Args: wait: until that is so. Raises `CheckFailed`, on every rank, where a rank could not write.
        """
        if self._background is not None and self._background.finish(wait=wait):
            self._publish()

    def _describe(self, partial: Path, steps_done: int) -> None:
        learner = self._learner
        copy_companions(resolve_folder(self._run.model_name), partial, learner.student.model.config.params_dtype)
        state = {
            "steps_done": steps_done,
            "clip_ceiling": learner.objective.ceiling,
            "identity": self._identity,
            "settings": self._run.flat(),
        }
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    def _publish(self) -> None:
        assert self._on_its_way is not None
        partial, final = self._on_its_way
        dist.barrier()
        if self._learner.grid.world.rank == 0:
            partial.rename(final)
            _prune(final, self._run.schedule.save_total_limit)
        dist.barrier()
        self._on_its_way = None


def set_aside_later(output_dir: Path, steps_done: int) -> None:
    """Renames checkpoints beyond a step that a run is resumed from: they belong to a course that is not continued."""
    for path in complete(output_dir):
        if int(path.name.removeprefix("step_")) > steps_done:
            _remove(path.with_name(path.name + ".superseded"))
            path.rename(path.with_name(path.name + ".superseded"))


def _prune(newest: Path, limit: int) -> None:
    others = [path for path in complete(newest.parent.parent) if path != newest]
    for old in others[: max(0, len(others) + 1 - limit)] if limit else []:
        _remove(old)


def _remove(path: Path) -> None:
    """Deletes a folder that must never be seen half deleted under its own name."""
    if path.exists():
        doomed = path.with_name(path.name + ".partial")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def restore(path: Path, learner: Learner) -> int:
    """Loads a checkpoint under the present layout; returns the optimizer steps it has behind it. Collective."""
    from unisd_megatron.mcore import store

    state = read_state(path)
    store.load(path / "shards", learner.student.model, learner.student, learner.teacher)
    learner.objective.ceiling = state["clip_ceiling"]
    return int(state["steps_done"])
