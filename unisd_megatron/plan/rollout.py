"""The rollout engine of a run on a cluster: its bytes on a training rank, and how many engines there are. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unisd_megatron.config import Run
from unisd_megatron.families import Arch
from unisd_megatron.plan.hardware import GIB, Cluster
from unisd_megatron.plan.parameters import parts
from unisd_megatron.validation import needs_engine

_BUCKETS = 3 * 256 * 2**20  # weights/buckets.py's, at most three for a moment


@dataclass(frozen=True)
class Engine:
    """Bytes on one training rank. weights, cache: of an engine in the training processes; always: whether both are held while
    the student trains; buckets: of a weight sync; needed: what the engine must have at least, 0 where it has no limit.

    engines: how many there are (0: servers elsewhere, or none); tensor: ranks that share one; sequences: of a step, on each.
    """

    kind: Literal["transformers", "colocate", "server", "replay", "none"]
    weights: int = 0
    cache: int = 0
    always: bool = True
    buckets: int = 0
    needed: int = 0
    engines: int = 0
    tensor: int = 1
    sequences: int = 0

    @property
    def training(self) -> int:
        """Bytes while the student trains."""
        return self.weights + self.cache if self.always else 0

    @property
    def generating(self) -> int:
        """Bytes while completions are sampled, or weights are sent."""
        return self.weights + self.cache + self.buckets


def token_cache(arch: Arch, tensor: int, width: int) -> int:
    """Bytes of keys and values of one token on a rank of an engine."""
    return 2 * arch.num_layers * max(1, arch.num_query_groups // tensor) * arch.head_dim * width


def whole(arch: Arch) -> int:
    """Parameters of the model, the vocabulary padded."""
    one = parts(arch, 1, 1)
    layers = sum(parameter.numel for parameter in one.layer) * arch.num_layers
    return one.embedding.numel + layers + one.final_norm.numel + (0 if arch.tied else one.head.numel)


def engine(run: Run, arch: Arch, cluster: Cluster) -> Engine:
    """What the run's settings ask for."""
    if not needs_engine(run):
        return Engine("none")
    width = 2 if run.layout.bf16 else 4
    longest = run.data.max_prompt_length + run.rollout.max_completion_length
    if run.vllm.use_vllm and run.vllm.vllm_mode == "server":
        return Engine("server", buckets=_BUCKETS, sequences=run.layout.global_batch_size)
    if run.rollout.rollout == "replay":
        return Engine("replay")
    if not run.vllm.use_vllm:
        sequences = math.ceil(run.layout.global_batch_size / cluster.gpus)
        cache = sequences * longest * token_cache(arch, 1, width)
        # The model stays; keys and values are there while it generates.
        return Engine(
            "transformers",
            weights=width * whole(arch),
            cache=cache,
            buckets=_BUCKETS,
            engines=cluster.gpus,
            sequences=sequences,
        )
    tensor = run.vllm.vllm_tensor_parallel_size
    engines = cluster.gpus // tensor
    sequences = math.ceil(run.layout.global_batch_size / max(1, engines))
    weights = width * whole(arch) // tensor
    one = longest * token_cache(arch, tensor, width)
    if cluster.on_cpu:
        cache = int(run.vllm.vllm_kv_cache_gib * GIB)
        return Engine("colocate", weights, cache, True, _BUCKETS, weights + one, engines, tensor, sequences)
    granted = int(run.vllm.vllm_gpu_memory_utilization * cluster.gpu.memory)
    cache = max(0, granted - weights)
    asleep = run.vllm.vllm_enable_sleep_mode
    return Engine("colocate", weights, cache, not asleep, _BUCKETS, weights + one, engines, tensor, sequences)
