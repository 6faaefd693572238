"""Shards on a grid <-> full Hugging Face tensors, one at a time.

`load` fills this rank's shards; `full_tensors` yields every full tensor on every rank of the replica, and is the one
stream that export, the rollout engine and the gradient comparison use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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
def load(
    shards: Iterable[tuple[str, Tensor]],
    mappings: Sequence[Mapping],
    folder: HfFolder,
    tensor_axis: Axis,
    write: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
) -> None:
    """Fills `shards` (canonical name, this rank's tensor) in place from a Hugging Face folder, casting to their dtype.

    Args: write: sets a shard from values of any dtype.
    Raises `CheckpointError` for a missing tensor or a wrong shape, naming it.
    """
    table = by_name(mappings)
    for name, shard in shards:
        mapping = table[name]
        tensors = [folder.tensor(hf) for hf in mapping.hf]
        check_shapes(mapping, tensors, folder.path)
        write(shard, mapping.shard(tensors, tensor_axis.size, tensor_axis.rank))


def check_shapes(mapping: Mapping, tensors: Sequence[Tensor], where: object) -> None:
    """Raises `CheckpointError` unless full tensors have the shapes of the model.

    Compared whole: padding or cutting a tensor into shards could hide that it is too short or too long.
    """
    for name, tensor, shape in zip(mapping.hf, tensors, mapping.shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where}: {name} is {tuple(tensor.shape)}; config.json says {shape}")


@torch.no_grad()
def full_tensors(shards: Iterable[tuple[str, Tensor]], mappings: Sequence[Mapping], grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """Yields `(HF name, full tensor)` of every parameter, on every rank. Collective over replica and expert-parallel group.

    Each pipeline stage gathers its own shards over the tensor-parallel group, the rank with an expert gives it to those
    without, and the stage broadcasts the result; at most one Megatron parameter is in flight. Tied heads are not yielded: a
    tied model has no tensor of that name.
    """
    mine = dict(shards)
    owners = holders(mine, grid)
    for mapping in mappings:
        stage, expert = owners[mapping.megatron]
        full = [torch.empty(0)] * len(mapping.hf)
        if stage == grid.pipeline.rank and expert in (None, grid.expert.rank):
            full = mapping.join(_gather(mine[mapping.megatron].detach(), grid.tensor))
        for name, tensor in zip(mapping.hf, full, strict=True):
            if stage == grid.pipeline.rank and expert is not None:
                tensor = _broadcast(tensor, expert, grid.expert, grid.device)
            yield name, _broadcast(tensor, stage, grid.pipeline, grid.device)


def holders(mine: Iterable[str], grid: Grid) -> dict[str, tuple[int, int | None]]:
    """Who has each parameter: the pipeline rank, the first where two do (tied embeddings), and the expert-parallel rank, None
    where all of these ranks do. Collective over the replica and the expert-parallel group.
    """
    by_rank = [set(names) for names in all_gather_json(list(mine), grid.expert)]
    everyone = set.intersection(*by_rank)
    held = {name: None if name in everyone else rank for rank, names in enumerate(by_rank) for name in sorted(names)}
    found: dict[str, tuple[int, int | None]] = {}
    for stage, names in enumerate(all_gather_json(held, grid.pipeline)):
        for name, expert in names.items():
            found.setdefault(name, (stage, expert))
    return found


def _gather(shard: Tensor, axis: Axis) -> list[Tensor]:
    if axis.group is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(axis.size)]
    dist.all_gather(shards, shard.contiguous(), group=axis.group)
    return shards


def _broadcast(tensor: Tensor, owner: int, axis: Axis, device: torch.device) -> Tensor:
    if axis.group is None:
        return tensor
    header = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
    shape, dtype = broadcast_json(header, owner, axis)
    if owner != axis.rank:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=dist.get_global_rank(axis.group, owner), group=axis.group)
    return tensor
