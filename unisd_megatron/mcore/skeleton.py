"""Where each parameter of a model lies in a distributed checkpoint, found without memory for the model.

The model is built on the `meta` device and asked for its sharded state dict; whatever Megatron decides about keys, stacked
layers and split gates is taken from there, for every family and layout alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.families import Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.model import Stage, build
from unisd_megatron.mcore.platform import Platform

Described: TypeAlias = "ShardedTensor | ShardedTensorFactory"


def empty_stage(arch: Arch, layout: Layout, platform: Platform, grid: Grid) -> Stage:
    """This rank's stage on the `meta` device: shapes and names, no memory. With the local layer spec. Collective."""
    with torch.device("meta"):
        return build(arch, layout, platform.on_meta(), grid)


def checkpoint_metadata(**more: bool) -> dict[str, Any]:
    """How Megatron is asked to lay out a checkpoint."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        **more,
    }


def parameters(stage: Stage, state: dict[str, dict[str, Any]], prefix: str) -> dict[str, Described]:
    """Canonical name -> what Megatron says of the parameter, for all of this rank's, in the order of `named_shards`.

    Args: state: the stage's `sharded_state_dict(prefix, ...)`. A tied head is left out where the stage has the embedding.
    """
    found = {}
    for number, chunk in enumerate(stage.chunks):
        for (local, _), (canonical, _) in zip(chunk.named_parameters(), chunk.named_shards(), strict=True):
            if prefix + local in state[str(number)]:
                found[canonical] = state[str(number)][prefix + local]
    return found


def objects(state: dict[str, dict[str, Any]]) -> Iterator[ShardedObject]:
    """What of a sharded state dict is no tensor."""
    for chunk in state.values():
        yield from (value for value in chunk.values() if isinstance(value, ShardedObject))


def pieces(described: Described, value: Tensor) -> list[ShardedTensor]:
    """A parameter's shard as the tensors that the checkpoint holds of it: itself, or the parts it is split into."""
    if isinstance(described, ShardedTensor):
        return [dataclasses.replace(described, data=value, dtype=value.dtype)]
    return list(_leaves(dataclasses.replace(described, data=value).build()))


def whole(described: Described, read: Callable[[ShardedTensor], Tensor]) -> Tensor:
    """The inverse of `pieces`: a parameter's shard from what `read` gives for each of the tensors it was split into."""
    if isinstance(described, ShardedTensor):
        return read(described)
    return described.merge_fn(_read_leaves(described.build(), read))


def _leaves(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
        return
    for branch in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(branch)


def _read_leaves(tree: Any, read: Callable[[ShardedTensor], Tensor]) -> Any:
    if isinstance(tree, ShardedTensor):
        return read(tree)
    if isinstance(tree, dict):
        return {name: _read_leaves(branch, read) for name, branch in tree.items()}
    return [_read_leaves(branch, read) for branch in tree]
