"""The student's weights on their way to a rollout engine: full Hugging Face tensors, a bounded bucket at a time.

A bucket holds whole parameters of one pipeline stage, up to `bucket_bytes` (one parameter may be more). It costs one
all-gather over the tensor-parallel group and, where ranks of other stages want it, one broadcast; what it is made of is agreed
on once, so that no names or shapes travel with the weights. Memory beyond the models: two buckets where it is received, three
for a moment where it is gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.exchange import all_gather_json
from unisd_megatron.families import Mapping
from unisd_megatron.grid import Grid

BUCKET_BYTES = 256 << 20

Bucket = list[tuple[str, Tensor]]
"""`(HF name, full tensor)` pairs. The tensors are the receiver's to keep: no later bucket reuses their memory."""


@dataclass(frozen=True)
class _Plan:
    """One bucket: its parameters, the shapes of the full tensors, and the pipeline rank that holds them."""

    mappings: list[Mapping]
    shapes: list[tuple[str, tuple[int, ...]]]
    dtype: torch.dtype
    stage: int


class WeightStream:
    """A repeatable stream of this model's weights. Built and read by all ranks of a replica together.

    Args: shards: this rank's parameters under canonical names (`Stage.named_shards`), read anew for each pass.
    """

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
        """Every bucket on every rank of the replica. Collective over the replica."""
        mine = dict(self._shards())
        for number, plan in enumerate(self._plans):
            flat = self.flat(number, mine)
            if self._grid.pipeline.group is not None:
                if flat is None:
                    size = sum(torch.Size(shape).numel() for _, shape in plan.shapes)
                    flat = torch.empty(size, dtype=plan.dtype, device=self._grid.device)
                root = dist.get_global_rank(self._grid.pipeline.group, plan.stage)
                dist.broadcast(flat, src=root, group=self._grid.pipeline.group)
            assert flat is not None
            yield unpack(flat, plan.shapes)

    @torch.no_grad()
    def flat(self, number: int, mine: dict[str, Tensor] | None = None) -> Tensor | None:
        """A bucket as one row on the ranks of the stage that holds it, None elsewhere. Collective over the stage's TP group."""
        plan = self._plans[number]
        if plan.stage != self._grid.pipeline.rank:
            return None
        mine = dict(self._shards()) if mine is None else mine
        tensors = _gather(plan, mine, self._grid)
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


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


def _plan(mine: dict[str, Tensor], mappings: Sequence[Mapping], grid: Grid, bucket_bytes: int) -> list[_Plan]:
    """The buckets, the same on every rank of the replica. Collective over the pipeline group."""
    held = {name: [list(shard.shape), str(shard.dtype).removeprefix("torch.")] for name, shard in mine.items()}
    owners: dict[str, tuple[int, list[int], str]] = {}
    for stage, names in enumerate(all_gather_json(held, grid.pipeline)):
        for name, (shape, dtype) in names.items():
            owners.setdefault(name, (stage, shape, dtype))  # the first where two hold it (tied embeddings)
    by_owner = sorted(mappings, key=lambda mapping: owners[mapping.megatron][0])  # stable: layers stay in order
    plans: list[_Plan] = []
    for (stage, name), group in itertools.groupby(by_owner, lambda m: (owners[m.megatron][0], owners[m.megatron][2])):
        plan, held_bytes = _Plan([], [], getattr(torch, name), stage), 0
        for mapping in group:
            like = [torch.empty(owners[mapping.megatron][1], device="meta")] * grid.tensor.size
            shapes = [(hf, tuple(tensor.shape)) for hf, tensor in zip(mapping.hf, mapping.join(like), strict=True)]
            size = sum(torch.Size(shape).numel() for _, shape in shapes) * plan.dtype.itemsize
            if plan.mappings and held_bytes + size > bucket_bytes:
                plans.append(plan)
                plan, held_bytes = _Plan([], [], plan.dtype, stage), 0
            plan.mappings.append(mapping)
            plan.shapes.extend(shapes)
            held_bytes += size
        plans.append(plan)
    return plans
