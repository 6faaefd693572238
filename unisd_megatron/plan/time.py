"""Seconds of each phase of a step, from arithmetic, bandwidths and the bubble. Nothing here was measured. No torch here.

Not overlapped unless said: sums of tensor-parallel ranks, messages between stages, gradients. docs/planning.md says more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unisd_megatron.config import Run
from unisd_megatron.families import Arch
from unisd_megatron.plan.hardware import Cluster
from unisd_megatron.plan.kernels import Kernels
from unisd_megatron.plan.memory import RankBytes
from unisd_megatron.plan.request import Assumed, views
from unisd_megatron.plan.rollout import Engine, token_cache, whole
from unisd_megatron.validation import samples, teacher_kind

_BUS = 55e9  # bytes per second of PCIe gen 5, for what waits in host memory
_REDUCE = 12e-6  # seconds of one small all-reduce on a GPU
_LAUNCH = {"transformers": 5e-4, "colocate": 3e-5, "server": 3e-5}  # seconds of a decoded layer that no arithmetic explains
_FP8_GAIN = 1.6  # of a layer's products; the rest of the layer is as in bf16 (facts of others' runs, not ours)


@dataclass(frozen=True)
class Seconds:
    """Of one step. bubble: part of the student's and the teacher's passes that stages wait; communication: part of both."""

    rollout: float
    sync: float
    teacher: float
    student: float
    optimizer: float
    ema: float
    bubble: float
    communication: float

    @property
    def step(self) -> float:
        return self.rollout + self.sync + self.teacher + self.student + self.optimizer + self.ema


def active_parameters(arch: Arch) -> int:
    """Weights of all layers that a token meets."""
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    experts = 1 if arch.experts is None else arch.experts.per_token
    return arch.num_layers * arch.hidden_size * (2 * queries + 2 * keys + 3 * experts * arch.ffn_hidden_size)


class Clock:
    """The times of a run on a cluster."""

    def __init__(
        self, run: Run, arch: Arch, cluster: Cluster, how: Kernels, assumed: Assumed, held: RankBytes, one: Engine
    ) -> None:
        self.run, self.arch, self.cluster, self.how, self.assumed = run, arch, cluster, how, assumed
        self.held, self.engine, self.layout = held, one, run.layout
        self.width = 2 if run.layout.bf16 else 4
        self.prompt, self.completion = assumed.prompt(run), assumed.completion(run)
        self.length = self.prompt + self.completion
        self.replicas = run.layout.data_parallel_size(cluster.gpus)
        self.rate = cluster.gpu.bf16 * assumed.efficiency * (1 if run.layout.bf16 else 0.5)

    def seconds(self) -> Seconds:
        teacher, of_teacher = self._passes(views(self.run), backward=False)
        student, of_student = self._passes(1, backward=True)
        reduce = self._reduce_gradients()
        hidden = self.how.overlap and self.layout.pipeline_model_parallel_size == 1
        student += 0.1 * reduce if hidden else reduce
        bubble = self._bubble(1) * of_student[1]
        if views(self.run):
            bubble += self._bubble(views(self.run)) * of_teacher[1]
        ema = self._ema()
        teacher += self._swap()
        return Seconds(
            self._rollout(), self._sync(), teacher, student, self._optimizer(), ema, bubble, of_student[0] + of_teacher[0]
        )

    def between(self, ranks: int, *, inner: int = 1) -> float:
        """Bytes per second of a group of `ranks` that lie `inner` apart: inside a node or over the network."""
        gpu = self.cluster.gpu
        inside = ranks * inner <= self.cluster.gpus_per_node
        return self.assumed.bandwidth * (gpu.link if inside else gpu.network)

    def _bubble(self, readings: int) -> float:
        """Idle slots for each busy one."""
        count = self.layout.micro_batches(self.cluster.gpus) * readings
        stages, chunks = self.layout.pipeline_model_parallel_size, self.layout.virtual_pipeline_model_parallel_size or 1
        return (stages - 1) / (chunks * count)

    def _passes(self, readings: int, *, backward: bool) -> tuple[float, tuple[float, float]]:
        """Of all sequences of a replica: `(seconds, (communication, computation without bubble))`."""
        if readings == 0:
            return 0.0, (0.0, 0.0)
        layout, arch = self.layout, self.arch
        tokens = self.run.layout.global_batch_size / self.replicas * self.length * readings
        times = 3 if backward else 1
        if backward and layout.recompute_granularity == "full":
            times = 4
        pairs = 2 * arch.num_layers * arch.num_attention_heads * arch.head_dim * self.length  # causal: half of 4
        scores_times = times + (backward and layout.recompute_granularity == "selective")
        fp8 = self.how.fp8 if backward else self.how.fp8 or self.how.teacher_fp8
        per_token = times * 2 * active_parameters(arch) / (_FP8_GAIN if fp8 else 1) + scores_times * pairs
        ranks = layout.model_parallel_size
        compute = tokens * per_token / ranks / self.rate
        # The head reads kept tokens only: forward once for every view; divergence and gradient make both models' logits again,
        # a likelihood the student's.
        kept = tokens * self.completion / self.length
        trained = 8 if self.run.method.likelihood else 12
        head = (trained if backward else 2 * (readings - 1) / readings) * arch.hidden_size * arch.padded_vocab_size
        compute += kept * head / (layout.tensor_model_parallel_size * layout.context_parallel_size) / self.rate
        wait = self._messages(tokens, times)
        busy = compute + wait
        return busy * (1 + self._bubble(readings)), (wait, busy)

    def _messages(self, tokens: float, times: int) -> float:
        """Seconds in which a rank waits for others during the passes."""
        layout, arch = self.layout, self.arch
        tensor, stages, context = (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
        )
        mine, layers = tokens / context * arch.hidden_size * self.width, arch.num_layers / stages
        both = 1 if times == 1 else 2  # forward, and backward as much
        total = 0.0
        if tensor > 1:
            sums = 2 * (times if times > 2 else 1)  # after attention and after the feed-forward block
            cost = sums * layers * 2 * (tensor - 1) / tensor * mine / self.between(tensor)
            total += 0.2 * cost if self.how.tensor_overlap else cost
        if stages > 1:
            chunks = layout.virtual_pipeline_model_parallel_size or 1
            apart = self.between(2, inner=layout.model_parallel_size // stages * self.replicas)
            total += both * chunks * mine / (tensor if layout.sequence_parallel else 1) / apart
        if context > 1:
            keys = 2 * arch.num_query_groups * arch.head_dim / tensor * self.width
            ring = both * layers * tokens * (context - 1) / context * keys / self.between(context, inner=tensor)
            attention = times * 2 * layers * arch.num_attention_heads * arch.head_dim * self.length
            total += max(0.0, ring - tokens * attention / tensor / context / self.rate)  # the ring runs under attention
        if arch.experts is not None and layout.expert_model_parallel_size > 1:
            ranks = layout.expert_model_parallel_size
            crossing = 2 * arch.experts.per_token * (ranks - 1) / ranks * mine / tensor
            total += both * layers * crossing / self.between(ranks, inner=tensor * context)
        return total

    def _reduce_gradients(self) -> float:
        replicas = self.replicas * self.layout.context_parallel_size
        if replicas == 1:
            return 0.0
        part = (replicas - 1) / replicas / self.between(replicas, inner=self.layout.tensor_model_parallel_size)
        if self.layout.use_distributed_optimizer:
            return part * (self.held.gradients + self.held.weights)
        return part * 2 * self.held.gradients

    def _optimizer(self) -> float:
        """Everything is read and written once, gradients only read."""
        return (2 * self.held.optimizer + self.held.gradients + self.held.weights) / (
            self.assumed.bandwidth * self.cluster.gpu.hbm
        )

    def _ema(self) -> float:
        if teacher_kind(self.run) != "ema":
            return 0.0
        every = self.run.teacher.ref_model_sync_steps or 10
        bus = _BUS if self.run.teacher.teacher_memory == "host" else self.assumed.bandwidth * self.cluster.gpu.hbm
        mix = 3.5 * self.held.ema / bus
        return (mix + (self._gather() if self.run.teacher.teacher_memory == "beside" else 0.0)) / every

    def _gather(self) -> float:
        """The stage's weights from 1/DP of them on each rank."""
        replicas = self.replicas * self.layout.context_parallel_size
        inner = self.layout.tensor_model_parallel_size
        return self.width * self.held.parameters * (replicas - 1) / replicas / self.between(replicas, inner=inner)

    def _swap(self) -> float:
        """Weights that are exchanged before and after the teacher reads."""
        if teacher_kind(self.run) in (None, "live") or self.run.teacher.teacher_memory == "beside":
            return 0.0
        host = 4 * self.held.host / _BUS if self.run.teacher.teacher_memory == "host" else 0.0
        return 2 * self._gather() + host

    def _sync(self) -> float:
        """Whole weights reach every rank: shards gathered within tensor-parallel ranks, then sent from stage to stage."""
        if self.engine.kind in ("replay", "none"):
            return 0.0
        size = self.width * whole(self.arch)
        if self.engine.kind == "server":
            return size / self.layout.pipeline_model_parallel_size / (self.assumed.bandwidth * self.cluster.gpu.network)
        ranks = self.layout.model_parallel_size
        if ranks == 1:
            return 2 * size / (self.assumed.bandwidth * self.cluster.gpu.hbm)
        stages = self.layout.pipeline_model_parallel_size
        gathered = size / stages / self.between(self.layout.tensor_model_parallel_size)
        sent = size / self.between(stages, inner=ranks // stages * self.replicas) if stages > 1 else 0.0
        return gathered + sent

    def _rollout(self) -> float:
        """Prompts at the rate of matrix products, then one position after the other, each at the least for reading weights and
        cache. Sequences are taken to end evenly between 1 token and twice the mean, or the longest allowed."""
        one, arch = self.engine, self.arch
        if one.kind in ("replay", "none") or not samples(self.run):
            return 0.0
        share = 1.0 if self.run.rollout.on_policy_share is None else self.run.rollout.on_policy_share
        tensor, engines = one.tensor, one.engines
        if one.kind == "server":
            tensor = server_ranks(arch, self.cluster, self.width)
            engines = max(1, (self.assumed.server_gpus or self.cluster.gpus // 4) // tensor)
        batch = math.ceil(share * self.run.layout.global_batch_size / engines)
        products = 2 * active_parameters(arch) + 2 * arch.hidden_size * arch.padded_vocab_size
        prefill = batch * self.prompt * 2 * active_parameters(arch) / tensor / self.rate
        positions = min(self.run.rollout.max_completion_length, 2 * self.completion)
        running = batch * self.completion / positions  # on average
        cache = running * (self.prompt + self.completion / 2) * token_cache(arch, tensor, self.width)
        read = self._weights_read(running) * self.width / tensor + cache
        arithmetic = running * products / tensor / self.rate
        per_layer = _LAUNCH[one.kind] + (2 * _REDUCE if tensor > 1 else 0.0)
        each = max(read / (self.assumed.bandwidth * self.cluster.gpu.hbm), arithmetic) + arch.num_layers * per_layer
        return prefill + positions * each

    def _weights_read(self, running: float) -> float:
        """Parameters that a decoding step reads: of experts, those that some sequence of the batch chose."""
        total = whole(self.arch)
        if self.arch.experts is None:
            return total
        experts = 3 * self.arch.num_layers * self.arch.hidden_size * self.arch.ffn_hidden_size * self.arch.experts.count
        chosen = 1 - (1 - self.arch.experts.per_token / self.arch.experts.count) ** max(1.0, running)
        return total - experts * (1 - chosen)


def server_ranks(arch: Arch, cluster: Cluster, width: int) -> int:
    """GPUs of one server: the fewest that hold the model in 70 % of their memory."""
    ranks = 1
    while width * whole(arch) / ranks > 0.7 * cluster.gpu.memory:
        ranks *= 2
    return ranks
