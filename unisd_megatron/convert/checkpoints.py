"""`convert import` and `convert export`: one parameter in memory at a time, whatever the size of the model."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.convert.source import SHARDS, Source, open_source
from unisd_megatron.convert.tokenizer import has_tokenizer, load_tokenizer
from unisd_megatron.convert.weights import Weights, weights_of
from unisd_megatron.errors import CheckFailed, CheckpointError, ConfigError, UnisdError
from unisd_megatron.exchange import broadcast_json
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import skeleton, start, streaming
from unisd_megatron.weights import stream
from unisd_megatron.weights.files import write_files
from unisd_megatron.weights.hf import SHARD_BYTES, copy_companions, new_folder, require_new_folder, unwritable

_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


@contextmanager
def world(layout: Layout) -> Iterator[tuple[platforms.Platform, Grid]]:
    """What runs here, and the process groups of the layout."""
    _return_memory_at_once()
    platform = platforms.choose()
    with start.world(platform, layout, seed=1) as grid:
        yield platform, grid


def _return_memory_at_once() -> None:
    """Tensors of a megabyte and more get memory of their own from the system, which has it back when they go.

    glibc otherwise keeps freed blocks of up to 32 MB for later: half a gigabyte of holes after a few layers.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def require_one_process(command: str) -> None:
    """Raises `ConfigError` under torchrun."""
    if start.world_size_from_environment() > 1:
        raise ConfigError(f"{command} runs in one process; start it without torchrun")


def import_folder(
    model_name: str, target: Path, layout: Layout, *, config_from: str | None = None, allow_pickle: bool = False
) -> None:
    """Hugging Face folder, or Megatron-LM checkpoint -> Megatron distributed checkpoint, complete or not there.

    It loads at any layout, however it was written; each tensor keeps its dtype. Collective over TP x PP x EP processes, or
    one. Raises `CheckpointError` if `target` exists, `ConfigError` where the model is narrower than its tokenizer,
    `CheckFailed` where the disk does not take it; see `open_source`.
    """
    processes = start.world_size_from_environment()
    layout.validate_sizes()
    require_new_folder(target)
    source = open_source(model_name, layout, config_from=config_from, allow_pickle=allow_pickle)
    if processes == 1:
        layout = Layout()  # the format is layout-free: one process writes what any layout reads
    elif source.is_megatron:
        raise ConfigError(f"{model_name}: a Megatron checkpoint is read in one process; start without torchrun")
    if has_tokenizer(source):
        load_tokenizer(source)
    layout.expert_data_parallel_size(processes)
    with world(layout) as (platform, grid):
        weights = weights_of(source, platform, grid)
        with _begun(target, source, weights, grid) as partial:
            _write_shards(partial / SHARDS, source, weights, layout, platform, grid)
            dist.barrier()


@contextmanager
def _begun(target: Path, source: Source, weights: Weights, grid: Grid) -> Iterator[Path]:
    """`new_folder`, made by rank 0 with all but the shards in it, on every rank. Collective.

    Raises, on every rank, what stopped rank 0: the others would wait for it and die of its end.
    """
    with ExitStack() as stack:
        partial, failure = target, None
        if grid.world.rank == 0:
            try:
                partial = stack.enter_context(new_folder(target))
                (partial / SHARDS).mkdir()
                copy_companions(source.path, partial, _one(weights.dtypes))
            except UnisdError as error:
                failure = error
            except OSError as error:
                failure = unwritable(error, partial)
        name, message = broadcast_json([str(partial), failure and str(failure)], 0, grid.world)
        if message is not None:
            raise failure or CheckFailed(message)
        yield Path(name)


def _write_shards(
    folder: Path, source: Source, weights: Weights, layout: Layout, platform: platforms.Platform, grid: Grid
) -> None:
    stage = skeleton.empty_stage(source.arch, layout, platform, grid)
    table = stream.by_name(source.mappings)

    def produce(name: str) -> Tensor:
        mapping = table[name]
        tensors = weights.tensors(mapping)
        stream.check_shapes(mapping, tensors, source.path)
        return mapping.shard(tensors, grid.tensor.size, grid.tensor.rank)

    streaming.save(folder, stage, lambda name: weights.dtype_of(table[name]), produce)


def export_folder(checkpoint: Path, target: Path, *, shard_bytes: int = SHARD_BYTES, config_from: str | None = None) -> None:
    """Megatron distributed checkpoint -> Hugging Face folder, complete or not there; each tensor keeps its dtype.

    One process. Raises as `import_folder` does.
    """
    require_one_process("convert export")
    require_new_folder(target)
    source = open_source(str(checkpoint), config_from=config_from)
    if not source.is_megatron:
        raise CheckpointError(f"{checkpoint}: a Hugging Face folder already; convert export reads Megatron checkpoints")
    with world(Layout()) as (platform, grid):
        weights = weights_of(source, platform, grid)
        with new_folder(target) as partial:
            copy_companions(source.path, partial, _one(weights.dtypes))
            write_files(partial, full_tensors(source, weights), None, shard_bytes)


def full_tensors(source: Source, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model under its Hugging Face name, one parameter in memory at a time."""
    for mapping in source.mappings:
        tensors = weights.tensors(mapping)
        for name in mapping.hf:
            yield name, tensors.pop(0)


def _one(dtypes: frozenset[torch.dtype]) -> torch.dtype | None:
    """What config.json shall state: the one dtype there is, or what it stated."""
    return next(iter(dtypes)) if len(dtypes) == 1 else None
