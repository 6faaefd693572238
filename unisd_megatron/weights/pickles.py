"""Pickled weights (`pytorch_model.bin`): refused, or read weights only where the user allows it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.errors import CheckpointError
from unisd_megatron.weights.files import DTYPES, Entry

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def locate_pickles(
    folder: Path, allow: bool, read_indexed: Callable[[Path, Callable[[Path], dict[str, Entry]]], dict[str, Entry]]
) -> dict[str, Entry]:
    """The tensors of a folder without safetensors. Raises `CheckpointError` unless there are pickles and they are allowed."""
    index, single = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
    if not index.is_file() and not single.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors or model.safetensors.index.json (only safetensors are read)")
    if not allow:
        raise CheckpointError(
            f"{index if index.is_file() else single}: pickled weights; only safetensors are read. "
            "`unisd convert import --allow-pickle` reads them, weights only"
        )
    return read_indexed(index, _read_names) if index.is_file() else _read_names(single)


def read_pickled(entry: Entry, name: str) -> Tensor:
    """The tensor `name` of a pickled file, in memory of its own; the file is mapped while it is copied."""
    return _load(entry.file)[name].clone(memory_format=torch.contiguous_format)


def _read_names(file: Path) -> dict[str, Entry]:
    return {
        name: Entry(file, _CODES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, 0, pickled=True)
        for name, tensor in _load(file).items()
    }


def _load(file: Path) -> dict[str, Any]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read as weights only ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(held, dict) or not all(torch.is_tensor(value) for value in held.values()):
        raise CheckpointError(f"{file}: holds something else than named tensors")
    return held
