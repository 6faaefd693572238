"""What one rank of a large world holds: built by the code that `train` runs, on no device, and told in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from unisd_megatron.config import Layout, Optimization
from unisd_megatron.families import Arch
from unisd_megatron.grid import Axis
from unisd_megatron.mcore import optimizer_state, teacher_state
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.simulated import Nowhere, rank_of
from unisd_megatron.mcore.skeleton import Described, checkpoint_metadata, empty_stage, parameters, pieces
from unisd_megatron.mcore.store import STUDENT, TEACHER
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher

Span = tuple[str, int, int]
"""`(canonical name, start, stop)`: elements of this rank's shard of a parameter, flat."""

AXES = ("tensor", "pipeline", "context", "data", "data_context", "expert", "expert_data")


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a tensor of a checkpoint. name: of the parameter it is of, key: of the tensor, whole: the tensor's shape."""

    name: str
    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Holding:
    """One rank of the built run.

    rank, groups: its number along each axis of its `Grid`, by name, and the ranks of the world there; shards: shape and dtype
    name of each parameter; cuts: where Megatron has each shard lie in its whole tensor; written: what this rank writes into a
    checkpoint, by what it is of ("student", "teacher", and each kind of optimizer state); ema, optimizer: its parts of the EMA
    masters and of the optimizer's state; bytes: by the names of `plan.RankBytes`; said: see `Simulated`.
    """

    rank: dict[str, int]
    groups: dict[str, list[int]]
    shards: dict[str, tuple[tuple[int, ...], str]]
    cuts: list[Box]
    written: dict[str, list[Box]]
    ema: list[Span]
    optimizer: list[Span]
    bytes: dict[str, int]
    said: list[str]


def build_rank(arch: Arch, layout: Layout, platform: Platform, *, world_size: int, rank: int) -> Holding:
    """Builds model, optimizer and an EMA teacher as `train` does on this rank."""
    with rank_of(world_size, rank, layout, platform) as simulated, Nowhere():
        grid = simulated.grid
        stage = empty_stage(arch, layout, platform, grid)
        shards = {name: (tuple(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in stage.named_shards()}
        # On the student's module; its own, as `train` has it, is built by the same call.
        teacher = Teacher(stage, "ema", grid, beta=0.9, every=1)
        module = sum(parameter.nbytes for _, parameter in stage.named_shards())
        student = Student(stage, layout, Optimization(), 1, grid)
        metadata = checkpoint_metadata()
        state = stage.sharded_state_dict(prefix=f"{STUDENT}.", metadata=metadata)
        model = parameters(stage, state, f"{STUDENT}.")
        cuts = [(box, main) for name, one in model.items() for box, main in _boxes(name, one)]
        written = {
            "student": [box for box, main in cuts if main],
            "teacher": _written(teacher_state.describe(teacher, f"{TEACHER}.", metadata, is_loading=True)),
            **_optimizer_written(
                optimizer_state.describe(student.optimizer, state, metadata, is_loading=True), [box for box, _ in cuts]
            ),
        }
        assert teacher.shards is not None
        weights, gradients = _buffers(student)
        return Holding(
            rank={name: getattr(grid, name).rank for name in AXES},
            groups={name: _members(getattr(grid, name), rank) for name in AXES},
            shards=shards,
            cuts=[box for box, _ in cuts],
            written=written,
            ema=list(teacher.shards.spans()),
            optimizer=list(_optimizer_spans(student, stage)),
            bytes={
                "weights": weights or module,
                "gradients": gradients,
                "optimizer": _optimizer_bytes(student),
                "teacher": module,
                "ema": teacher.shards.nbytes,
            },
            said=simulated.said,
        )


def _members(axis: Axis, rank: int) -> list[int]:
    return [rank] if axis.group is None else dist.get_process_group_ranks(axis.group)


def _boxes(name: str, described: Described) -> Iterator[tuple[Box, bool]]:
    """The tensors of the checkpoint that a shard is part of, and whether this rank is the one to write it."""
    assert described.data is not None
    for piece in pieces(described, described.data):
        shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
        yield (
            Box(name, piece.key, tuple(piece.global_shape), tuple(piece.global_offset), shape),
            is_main_replica(piece.replica_id),
        )


def _written(entries: dict[str, Described]) -> list[Box]:
    return [box for name, one in entries.items() for box, main in _boxes(name, one) if main]


def _optimizer_written(state: dict[str, Any], cuts: Iterable[Box]) -> dict[str, list[Box]]:
    """By kind of state; a tensor of it is named after the model's: `optimizer.state.exp_avg.` and the model's key."""
    names = {(box.key, box.offset): box.name for box in cuts}
    found: dict[str, list[Box]] = {}
    for entry in nested_values(state):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or not isinstance(entry.data, Tensor):
            continue
        for box, main in _boxes("", entry):
            kind, _, key = box.key.partition(f".{STUDENT}.")
            if main:
                name = names[f"{STUDENT}.{key}", box.offset]
                found.setdefault(kind, []).append(dataclasses.replace(box, name=name))
    return found


def _buffers(student: Student) -> tuple[int, int]:
    """Bytes of DDP's buffers of parameters (0 without the distributed optimizer) and of gradients."""
    buffers = [buffer for chunk in student._ddp for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = sum(buffer.param_data.nbytes for buffer in buffers if buffer.param_data is not None)
    return weights, sum(buffer.grad_data.nbytes for buffer in buffers)


def _optimizer_spans(student: Student, stage: Stage) -> Iterator[Span]:
    """The elements of its shards that this rank's optimizer updates."""
    optimizers = student.optimizer.chained_optimizers
    for name, parameter in stage.named_shards():
        if not isinstance(optimizers[0], DistributedOptimizer):
            yield name, 0, parameter.numel()
            continue
        for one in optimizers:
            if parameter in one.model_param_gbuf_map:
                index, dtype, bucket = one.model_param_gbuf_map[parameter]
                mine = one.gbuf_ranges[index][dtype][bucket]["param_map"]
                if parameter in mine:
                    yield name, mine[parameter]["param"].start, mine[parameter]["param"].end


def _optimizer_bytes(student: Student) -> int:
    """Of two moments, and of fp32 main parameters beside weights of another dtype."""
    total = 0
    for one in student.optimizer.chained_optimizers:
        moments = [tensors[kind] for tensors in one.optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
        groups = getattr(one, "shard_fp32_from_float16_groups", getattr(one, "fp32_from_float16_groups", []))
        total += sum(tensor.nbytes for tensor in (*moments, *(main for group in groups for main in group)))
    return total
