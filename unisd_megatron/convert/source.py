"""A checkpoint to start from: a Hugging Face folder, a hub id, or a Megatron distributed checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.families import Arch, Mapping, family_of
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.model import Stage, build
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder, read_config, resolve_folder

SHARDS = "shards"
"""Folder of a Megatron checkpoint that holds the distributed shards; config.json and tokenizer lie beside it."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: where it is, what it is, and how its tensors are named."""

    path: Path
    arch: Arch
    mappings: list[Mapping]
    is_megatron: bool
    dtype: torch.dtype  # of the weights


def open_source(model_name: str, layout: Layout | None = None) -> Source:
    """Opens a checkpoint and checks it: complete, of a supported family, divisible by the layout.

    Raises `CheckpointError` or `ConfigError`.
    """
    path = resolve_folder(model_name)
    config = read_config(path)
    is_megatron = (path / SHARDS).is_dir()
    if is_megatron and not (path / SHARDS / "metadata.json").is_file():
        raise CheckpointError(f"{path}: not a complete Megatron checkpoint ({SHARDS}/metadata.json is missing)")
    family = family_of(config)
    arch = family.arch(config)
    mappings = family.mappings(arch)
    dtype = _stated_dtype(config)
    if not is_megatron:  # on every rank for all tensors: a rank other than the first that lacks one would fail unheard
        folder = HfFolder(path)
        folder.require(name for mapping in mappings for name in mapping.hf)
        dtype = folder.dtype()
    layout = layout or Layout()
    arch.check_layout(layout.tensor_model_parallel_size, layout.virtual_stages, model_name)
    return Source(path, arch, mappings, is_megatron, dtype)


def _stated_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype {name!r} is not supported; use float32, bfloat16 or float16")
    return getattr(torch, name)


def load_tokenizer(source: Source) -> Any:
    """The folder's tokenizer; `ConfigError` if there is none or it has ids that the model lacks."""
    if not any((source.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{source.path}: no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a broken file
        raise ConfigError(f"{source.path}: its tokenizer cannot be loaded ({str(error)[:200]})") from error
    if len(tokenizer) > source.arch.vocab_size:
        raise ConfigError(
            f"{source.path}: the tokenizer has {len(tokenizer)} entries and the model only {source.arch.vocab_size}"
        )
    return tokenizer


def load_stage(source: Source, layout: Layout, platform: Platform, grid: Grid) -> Stage:
    """This rank's pipeline stage with the source's weights, in the layout's dtype. Collective over all ranks."""
    from unisd_megatron.mcore import store

    model = build(source.arch, layout, platform, grid)
    if source.is_megatron:
        store.load(source.path / SHARDS, model)
    else:
        stream.load(model.named_shards(), source.mappings, HfFolder(source.path), grid.tensor)
    return model
