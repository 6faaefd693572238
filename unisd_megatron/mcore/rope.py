"""Rotary embeddings as a model's family states them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from unisd_megatron.families.base import Arch, Rope

GLOBAL, LOCAL = 0, 1
"""Places in what `LocalAndGlobalRope` returns."""


def rotary_embedding(arch: Arch, config: TransformerConfig) -> RotaryEmbedding | LocalAndGlobalRope:
    """The rotary embedding of a model."""
    of_all = _single(arch.rope, arch.head_dim, config)
    return of_all if arch.local is None else LocalAndGlobalRope(of_all, _single(arch.local.rope, arch.head_dim, config))


class LocalAndGlobalRope(torch.nn.Module):
    """The angles of global and of local layers, `[2, s, 1, 1, d]`; `LocalGlobalSelfAttention` takes the layer's own."""

    def __init__(self, of_global: RotaryEmbedding, of_local: RotaryEmbedding) -> None:
        super().__init__()
        self.of_global, self.of_local = of_global, of_local

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """See Megatron's `RotaryEmbedding`."""
        return self.of_global.get_rotary_seq_len(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes what Megatron's `RotaryEmbedding` takes."""
        return torch.stack([self.of_global(*args, **kwargs), self.of_local(*args, **kwargs)])


def _single(rope: Rope, head_dim: int, config: TransformerConfig) -> RotaryEmbedding:
    embedding = RotaryEmbedding(
        head_dim,
        rotary_percent=1.0,
        rotary_base=rope.base,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    if rope.llama3 is not None:
        # Megatron's own switch fixes every number but the factor to those of Llama-3.1-8B.
        embedding.inv_freq = embedding._apply_scaling(
            embedding.inv_freq,
            factor=rope.llama3.factor,
            low_freq_factor=rope.llama3.low_freq_factor,
            high_freq_factor=rope.llama3.high_freq_factor,
            original_max_position_embeddings=rope.llama3.original_max_position,
        )
    if rope.linear_factor != 1.0:
        embedding.inv_freq = embedding.inv_freq / rope.linear_factor
    return embedding
