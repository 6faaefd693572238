"""Shards on a grid <-> full Hugging Face tensors, one at a time.

`load` fills this rank's shards; `full_tensors` yields every full tensor on every rank of the replica, and is the one
stream that export, the rollout engine and the gradient comparison use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.errors import CheckpointError
from unisd_megatron.exchange import all_gather_json, broadcast_json
from unisd_megatron.families import Mapping
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.weights.hf import HfFolder

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def by_name(mappings: Sequence[Mapping]) -> dict[str, Mapping]:
    """Mappings by Megatron name, a tied head's included."""
    table = {mapping.megatron: mapping for mapping in mappings}
    table.setdefault(HEAD, table[EMBEDDING])  # tied: the last stage holds a copy of the embedding as its head
    return table


@torch.no_grad()
def load(shards: Iterable[tuple[str, Tensor]], mappings: Sequence[Mapping], folder: HfFolder, tensor_axis: Axis) -> None:
    """Fills `shards` (canonical name, this rank's tensor) in place from a Hugging Face folder, casting to their dtype.

    Raises `CheckpointError` for a missing tensor or a wrong shape, naming it.
    """
    table = by_name(mappings)
    for name, shard in shards:
        mapping = table[name]
        tensors = [folder.tensor(hf) for hf in mapping.hf]
        check_shapes(mapping, tensors, folder.path)
        shard.copy_(mapping.shard(tensors, tensor_axis.size, tensor_axis.rank))


def check_shapes(mapping: Mapping, tensors: Sequence[Tensor], where: object) -> None:
    """Raises `CheckpointError` unless full tensors have the shapes of the model.

    Compared whole: padding or cutting a tensor into shards could hide that it is too short or too long.
    """
    for name, tensor, shape in zip(mapping.hf, tensors, mapping.shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where}: {name} is {tuple(tensor.shape)}; config.json says {shape}")


@torch.no_grad()
def full_tensors(shards: Iterable[tuple[str, Tensor]], mappings: Sequence[Mapping], grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """Yields `(HF name, full tensor)` of every parameter, on every rank of the replica. Collective over the replica.

    Each pipeline stage gathers its own shards over the tensor-parallel group and broadcasts the result; at most one
    Megatron parameter is in flight. Tied heads are not yielded: a tied model has no tensor of that name.
    """
    mine = dict(shards)
    owners = _owners(mine, grid)
    for mapping in mappings:
        owner = owners[mapping.megatron]
        if owner == grid.pipeline.rank:
            full = mapping.join(_gather(mine[mapping.megatron].detach(), grid.tensor))
        else:
            full = [torch.empty(0)] * len(mapping.hf)
        for name, tensor in zip(mapping.hf, full, strict=True):
            yield name, _broadcast(tensor, owner, grid)


def _owners(mine: dict[str, Tensor], grid: Grid) -> dict[str, int]:
    """Pipeline rank that holds each parameter; the first where two do (tied embeddings)."""
    owners: dict[str, int] = {}
    for rank, held in enumerate(all_gather_json(list(mine), grid.pipeline)):
        for name in held:
            owners.setdefault(name, rank)
    return owners


def _gather(shard: Tensor, axis: Axis) -> list[Tensor]:
    if axis.group is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(axis.size)]
    dist.all_gather(shards, shard.contiguous(), group=axis.group)
    return shards


def _broadcast(tensor: Tensor, owner: int, grid: Grid) -> Tensor:
    if grid.pipeline.group is None:
        return tensor
    source = dist.get_global_rank(grid.pipeline.group, owner)
    header = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    shape, dtype = broadcast_json(header, owner, grid.pipeline)
    if owner != grid.pipeline.rank:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=grid.device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=source, group=grid.pipeline.group)
    return tensor
