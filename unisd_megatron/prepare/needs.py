"""Which caches a run reads, and the command that prepares each. No torch here."""

from __future__ import annotations

import shlex
from dataclasses import fields

from unisd_megatron.caches import CACHE_SETTINGS, NEGATIVE_CACHE, CacheKind, Caches
from unisd_megatron.config import Data, Run
from unisd_megatron.data import TASKS, Task
from unisd_megatron.data.task import Semantics
from unisd_megatron.errors import ConfigError


def task_of(data: Data, semantics: Semantics) -> Task:
    """The task that is trained on; `ConfigError` for one that is not known or is for evaluation only."""
    if data.dataset not in TASKS:
        raise ConfigError(f"unknown --dataset {data.dataset!r}; use one of {', '.join(TASKS)}")
    task = TASKS[data.dataset](semantics)
    if "train" not in task.splits:
        known = ", ".join(name for name, one in TASKS.items() if "train" in one.splits)
        raise ConfigError(f"--dataset {task.name} is for evaluation only; train on one of {known}")
    return task


def kinds_of(run: Run, task: Task) -> list[CacheKind]:
    """The kinds of caches that the run reads. `ConfigError` where no rule makes wrong solutions, or settings are idle."""
    method = run.data.fewshot_method if run.agreement is not None else None
    kinds: list[CacheKind] = []
    if method == "retrieval":
        kinds.append("embeddings")
    if method == "induction":
        kinds.append("induction")
    if run.needs_negative and _generates(run, task):
        kinds.append("negatives")
    return kinds


def _generates(run: Run, task: Task) -> bool:
    """Whether the run's wrong solutions are a model's."""
    rule = task.has_rule()
    chosen = run.data.negatives or ("corrupted" if rule else "generated")
    if chosen == "corrupted" and not rule:
        raise ConfigError(f"--negatives corrupted: --dataset {task.name} has no rule for wrong solutions; use generated")
    if chosen == "generated" and not task.has_request():
        raise ConfigError(f"--negatives generated: {task.name} has no kinds of wrong solutions to ask for; use corrupted")
    idle = [name for name in sorted(NEGATIVE_CACHE) if run.origins.get(name) == "flag"]
    if chosen == "corrupted" and idle:
        raise ConfigError(f"--{idle[0]} does nothing with --negatives corrupted, the choice for {task.name}; drop it")
    return chosen == "generated"


def command(kind: CacheKind, data: Data, caches: Caches, semantics: Semantics, model_name: str | None) -> str:
    """The command line that prepares a cache of this kind."""
    words = ["unisd", "prepare", kind, "--dataset", data.dataset or ""]
    model = None if kind == "embeddings" else model_name
    stated = {"data_path": data.data_path, "num_train_examples": data.num_train_examples, "model_name": model}
    stated |= {"semantics": semantics if semantics != "corrected" else None}
    for item in fields(Caches):
        if item.name in CACHE_SETTINGS[kind] | {"cache_dir"}:
            value = getattr(caches, item.name)
            stated[item.name] = value if value != item.default else None
    words += [word for name, value in stated.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(words)
