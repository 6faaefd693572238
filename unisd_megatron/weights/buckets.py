"""The student's weights on their way to a rollout engine: full Hugging Face tensors, a bounded bucket at a time.

A bucket holds whole parameters of one pipeline stage, up to `bucket_bytes` (one parameter may be more), and of one
expert-parallel rank where these hold different experts. Layers come one after the other, with the experts of all ranks: an
engine keeps what it got of a layer until it has all of it. A bucket costs one all-gather over the tensor-parallel group, a
broadcast to the ranks without these experts and, where ranks of other stages want it, one more; what it is made of is agreed on
once, so that no names or shapes travel with the weights. Memory beyond the models: two buckets where it is received (and a
layer's experts, where vLLM stacks these into one tensor), three for a moment where it is gathered.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.exchange import all_gather_json
from unisd_megatron.families import Mapping
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.weights.stream import holders

BUCKET_BYTES = 256 << 20

Bucket = list[tuple[str, Tensor]]
"""`(HF name, full tensor)` pairs. The tensors are the receiver's to keep: no later bucket reuses their memory."""


@dataclass(frozen=True)
class _Plan:
    """One bucket: its parameters, the shapes of the full tensors, the pipeline rank that holds them, and the expert-parallel
    rank, None where all of these do."""

    mappings: list[Mapping]
    shapes: list[tuple[str, tuple[int, ...]]]
    dtype: torch.dtype
    stage: int
    expert: int | None

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.shapes)


