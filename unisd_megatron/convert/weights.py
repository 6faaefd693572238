"""The weights of a checkpoint of either kind, one parameter at a time: what import, export and verify read from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from unisd_megatron.convert.source import Source
from unisd_megatron.families import Mapping
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.reading import ModelReader


class Weights(Protocol):
    """Full Hugging Face tensors of one parameter after the other, in the dtype they are stored in."""

    dtypes: frozenset[torch.dtype]

    def tensors(self, mapping: Mapping) -> list[Tensor]:
        """The tensors of a mapping, in the order of `mapping.hf`, on the CPU."""

    def dtype_of(self, mapping: Mapping) -> torch.dtype:
        """The dtype of a mapping's tensors."""


class FolderWeights:
    """Of a Hugging Face folder. See `Weights`."""

    def __init__(self, source: Source) -> None:
        self._folder = source.folder()
        self.dtypes = frozenset(self.dtype_of(mapping) for mapping in source.mappings)

    def tensors(self, mapping: Mapping) -> list[Tensor]:
        return [self._folder.tensor(name) for name in mapping.hf]

    def dtype_of(self, mapping: Mapping) -> torch.dtype:
        return self._folder.dtype_of(mapping.hf[0])


class ShardWeights:
    """Of a distributed checkpoint; in one process. See `Weights`."""

    def __init__(self, reader: ModelReader) -> None:
        self._reader = reader
        self.dtypes = reader.dtypes()

    def tensors(self, mapping: Mapping) -> list[Tensor]:
        return mapping.join([self._reader.parameter(mapping.megatron)])

    def dtype_of(self, mapping: Mapping) -> torch.dtype:
        return self._reader.dtype_of(mapping.megatron)


def weights_of(source: Source, platform: Platform, grid: Grid) -> Weights:
    """Opens the weights of a checkpoint. Raises `CheckpointError` where they are not those of its config."""
    if source.shards is None:
        return FolderWeights(source)
    return ShardWeights(ModelReader(source.shards, source.arch, platform, grid))
