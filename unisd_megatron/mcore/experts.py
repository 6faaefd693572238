"""Mixtures of experts: what Megatron's own modules leave out."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from unisd_megatron.losses.collectives import enter_shards


class Router(TopKRouter):
    """Megatron's router, whose own gate needs Transformer Engine (megatron-core 0.16.1)."""

    def gating(self, input: Tensor) -> Tensor:
        """Scores of the experts `[s, b, experts]`, in the dtype of the weights."""
        return torch.nn.functional.linear(input, self.weight)


class ReplicatedTokensMoELayer(MoELayer):
    """`MoELayer` without dispatch, for tensor parallel without sequence parallel: Megatron refuses to train it there.

    Every tensor-parallel rank routes every token, alike, and computes its channels of every expert. The sum over ranks leaves
    once for all experts, and so do the gradients of tokens and routing weights, as in the dense block.
    """

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        probabilities, routing = self.router(hidden_states)
        # Not Megatron's own way in, which loses the sum over ranks where a gradient is not contiguous, as that of `weights` is.
        tokens = enter_shards(hidden_states, self.tp_group).flatten(0, -2)
        counts = routing.sum(0)
        probabilities = enter_shards(probabilities, self.tp_group)
        size = len(tokens) * self.config.moe_router_topk  # no capacity: none is dropped
        ordered, weights, order, *_ = permute(tokens, routing, probs=probabilities, num_out_tokens=size)
        output, _ = self.experts(ordered, counts, weights)
        output = unpermute(output, order, restore_shape=tokens.shape, routing_map=routing)
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group).view_as(hidden_states), None
