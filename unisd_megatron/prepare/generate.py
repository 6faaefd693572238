"""The model that writes into a cache: the engine it speaks through, in as many processes as torchrun started."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from unisd_megatron.config import Layout, Vllm
from unisd_megatron.convert.source import Source, load_stage
from unisd_megatron.errors import MissingDependency
from unisd_megatron.exchange import broadcast_json
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.prepare.cache import Appending, Header
from unisd_megatron.prepare.order import Order, generation_dtype
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.buckets import WeightStream

GPU_MEMORY = 0.85  # of a GPU; nothing else runs on it


class Writer:
    """An engine and the tokenizer of its model. Every call is collective over the world."""

    def __init__(self, engine: RolloutEngine, tokenizer: Any, grid: Grid) -> None:
        self._engine, self._tokenizer, self.grid = engine, tokenizer, grid

    @property
    def leads(self) -> bool:
        """Whether this rank keeps the cache."""
        return self.grid.world.rank == 0

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[str]:
        """The answers without the tokens that ended them, in order, on every rank."""
        if not requests:
            return []
        ends = set(sampling.eos_ids)
        answers = self._engine.generate(requests, sampling)
        return [self._tokenizer.decode([i for i in one.token_ids if i not in ends]) for one in answers]

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return broadcast_json(value, 0, self.grid.world)


@contextlib.contextmanager
def open_writer(order: Order, tokenizer: Any, *, longest: int, structured: bool) -> Iterator[Writer]:
    """The order's model behind its engine.

    Args: longest: prompt and completion together, tokens; structured: JSON of a schema is asked for. Collective over the world.
    """
    source, platform = order.source, platforms.choose()
    layout = Layout(global_batch_size=start.world_size_from_environment(), bf16=platform.device.type != "cpu")
    with start.world(platform, layout, order.caches.cache_seed) as grid:
        engine = _engine(order, source, grid, tokenizer, longest, structured)
        with contextlib.closing(engine):
            if source.is_megatron or order.caches.cache_engine == "vllm":  # which starts with no weights
                model = load_stage(source, layout, platform, grid)
                engine.refresh(WeightStream(model.named_shards, source.mappings, grid), 0)
            yield Writer(engine, tokenizer, grid)


def _engine(order: Order, source: Source, grid: Grid, tokenizer: Any, longest: int, structured: bool) -> RolloutEngine:
    dtype = generation_dtype()
    if order.caches.cache_engine == "transformers":
        return TransformersEngine(source.path, grid, dtype, tokenizer=tokenizer)
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependency("--cache_engine vllm: vLLM is not installed; install the extra `vllm`, or leave it out")
    from unisd_megatron.rollout.colocated import ColocatedEngine  # imports vLLM, which changes its process

    settings = Vllm(use_vllm=True, vllm_gpu_memory_utilization=GPU_MEMORY)
    return ColocatedEngine(source.path, grid, dtype, settings, max_model_len=longest, structured=structured)


class Log:
    """A cache that rank 0 appends to and all ranks keep count of; a context manager. Collective over the world."""

    def __init__(self, writer: Writer, path: Path, header: Header, align: int) -> None:
        self._writer = writer
        self._cache = Appending(path, header, align) if writer.leads else None
        self.done: int = writer.agreed(self._cache.done if self._cache is not None else None)
        self._progress = Progress(path.name, header["rows"], self.done, writer.leads)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows; on ranks other than 0 only to the count."""
        if self._cache is not None:
            self._cache.append(rows)
        self.done += len(rows)
        self._progress.advance(len(rows))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.close()
        if self._cache is not None:
            self._cache.__exit__(kind, error, trace)
        if error is None:
            self._writer.agreed(None)  # from here on every rank finds the file


class Progress:
    """How far the work has come, on standard error: a bar on a terminal, elsewhere a line at every tenth."""

    def __init__(self, name: str, total: int, done: int, speaks: bool) -> None:
        self._name, self._total, self._done = name, total, done
        terminal = sys.stderr.isatty()
        self._plain = speaks and not terminal
        self._bar = tqdm(total=total, initial=done, desc=name, disable=not (speaks and terminal), file=sys.stderr)
        if self._plain and done:
            print(f"{name}: resumed at {done} of {total}", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """So many more are done."""
        before = 10 * self._done // self._total
        self._done += count
        self._bar.update(count)
        if self._plain and 10 * self._done // self._total > before:
            print(f"{self._name}: {self._done} of {self._total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
