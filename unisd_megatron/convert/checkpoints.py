"""`convert import`, `convert export` and `verify`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.config import Layout
from unisd_megatron.convert.source import SHARDS, Source, load_stage, open_source
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import schedule, start, store
from unisd_megatron.mcore.model import Stage
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder, copy_companions, require_new_folder, save_folder

LOGITS_TOLERANCE = 1e-4
"""Largest accepted difference of fp32 logits between `transformers` and Megatron."""


@contextmanager
def _world(layout: Layout) -> Iterator[tuple[platforms.Platform, Grid]]:
    platform = platforms.choose()
    with start.world(platform, layout, seed=1) as grid:
        yield platform, grid


def _layout(source: Source, layout: Layout | None = None) -> Layout:
    """bf16 checkpoints stay bf16; fp16 and fp32 ones are held in fp32, which is exact for both."""
    layout = layout or Layout()
    return Layout(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, bf16=source.dtype is torch.bfloat16)


def import_folder(model_name: str, target: Path, layout: Layout) -> None:
    """Hugging Face folder -> Megatron distributed checkpoint, complete or not there. Collective over TP x PP processes.

    It loads at any layout, however it was written. Raises `CheckpointError` if `target` exists.
    """
    world = start.world_size_from_environment()
    require_new_folder(target)
    source = open_source(model_name, layout)
    if world == 1:
        layout = Layout()  # the format is layout-free: one process writes what any layout reads
    layout = _layout(source, layout)
    layout.data_parallel_size(world)
    partial = target.with_name(target.name + ".partial")
    with _world(layout) as (platform, grid):
        model = load_stage(source, layout, platform, grid)  # a broken source is refused before anything is written
        dist.barrier()
        if grid.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / SHARDS).mkdir(parents=True)
            copy_companions(source.path, partial, source.dtype)
        dist.barrier()
        store.save(partial / SHARDS, model)
        dist.barrier()
        if grid.world.rank == 0:
            os.replace(partial, target)


def export_folder(checkpoint: Path, target: Path) -> None:
    """Megatron distributed checkpoint -> Hugging Face folder in the dtype its config states. One process."""
    _require_one_process("convert export")
    require_new_folder(target)
    source = open_source(str(checkpoint))
    if not source.is_megatron:
        raise CheckpointError(f"{checkpoint}: a Hugging Face folder already; convert export reads Megatron checkpoints")
    with _world(_layout(source)) as (platform, grid):
        model = load_stage(source, _layout(source), platform, grid)
        tensors = stream.full_tensors(model.named_shards(), source.mappings, grid)
        save_folder(target, source.path, tensors, dtype=source.dtype)


def _require_one_process(command: str) -> None:
    if start.world_size_from_environment() > 1:
        raise ConfigError(f"{command} runs in one process; start it without torchrun")


@dataclass(frozen=True)
class Comparison:
    """Largest absolute difference of each tensor, largest first, and of fp32 logits on random prompts."""

    tensors: list[tuple[str, float]]
    logits: float


def compare_checkpoints(model_name: str, against: Path) -> Comparison:
    """A Hugging Face checkpoint against a Megatron or Hugging Face one. One process."""
    _require_one_process("verify")
    ours, other = open_source(model_name), open_source(str(against))
    if ours.is_megatron:
        raise CheckpointError(f"{model_name}: --model_name is the Hugging Face side; give the Megatron folder to --against")
    if ours.arch != other.arch:
        raise CheckpointError(f"{against}: another model than {model_name} (config.json differs)")
    with _world(Layout()) as (platform, grid):
        model = load_stage(other, Layout(), platform, grid)
        folder = HfFolder(ours.path)
        tensors = [
            (name, float((tensor - folder.tensor(name).float()).abs().max()))
            for name, tensor in stream.full_tensors(model.named_shards(), other.mappings, grid)
        ]
        logits = _logits_difference(ours, model, grid)
    return Comparison(sorted(tensors, key=lambda one: -one[1]), logits)


def _logits_difference(ours: Source, model: Stage, grid: Grid) -> float:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(ours.path, dtype=torch.float32, trust_remote_code=False).to(grid.device)
    generator = torch.Generator().manual_seed(0)
    length = min(64, ours.arch.max_position)
    tokens = torch.randint(0, ours.arch.vocab_size, (4, length), generator=generator).to(grid.device)
    everywhere = torch.cartesian_prod(torch.arange(4), torch.arange(length)).to(grid.device)

    def listen(_: int, rows: Tensor) -> Tensor:
        return (rows @ model.head_weight().t())[:, : ours.arch.vocab_size]

    (found,) = schedule.score(model.chunks, [View(tokens, everywhere)], listen, grid)
    with torch.no_grad():
        return float((found - reference(tokens).logits.flatten(0, 1)).abs().max())
