"""Whether the shard of a rank is the part of the published tensors that Megatron takes it for, element by element."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict

import torch
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.families import Arch, Mapping
from unisd_megatron.families.mapping import Split
from unisd_megatron.mcore.holding import Box, Holding
from unisd_megatron.mcore.shards import EXPERTS


def is_expert(arch: Arch, layout: Layout, name: str) -> bool:
    """Whether expert parallelism deals a parameter out."""
    return layout.expert_model_parallel_size > 1 and EXPERTS in name


def check_cuts(table: dict[str, Mapping], holding: Holding, rank: int, size: int) -> None:
    """Raises `CheckFailed` unless each shard of a rank has the shape and the elements that the weight map gives it.

    Args: table: weight map by Megatron name; size: tensor-parallel ranks.
    """
    cuts: dict[str, list[Box]] = defaultdict(list)
    for box in holding.cuts:
        cuts[box.name].append(box)
    for name, (shape, _) in holding.shards.items():
        if name not in table:
            raise CheckFailed(f"parameters: rank {rank} has {name}, which is not in the weight map")
        mapping = table[name]
        if shape != mapping.shard_shape(size):
            raise CheckFailed(f"parameters: {name} of rank {rank} is {shape}; the weight map has {mapping.shard_shape(size)}")
        if name not in cuts:
            raise CheckFailed(f"checkpoint: rank {rank} has {name} and would not write it anywhere")
        stacked = len(cuts[name][0].whole) - len(shape)
        numbers = tuple(int(number) for number in re.findall(r"\.(\d+)\.", name))[:stacked]
        for box in cuts[name]:
            if box.offset[:stacked] != numbers:
                raise CheckFailed(f"checkpoint: {name} of rank {rank} lies at {box.offset[:stacked]}; expected {numbers}")
        where = tuple((box.whole[stacked:], box.offset[stacked:], box.shape[stacked:]) for box in cuts[name])
        plain = dataclasses.replace(mapping, megatron="", hf=("",) * len(mapping.hf))
        if wrong := _difference(plain, size, holding.rank["tensor"], where):
            raise CheckFailed(f"parameters: {name} of rank {rank}: {wrong}")


Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(maxsize=4096)
def _difference(mapping: Mapping, size: int, tensor: int, where: tuple[Place, ...]) -> str | None:
    """What is wrong with the boxes `(whole, offset, shape)` of one tensor-parallel shard.

    Elements are told apart along the axis that is cut, by numbers in the place of weights; along the other all must be there.
    """
    axis = mapping.dim if isinstance(mapping, Split) else 0
    for whole, offset, shape in where:
        others = [i for i in range(len(whole)) if i != axis]
        if any(offset[i] or shape[i] != whole[i] for i in others):
            return f"{shape} at {offset} of {whole} is cut along another axis than {axis}"
    full, part = (_marks(mapping, axis, *cut) for cut in ((1, 0), (size, tensor)))
    places = [range(offset[axis], offset[axis] + shape[axis]) for _, offset, shape in where]
    if any(place.start < 0 or place.stop > len(full) for place in places):
        return f"{where[0][2]} at {where[0][1]} is outside of {where[0][0]}"
    if not torch.equal(torch.cat([full[place.start : place.stop] for place in places]), part):
        return f"holds other rows than the checkpoint has at {[place.start for place in places]}"
    return None


def _marks(mapping: Mapping, axis: int, size: int, rank: int) -> Tensor:
    """Numbers that stand for the slices of the published tensors along an axis, in the order of a shard; 0 is padding."""
    marked, first = [], 1
    for shape in mapping.shapes:
        marks = torch.arange(first, first + shape[axis])
        first += shape[axis]
        marked.append(marks if len(shape) == 1 else marks[None] if axis else marks[:, None])
    shard = mapping.shard(marked, size, rank)
    return shard if shard.dim() == 1 else shard[0] if axis else shard[:, 0]
