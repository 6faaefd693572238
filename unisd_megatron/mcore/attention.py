"""Attention of packed rows for the local layer spec, which has none: each segment by itself, with Megatron's own attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from unisd_megatron.batch import View


class SegmentAttention(DotProductAttention):
    """`DotProductAttention` that accepts packed rows: query, key, value `[t, heads, d]`, result `[t, heads * d]`.

    Costs the sum of the segments' squares, like the kernels of Transformer Engine and flash-attn, not the square of the row.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        segments = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([super(SegmentAttention, self).forward(*qkv, None, attn_mask_type).squeeze(1) for qkv in segments])


def packed_seq_params(view: View) -> PackedSeqParams | None:
    """What Megatron's layers are told about a packed view; None for a padded one."""
    if view.segments is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=view.segments,
        cu_seqlens_kv=view.segments,
        max_seqlen_q=view.longest,
        max_seqlen_kv=view.longest,
    )
