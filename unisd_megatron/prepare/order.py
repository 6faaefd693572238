"""What is to be prepared: a task's records, the model that prepares, and the settings that shape a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from unisd_megatron.caches import CACHE_SETTINGS, CacheKind, Caches
from unisd_megatron.config import Data
from unisd_megatron.convert import fingerprint
from unisd_megatron.convert.source import Source, open_source
from unisd_megatron.data import Record, Task
from unisd_megatron.data.contexts import pool_of
from unisd_megatron.data.task import Semantics
from unisd_megatron.errors import ConfigError
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.prepare import needs
from unisd_megatron.prepare.cache import FORMAT


@dataclass(frozen=True)
class Order:
    """A request to prepare, from the command line or as a training run needs it."""

    data: Data
    semantics: Semantics
    caches: Caches
    model_name: str | None = None  # None: embeddings need none
    writes: bool = False  # asked for by `prepare`, which makes the cache folder; a run only reads

    @cached_property
    def task(self) -> Task:
        """Raises `ConfigError` for one that is not known, or that is not trained on."""
        return needs.task_of(self.data, self.semantics)

    @cached_property
    def pool(self) -> list[Record]:
        """All records that may be donors."""
        return pool_of(self.task, self.task.load("train", self.data.data_path), self.data.num_train_examples)

    @property
    def records(self) -> list[Record]:
        """Those that are trained on."""
        return self.pool[: self.data.num_train_examples]

    @cached_property
    def source(self) -> Source:
        """The opened checkpoint; raises as `open_source` does."""
        assert self.model_name is not None
        return open_source(self.model_name)

    def written_header(self, kind: CacheKind, rows: int, prompts: list[str]) -> dict[str, object]:
        """All that shapes what the model writes in answer to the prompts."""
        source, settings = self.source, {name: getattr(self.caches, name) for name in sorted(CACHE_SETTINGS[kind])}
        cache_dir = Path(self.caches.cache_dir)
        if self.writes:  # so that the weights are read in full once, and not by the run again
            cache_dir.mkdir(parents=True, exist_ok=True)
        return {
            "kind": kind,
            "format": FORMAT,
            "task": self.task.name,
            "semantics": self.semantics,
            "data": fingerprint.of_records(self.records),
            "rows": rows,
            "model": Path(str(self.model_name)).name,
            "weights": fingerprint.of_checkpoint(source.path, source.shards, cache_dir=cache_dir),
            "dtype": str(generation_dtype()).removeprefix("torch."),
            "prompts": fingerprint.of_texts(prompts),
            **settings,
        }

    def command(self, kind: CacheKind) -> str:
        """The command line that prepares this."""
        return needs.command(kind, self.data, self.caches, self.semantics, self.model_name)


def missing(order: Order, kind: CacheKind, path: Path) -> ConfigError:
    """The error of a run that needs a cache which is not there."""
    return ConfigError(f"{path}: not prepared yet; run `{order.command(kind)}` first")


def generation_dtype() -> torch.dtype:
    """The dtype in which caches are written: bf16 on a GPU, fp32 without."""
    return torch.float32 if platforms.choose().device.type == "cpu" else torch.bfloat16
