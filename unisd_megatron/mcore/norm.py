"""RMSNorms for the local layer spec that also work under sequence parallelism (Megatron's own refuses it)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension of `[s(/t), b, h]`; the weight is the same on every tensor-parallel rank.

    Under sequence parallelism each rank sees a part of the sequence, so the weight's gradient is partial; the mark on
    the weight makes Megatron's `finalize_model_grads` all-reduce it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class ZeroCenteredRMSNorm(SequenceParallelRMSNorm):
    """Multiplies by `1 + weight`, in fp32 (Gemma). The weight is kept as checkpoints have it, so that it loads bit for bit."""

    def forward(self, x: Tensor) -> Tensor:
        normalized = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (normalized * (1.0 + self.weight.float())).type_as(x)


class RowParallelLinearThenNorm(RowParallelLinear):
    """The last projection of a block, and a norm over its sum before the residual is added: `post_layernorm`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **how: Any) -> None:
        super().__init__(input_size, output_size, config=config, **how)
        assert self.bias is None, "a bias would be added behind the norm"
        self.post_layernorm = ZeroCenteredRMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        summed, _ = super().forward(input_)
        return self.post_layernorm(summed), None
