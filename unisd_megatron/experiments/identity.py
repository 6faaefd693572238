"""What makes a run or an evaluation the one that it is: a digest of everything that shapes its numbers. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd_megatron.config import RELEASED_MAY_NOT_CHANGE, RESUME_MAY_CHANGE, Run
from unisd_megatron.convert import fingerprint
from unisd_megatron.data import TASKS
from unisd_megatron.errors import ConfigError

GENERATION = 1
"""Raised with every change of the code that changes what the same settings compute: runs made before it are other runs."""

RECORDED = frozenset({"eval_steps", "eval_examples", "save_rollouts"})
"""A resumed run may change them, but what a finished run left behind depends on them."""
SAMPLED = frozenset({"rollout", "use_vllm"})
"""Another engine draws other completions from the same weights."""
NOT_SHAPING = (RESUME_MAY_CHANGE - RECORDED - SAMPLED) | {"seed", "use_distributed_optimizer"}
"""Where to and how fast; of files, the contents count and not the path; the seed stands beside the digest. Nor how the
optimizer is cut up, though a run is resumed with the same alone."""
EVALUATION_NOT_SHAPING = frozenset({"data_path", "base_model_name", "base_answers", "batch_size", "workers", "unsafe"})


class Contents:
    """Digests of files and checkpoints, each read once.

    Args: memory: a folder where digests of weights are remembered between invocations; None writes nothing.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, str] = {}

    def of_file(self, path: str) -> str:
        """Of a file's bytes. Raises `ConfigError` for one that is not there."""
        if path not in self._known:
            if not Path(path).is_file():
                raise ConfigError(f"{path}: no such file")
            with Path(path).open("rb") as stream:
                self._known[path] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        return self._known[path]

    def of_model(self, name: str) -> str:
        """Of a checkpoint folder's own files; a hub id stands for itself."""
        if name not in self._known:
            folder = Path(name)
            if not folder.is_dir():
                return name
            shards = folder / "shards"
            self._known[name] = fingerprint.of_checkpoint(folder, shards if shards.is_dir() else None, cache_dir=self._memory)
        return self._known[name]

    def of_recordings(self, folder: str) -> str:
        """Of the completions that an earlier run recorded. Raises `ConfigError` for a folder without any."""
        if folder not in self._known:
            files = sorted(Path(folder).glob("step_*.jsonl"))
            if not files:
                raise ConfigError(f"{folder}: no recorded completions (step_*.jsonl) to replay")
            self._known[folder] = digest([[path.name, self.of_file(str(path))] for path in files])
        return self._known[folder]

    def of_data(self, dataset: str, path: str | None) -> str:
        """Of the file that is read; without one, where the task's records come from."""
        return self.of_file(path) if path is not None else f"hub {TASKS[dataset].hub_id}"


def digest(value: Any, length: int = 12) -> str:
    """Hexadecimal digits of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def of_run(run: Run, ranks: int, contents: Contents) -> str:
    """Of a training run, its seed apart: 12 hexadecimal digits. Layout and ranks count where they change more than rounding."""
    released = run.objective.semantics == "released"
    hidden = NOT_SHAPING - (RELEASED_MAY_NOT_CHANGE if released else frozenset())
    shaping = {name: value for name, value in run.flat().items() if name not in hidden}
    assert run.data.dataset is not None
    shaping |= {
        "generation": GENERATION,
        "model": contents.of_model(run.model_name),
        "data": contents.of_data(run.data.dataset, run.data.data_path),
    }
    if released:
        shaping["ranks"] = ranks
    if run.rollout.replay_path is not None:
        shaping["replay"] = contents.of_recordings(run.rollout.replay_path)
    if run.data.fewshot_method == "retrieval":
        shaping["embeddings"] = contents.of_model(run.caches.retrieval_model)
    if run.schedule.eval_steps and run.schedule.eval_data_path is not None:
        shaping["held_out"] = contents.of_file(run.schedule.eval_data_path)
    return digest(shaping)


def of_evaluation(dataset: str, flags: Mapping[str, Any], contents: Contents) -> str:
    """Of how a checkpoint is evaluated, the checkpoint apart: 8 hexadecimal digits."""
    shaping = {name: value for name, value in flags.items() if name not in EVALUATION_NOT_SHAPING}
    if flags.get("base_model_name") is not None:
        shaping["base"] = contents.of_model(flags["base_model_name"])
    if flags.get("base_answers") is not None:
        shaping["base_answers"] = contents.of_file(str(Path(flags["base_answers"]) / "answers.jsonl"))
    data = contents.of_data(dataset, flags.get("data_path"))
    return digest([GENERATION, dataset, data, shaping], length=8)
