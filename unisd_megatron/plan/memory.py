"""Bytes that a rank holds as long as the run lasts: weights, gradients, optimizer, teacher, EMA. Exact. No torch here."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from unisd_megatron.config import Layout, Teacher
from unisd_megatron.families import Arch
from unisd_megatron.plan.kernels import Kernels
from unisd_megatron.plan.parameters import buffers, chunks, layers_of, parts

_FP32 = 4
_EMA_BUCKET = 2**25  # mcore/shards.py's BUCKET: numbers of a row that are cut over the replicas at a time


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds between steps, bytes.

    weights: the student's; gradients: DDP's buffers; optimizer: fp32 main parameters and two moments (without torch Adam's
    counters of steps, 4 bytes a parameter in host memory); teacher: weights beside the student's, or 1/DP of frozen ones that
    wait, and the head's copy; ema: fp32 shards; host: of teacher and ema, what lies in host memory; parameters: numbers in
    `weights` without padding; reading: what the teacher needs beyond this while it reads.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    ema: int
    host: int
    reading: int

    @property
    def device(self) -> int:
        """Of all between steps, what lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.ema - self.host


def rank_bytes(
    arch: Arch,
    layout: Layout,
    *,
    world_size: int,
    teacher: str | None = "frozen",
    teacher_memory: str = "beside",
    pipeline_rank: int = 0,
    data_rank: int = 0,
    expert_data_rank: int = 0,
) -> RankBytes:
    """What the ranks of a pipeline stage hold; the same for all tensor-parallel and expert-parallel ranks.

    Args: teacher, teacher_memory: as the settings of these names (None: there is no teacher); data_rank: among data-parallel x
    context-parallel ranks, and expert_data_rank among those with the same experts: what is cut over them need not be cut
    evenly.
    """
    replicas = layout.data_parallel_size(world_size) * layout.context_parallel_size
    apart = layout.expert_data_parallel_size(world_size)
    width = 2 if layout.bf16 else _FP32
    # Only what shapes the counts, so that layouts which differ elsewhere share them.
    cut = dataclasses.replace(
        layout, recompute_granularity=None, micro_batch_size=1, global_batch_size=1, sequence_parallel=False
    )
    numel, padded, owned, shard = _counts(arch, cut, pipeline_rank, replicas, data_rank, apart, expert_data_rank)
    kept = _teacher(arch, layout, Teacher(teacher, teacher_memory=teacher_memory), numel, shard, width, pipeline_rank)  # type: ignore[arg-type]
    return RankBytes(
        parameters=numel,
        weights=width * (padded if layout.use_distributed_optimizer else numel),
        gradients=_FP32 * padded,
        optimizer=owned * (3 * _FP32 if layout.bf16 else 2 * _FP32),
        **kept,
    )


@dataclass(frozen=True)
class Fp8Bytes:
    """What FP8 costs a rank beside weights in bf16, bytes. copies: kept from the first pass on; leaving: while weights
    leave the student (`Student.in_full`)."""

    copies: int = 0
    leaving: int = 0


def fp8_bytes(arch: Arch, layout: Layout, how: Kernels, *, lent: bool, stage: int) -> Fp8Bytes:
    """Of the layers' matrices, as Transformer Engine keeps them on Hopper, whose FP8 products take both orders.

    A student has an FP8 copy of each and its transpose, a teacher that only reads no transpose. Kept in FP8, weight and
    transpose take together what `RankBytes.weights` counts for bf16. Args: lent: the teacher reads in the student's module.
    """
    count = sum(layers_of(arch, layout, stage, n) for n in range(layout.virtual_stages // layout.pipeline_model_parallel_size))
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    matrices = count * arch.hidden_size * (2 * queries + 2 * keys + 3 * arch.ffn_hidden_size)
    matrices //= layout.tensor_model_parallel_size
    student = 2 * matrices if how.fp8 and not how.fp8_weights else 0
    teacher = matrices if how.teacher_fp8 and not (lent and how.fp8) else 0
    return Fp8Bytes(student + teacher, 2 * matrices if how.fp8_weights else 0)


@functools.lru_cache(4096)
def _counts(
    arch: Arch, layout: Layout, stage: int, replicas: int, rank: int, expert_replicas: int, expert_rank: int
) -> tuple[int, int, int, int]:
    """Numbers of a stage: parameters; with padding; in a rank's part of the optimizer; in its shard of the weights."""
    rows = [0, 0]
    for chunk in chunks(arch, layout, stage):
        for one in chunk:
            rows[one.expert] += one.numel
    padded = owned = 0
    for buffer, of_experts in buffers(arch, layout, stage, replicas, expert_replicas):
        padded += buffer.numel
        ranks, mine = (expert_replicas, expert_rank) if of_experts else (replicas, rank)
        owned += buffer.owned(ranks, mine) if layout.use_distributed_optimizer else buffer.numel
    return sum(rows), padded, owned, _shard(rows[0], replicas) + _shard(rows[1], expert_replicas)


def _shard(total: int, ranks: int) -> int:
    """A rank's part of a row of numbers that is cut a bucket at a time."""
    whole, rest = divmod(total, _EMA_BUCKET)
    return whole * -(-_EMA_BUCKET // ranks) + -(-rest // ranks)


def _teacher(arch: Arch, layout: Layout, settings: Teacher, numel: int, shard: int, width: int, stage: int) -> dict[str, int]:
    """The bytes of the teacher: docs/teacher_memory.md, in whole numbers."""
    if settings.teacher in (None, "live"):
        return {"teacher": 0, "ema": 0, "host": 0, "reading": 0}
    is_ema = settings.teacher == "ema"
    ema = _FP32 * shard if is_ema else 0
    if settings.teacher_memory == "beside":
        return {"teacher": width * numel, "ema": ema, "host": 0, "reading": 0}
    waiting = 0 if is_ema else width * shard
    last = stage == layout.pipeline_model_parallel_size - 1
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    head = width * parts(arch, tensor, expert).head.numel if last else 0
    on_host = settings.teacher_memory == "host"
    return {
        "teacher": waiting + head,
        "ema": ema,
        "host": waiting + ema if on_host else 0,
        "reading": 0 if on_host else width * shard,
    }