class WeightStream:
    """A repeatable stream of this model's weights. Built and read together by all ranks of a replica and those that have the
    experts it lacks.

    Args: shards: this rank's parameters under canonical names (`Stage.named_shards`), read anew for each pass.
    """

    label = ""

    def __init__(
        self,
        shards: Callable[[], Iterable[tuple[str, Tensor]]],
        mappings: Sequence[Mapping],
        grid: Grid,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._shards = shards
        self._grid = grid
        self._plans = _plan(dict(shards()), mappings, grid, bucket_bytes)

    def __len__(self) -> int:
        """The number of buckets."""
        return len(self._plans)

    def stage(self, number: int) -> int:
        """The pipeline rank that holds a bucket."""
        return self._plans[number].stage

    def expert(self, number: int) -> int | None:
        """The expert-parallel rank that holds a bucket; None where all of these do."""
        return self._plans[number].expert

    def contents(self, number: int) -> tuple[list[str], list[list[int]], str]:
        """Names, shapes and dtype name of a bucket, known on every rank without its weights."""
        plan = self._plans[number]
        names, shapes = [name for name, _ in plan.shapes], [list(shape) for _, shape in plan.shapes]
        return names, shapes, str(plan.dtype).removeprefix("torch.")

    def names(self) -> list[str]:
        """Every tensor, in the order of the stream."""
        return [name for plan in self._plans for name, _ in plan.shapes]

    @torch.no_grad()
    def everywhere(self) -> Iterator[Bucket]:
        """Every bucket on every rank. Collective over the replica and the expert-parallel group."""
        mine = dict(self._shards())
        for number, plan in enumerate(self._plans):
            flat = self.flat(number, mine)
            if self._grid.pipeline.group is not None:
                flat = self._broadcast(flat, plan, plan.stage, self._grid.pipeline)
            assert flat is not None
            yield unpack(flat, plan.shapes)

    @torch.no_grad()
    def flat(self, number: int, mine: dict[str, Tensor] | None = None) -> Tensor | None:
        """A bucket as one row on the ranks of the stage that holds it, None elsewhere.

        Collective over the stage's tensor-parallel and expert-parallel groups.
        """
        plan = self._plans[number]
        if plan.stage != self._grid.pipeline.rank:
            return None
        flat = None
        if plan.expert in (None, self._grid.expert.rank):
            tensors = _gather(plan, dict(self._shards()) if mine is None else mine, self._grid)
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        return flat if plan.expert is None else self._broadcast(flat, plan, plan.expert, self._grid.expert)

    def _broadcast(self, flat: Tensor | None, plan: _Plan, source: int, axis: Axis) -> Tensor:
        if flat is None:
            flat = torch.empty(plan.numel, dtype=plan.dtype, device=self._grid.device)
        assert axis.group is not None
        dist.broadcast(flat, src=dist.get_global_rank(axis.group, source), group=axis.group)
        return flat


def unpack(flat: Tensor, shapes: Sequence[tuple[str, Sequence[int]]]) -> Bucket:
    """The tensors of a bucket, as views of the row that holds them."""
    parts = flat.split([torch.Size(shape).numel() for _, shape in shapes])
    return [(name, part.view(tuple(shape))) for part, (name, shape) in zip(parts, shapes, strict=True)]


def _gather(plan: _Plan, mine: dict[str, Tensor], grid: Grid) -> list[Tensor]:
    """The full tensors of a bucket, by one all-gather of this rank's shards of all of them."""
    shards = [mine[mapping.megatron].detach() for mapping in plan.mappings]
    if grid.tensor.group is None:
        return [tensor for mapping, shard in zip(plan.mappings, shards, strict=True) for tensor in mapping.join([shard])]
    row = torch.cat([shard.reshape(-1) for shard in shards])
    rows = [torch.empty_like(row) for _ in range(grid.tensor.size)]
    dist.all_gather(rows, row, group=grid.tensor.group)
    sizes = [shard.numel() for shard in shards]
    by_rank = [one.split(sizes) for one in rows]
    return [
        tensor
        for i, (mapping, shard) in enumerate(zip(plan.mappings, shards, strict=True))
        for tensor in mapping.join([parts[i].view(shard.shape) for parts in by_rank])
    ]


def _layer(mapping: Mapping) -> str:
    """The layer of a parameter; outside of all layers, the parameter itself."""
    found = re.match(r"decoder\.layers\.\d+\.", mapping.megatron)
    return found[0] if found else mapping.megatron


def _plan(mine: dict[str, Tensor], mappings: Sequence[Mapping], grid: Grid, bucket_bytes: int) -> list[_Plan]:
    """The buckets, the same on every rank. Collective over the replica and the expert-parallel group."""
    owners = holders(mine, grid)
    here = {name: str(shard.dtype).removeprefix("torch.") for name, shard in mine.items()}
    on_stage = {name: dtype for part in all_gather_json(here, grid.expert) for name, dtype in part.items()}
    dtype_of = {name: dtype for part in all_gather_json(on_stage, grid.pipeline) for name, dtype in part.items()}

    def owner(mapping: Mapping) -> tuple[int, int, str]:
        stage, expert = owners[mapping.megatron]
        return stage, -1 if expert is None else expert, dtype_of[mapping.megatron]

    begins: dict[str, int] = {}  # where a layer begins among the mappings, which are in order
    for index, mapping in enumerate(mappings):
        begins.setdefault(_layer(mapping), index)

    def place(mapping: Mapping) -> tuple[int, int, int]:
        stage, expert, _ = owner(mapping)
        return stage, begins[_layer(mapping)], expert

    plans: list[_Plan] = []
    for (stage, expert, name), group in itertools.groupby(sorted(mappings, key=place), owner):  # the sort is stable
        begin = partial(_Plan, dtype=getattr(torch, name), stage=stage, expert=None if expert < 0 else expert)
        plan, held_bytes = begin([], []), 0
        for mapping in group:
            shapes = list(zip(mapping.hf, mapping.shapes, strict=True))
            size = sum(torch.Size(shape).numel() for _, shape in shapes) * plan.dtype.itemsize
            if plan.mappings and held_bytes + size > bucket_bytes:
                plans.append(plan)
                plan, held_bytes = begin([], []), 0
            plan.mappings.append(mapping)
            plan.shapes.extend(shapes)
            held_bytes += size
        plans.append(plan)
    return plans
