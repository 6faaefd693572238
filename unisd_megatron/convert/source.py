"""A checkpoint to start from: a Hugging Face folder, a hub id, or a Megatron distributed checkpoint."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.families import Arch, Mapping, family_of
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import precision
from unisd_megatron.mcore.model import Stage, build
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder, read_config, resolve_folder

SHARDS = "shards"
"""Folder of a Megatron checkpoint that holds the distributed shards; config.json and tokenizer lie beside it."""
TRACKER = "latest_checkpointed_iteration.txt"
"""What Megatron-LM writes beside its checkpoints: which of them is the last."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: where it is, what it is, and how its tensors are named."""

    path: Path  # config.json and tokenizer
    arch: Arch
    mappings: list[Mapping]
    shards: Path | None  # of a Megatron checkpoint
    dtype: torch.dtype  # of the weights, the widest; of a Megatron checkpoint, what its config.json states
    allow_pickle: bool = False

    @property
    def is_megatron(self) -> bool:
        return self.shards is not None

    def folder(self) -> HfFolder:
        """The weights of a Hugging Face folder."""
        return HfFolder(self.path, allow_pickle=self.allow_pickle)


def open_source(
    model_name: str, layout: Layout | None = None, *, config_from: str | None = None, allow_pickle: bool = False
) -> Source:
    """Opens a checkpoint and checks it: complete, of a supported family, every shape right, divisible by the layout.

    Reads configurations and headers, no weights. Args: config_from: a Hugging Face folder that describes a checkpoint of
    Megatron-LM's; allow_pickle: read `pytorch_model.bin`, weights only. Raises `CheckpointError` or `ConfigError`.
    """
    path = resolve_folder(model_name, allow_pickle=allow_pickle)
    shards = _shards_of(path)
    if shards is not None and not (shards / "metadata.json").is_file():
        raise CheckpointError(f"{path}: not a complete Megatron checkpoint ({shards.name}/metadata.json is missing)")
    if config_from is not None:
        if shards is None or shards.name == SHARDS:
            raise ConfigError(f"--config_from is for checkpoints of Megatron-LM; {path} has a config.json of its own")
        path = resolve_folder(config_from)
    elif shards is not None and shards.name != SHARDS:
        raise ConfigError(f"{shards}: a checkpoint of Megatron-LM; give --config_from a Hugging Face folder of this model")
    config = read_config(path)
    arch, mappings = _model_of(path, config)
    source = Source(path, arch, mappings, shards, _stated_dtype(path, config), allow_pickle)
    if shards is None:
        folder = source.folder()
        _check_folder(folder, arch, mappings)
        held = (folder.dtype_of(name) for mapping in mappings for name in mapping.hf)  # the config may state another
        source = Source(path, arch, mappings, None, functools.reduce(torch.promote_types, held), allow_pickle)
    layout = layout or Layout()
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    arch.check_layout(tensor, layout.virtual_stages, model_name, expert, layout.pipeline_ends)
    return source


def _shards_of(path: Path) -> Path | None:
    """The distributed checkpoint in a folder: ours, or Megatron-LM's (the folder of an iteration, or the one above it)."""
    if (path / SHARDS).is_dir():
        return path / SHARDS
    if (path / TRACKER).is_file():
        step = (path / TRACKER).read_text().strip()
        path = path / (step if step == "release" else f"iter_{step:>07}")
        if not path.is_dir():
            raise CheckpointError(f"{path}: missing, though {TRACKER} names it")
    if any(path.glob("mp_rank_*")):
        raise CheckpointError(f"{path}: Megatron-LM's older format; save it with --ckpt-format torch_dist")
    return path if (path / "metadata.json").is_file() and (path / ".metadata").is_file() else None


def _model_of(path: Path, config: dict[str, Any]) -> tuple[Arch, list[Mapping]]:
    if config.get("quantization_config"):
        raise ConfigError(
            f"{path}/config.json: quantization_config: quantised weights are not read; give the unquantised model"
        )
    try:
        family = family_of(config)
        arch = family.arch(config)
    except ConfigError as error:
        raise ConfigError(f"{path}/{error}" if str(error).startswith("config.json") else str(error)) from error
    if arch.num_attention_heads % arch.num_query_groups:
        raise ConfigError(
            f"{path}/config.json: {arch.num_query_groups} key/value heads do not divide {arch.num_attention_heads} heads"
        )
    return arch, family.mappings(arch)


def _stated_dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{path}/config.json: dtype {name!r} is not supported; use float32, bfloat16 or float16")
    return getattr(torch, name)


def _check_folder(folder: HfFolder, arch: Arch, mappings: list[Mapping]) -> None:
    """On every rank for all tensors: a rank other than the first that lacks one would fail unheard."""
    names = [name for mapping in mappings for name in mapping.hf]
    folder.refuse_others(set(names), arch.tied)
    folder.require(names)
    for mapping in mappings:
        for name, shape in zip(mapping.hf, mapping.shapes, strict=True):
            if folder.shape(name) != shape:
                raise CheckpointError(f"{folder.file(name)}: {name} is {folder.shape(name)}; config.json says {shape}")
        first, *others = mapping.hf
        for name in others:  # they become one tensor
            if folder.dtype_of(name) != folder.dtype_of(first):
                dtypes = f"{folder.dtype_of(name)} and {first} {folder.dtype_of(first)}".replace("torch.", "")
                raise CheckpointError(f"{folder.file(name)}: {name} is {dtypes}; give them one dtype")


def load_stage(source: Source, layout: Layout, platform: Platform, grid: Grid) -> Stage:
    """This rank's pipeline stage with the source's weights, in the layout's dtype. Collective over all ranks."""
    from unisd_megatron.mcore import store

    model = build(source.arch, layout, platform, grid)
    if source.shards is not None:
        store.load(source.shards, model)
    else:
        stream.load(model.named_shards(), source.mappings, source.folder(), grid.tensor, precision.write)
    return model
