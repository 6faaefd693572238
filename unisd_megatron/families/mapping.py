"""How the tensors of a Hugging Face checkpoint become Megatron shards, and back.

A `Mapping` knows both directions, so that import, export, weight sync and gradient comparison are one list. Megatron
names are those of the local layer spec, with global layer and expert numbers. Shapes are known without torch, which is loaded
where tensors are: `unisd plan` counts with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron parameter and the Hugging Face tensors it is made of, with the shapes that these have."""

    megatron: str
    hf: tuple[str, ...]
    shapes: Shapes

    @abstractmethod
    def shard_shape(self, size: int) -> Shape:
        """What `shard` gives every one of `size` tensor-parallel ranks."""

    @abstractmethod
    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        """This rank's shard of the Megatron parameter, from full tensors in the order of `hf`."""

    @abstractmethod
    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The full tensors in the order of `hf`, from the shards of all tensor-parallel ranks in order; views where it can."""


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same on every tensor-parallel rank (norms, routers, biases that are added to sums)."""

    def shard_shape(self, size: int) -> Shape:
        return self.shapes[0]

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split(Mapping):
    """Cut along one dimension."""

    dim: int

    def shard_shape(self, size: int) -> Shape:
        (shape,) = self.shapes
        return (*shape[: self.dim], shape[self.dim] // size, *shape[self.dim + 1 :])

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenated(shards, self.dim)]


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """Rows are vocabulary entries, padded with zeros up to `padded`; the padding is trimmed on the way out."""

    padded: int

    def shard_shape(self, size: int) -> Shape:
        return (self.padded // size, *self.shapes[0][1:])

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        import torch

        (full,) = tensors
        rows = self.padded // size
        part = full[rank * rows : (rank + 1) * rows]
        return torch.cat([part, part.new_zeros(rows - part.shape[0], full.shape[1])])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenated(shards)[: self.shapes[0][0]]]


@dataclass(frozen=True)
class GateUp(Mapping):
    """Gate and up projections: each rank holds its part of the gate above its part of the up projection."""

    def shard_shape(self, size: int) -> Shape:
        return _stacked(self.shapes, size)

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return _concatenated([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_concatenated([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class QKV(Mapping):
    """Query, key and value rows, interleaved by query group: `[q of group 0, k 0, v 0, q of group 1, ...]`."""

    groups: int

    def shard_shape(self, size: int) -> Shape:
        return _stacked(self.shapes, size)

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        parts = [tensor.reshape(self.groups, rows, *tensor.shape[1:]) for tensor, rows in zip(tensors, self._rows, strict=True)]
        return _concatenated(parts, 1).chunk(size)[rank].flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        full = _concatenated(shards)
        grouped = full.reshape(self.groups, sum(self._rows), *full.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(self._rows, 1)]

    @property
    def _rows(self) -> list[int]:
        """Rows of the query, key and value parts of one query group."""
        return [shape[0] // self.groups for shape in self.shapes]


def _stacked(shapes: Shapes, size: int) -> Shape:
    """One above the other, of each its part."""
    return (sum(shape[0] for shape in shapes) // size, *shapes[0][1:])


def _concatenated(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)
