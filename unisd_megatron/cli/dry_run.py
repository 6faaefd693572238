"""`train --dry-run`: a run looked at from every side that needs no GPU, no hub and no torch. Nothing is written."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd_megatron.config import Layout, Run, all_settings
from unisd_megatron.data import Task
from unisd_megatron.errors import ConfigError, DataError
from unisd_megatron.families import Arch
from unisd_megatron.prepare import needs
from unisd_megatron.validation import server_urls, validate

ONLY_HERE: dict[str, Any] = {"gpus": 1, "gpus_per_node": 8, "gpu": "h100", "server_gpus": None}
"""Flags of a dry run alone, and what they are without being given."""
_USABLE = 0.9  # of a server's memory, by vLLM's own default; the rest of it is left for keys and values
_OF_A_RUN = re.compile(r"step_\d+")


@dataclass(frozen=True)
class Given:
    """What a run needs and whether it is there."""

    what: str
    name: str
    state: str

    def line(self) -> str:
        return f"  {self.what:11} {self.name}: {self.state}"


def dry_run(run: Run, request: argparse.Namespace) -> Iterator[str]:
    """What is to be said, line by line. Raises a `RequestError` where the run could not be carried out as stated."""
    from unisd_megatron.plan import Cluster, find_arch, gpu_named, plan_run, refuse

    asked = {name: value if (value := getattr(request, name)) is not None else other for name, other in ONLY_HERE.items()}
    validate(run, asked["gpus"])
    task = needs.task_of(run.data, run.objective.semantics)
    kinds = needs.kinds_of(run, task)
    output = _output(run)
    name, arch = find_arch(run.model_name)
    cluster = Cluster(asked["gpus"], min(asked["gpus_per_node"], asked["gpus"]), gpu_named(asked["gpu"]))
    plan = plan_run(run, arch, cluster)
    lines = plan.lines()
    refuse(plan)
    if run.vllm.use_vllm and run.vllm.vllm_mode == "server":
        lines += _servers(run, arch, asked["server_gpus"], cluster.gpu.memory, asked["gpu"])
    elif asked["server_gpus"] is not None:
        raise ConfigError("--server-gpus is the size of a rollout server; it needs --use_vllm --vllm_mode server")
    yield f"dry run: {run.mode} on {task.name}, {name}, {asked['gpus']} x {asked['gpu']}; nothing is started or written"
    yield "settings that are not the default:"
    yield from _settings(run)
    yield "plan (arithmetic, not measured):"
    yield from (f"  {line}" for line in lines)
    yield "files:"
    yield _model(run.model_name).line()
    yield _data(run, task).line()
    for kind in kinds:
        cache = Path(run.caches.cache_dir) / kind
        found = sorted(cache.glob(f"{task.name}-*")) if cache.is_dir() else []
        how = needs.command(kind, run.data, run.caches, run.objective.semantics, run.model_name)
        state = f"{len(found)} there; the run knows by their digest which is its own" if found else f"missing: run `{how}`"
        yield Given("cache", str(cache / f"{task.name}-<digest>"), state).line()
    yield output.line()
    yield "the dry run found nothing that speaks against a start, except what is missing above"


def _settings(run: Run) -> Iterator[str]:
    defaults: dict[str, Any] = {item.name: item.default for _, item in all_settings()}
    for name, value in run.flat().items():
        if name not in defaults or value != defaults[name]:
            yield f"  {name} = {value} ({run.origins.get(name, 'default')})"


def _servers(run: Run, arch: Arch, gpus: int | None, memory: float, gpu: str) -> Iterator[str]:
    from unisd_megatron.plan import rank_bytes

    urls = server_urls(run)
    if gpus is None:
        yield f"{len(urls)} rollout servers (give --server-gpus N to have their size checked)"
        return
    arch.check_layout(gpus, 1, run.model_name)
    weights = rank_bytes(arch, Layout(tensor_model_parallel_size=gpus, bf16=run.layout.bf16), world_size=gpus).weights
    if weights >= _USABLE * memory:
        raise ConfigError(
            f"a rollout server of {gpus} GPUs holds {weights / 2**30:.1f} GiB of {run.model_name} on each and {gpu} has "
            f"{memory / 2**30:.1f}; give servers more GPUs (--server-gpus), or larger ones"
        )
    room = (_USABLE * memory - weights) / 2**30
    yield f"{len(urls)} rollout servers of {gpus} GPUs: {weights / 2**30:.1f} GiB of weights on each, {room:.1f} for the cache"


def _model(name: str) -> Given:
    path = Path(name)
    if path.is_dir():
        return Given("model", name, "present" if any(path.glob("*.safetensors")) else "a folder without safetensors")
    return Given("model", name, _on_the_hub("models", name))


def _data(run: Run, task: Task) -> Given:
    path = run.data.data_path
    if path is None and task.hub_id is None:
        return Given("data", task.name, "built in")
    if path is None:
        return Given("data", str(task.hub_id), _on_the_hub("datasets", str(task.hub_id)))
    if not Path(path).is_file():
        return Given("data", path, "missing")
    try:
        count = len(task.load("train", path)[: run.data.num_train_examples])
    except DataError as error:
        raise ConfigError(f"--data_path {error}") from error
    return Given("data", path, f"present, {count} records")


def _on_the_hub(kind: str, name: str) -> str:
    """Whether the hub's cache on this machine has a snapshot; nothing is asked over the network."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = cache / f"{kind}--{name.replace('/', '--')}" / "snapshots"
    if folder.is_dir() and any(folder.iterdir()):
        return f"present in {cache}"
    flag = " --repo-type dataset" if kind == "datasets" else ""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    when = "before the start, since HF_HUB_OFFLINE is set" if offline else "or let the start fetch it"
    return f"missing in {cache}: `hf download{flag} {name}`, {when}"


def _output(run: Run) -> Given:
    """Raises `ConfigError` for a folder into which the run would not start."""
    folder, asked = Path(run.schedule.output_dir or ""), run.schedule.resume_from_checkpoint
    there = list(folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder}: not a folder")
    if asked is None and there:
        raise ConfigError(f"--output_dir {folder}: not empty; choose a new one, or add --resume_from_checkpoint auto")
    done = [path.name for path in (folder / "checkpoints").glob("step_*") if _OF_A_RUN.fullmatch(path.name)]
    if (folder / "finished.json").is_file():
        state = "a finished run; nothing is left to do"
    elif done:
        state = f"a run to be resumed from {max(done, key=lambda one: int(one[5:]))}"
    else:
        state = "a run without a checkpoint; it starts again" if there else "new"
    return Given("output", str(folder), state)
