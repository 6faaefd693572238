"""RMSNorm for the local layer spec that also works under sequence parallelism (Megatron's own refuses it)."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension of `[s(/t), b, h]`; the weight is the same on every tensor-parallel rank.

    Under sequence parallelism each rank sees a part of the sequence, so the weight's gradient is partial; the mark on
    the weight makes Megatron's `finalize_model_grads` all-reduce it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
