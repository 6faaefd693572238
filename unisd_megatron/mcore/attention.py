"""Attention of packed rows for the local layer spec, which has none: each segment by itself, with Megatron's own attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.losses.collectives import gather_rows


class SegmentAttention(DotProductAttention):
    """`DotProductAttention` that accepts packed rows: query, key, value `[t, heads, d]`, result `[t, heads * d]`.

    Costs the sum of the segments' squares, like the kernels of Transformer Engine and flash-attn, not the square of the row.
    Under context parallel, keys and values of all ranks are gathered: exact and simple, for where Transformer Engine's ring
    is not there.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # Megatron's class refuses more, since it would not gather
        super().__init__(alone, *args, **kwargs)

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
        group = parallel_state.get_context_parallel_group()
        ranks, rank = group.size(), group.rank()
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        mine = [length // ranks for length in lengths]
        queries = query.unsqueeze(1).split(mine)
        keys, values = (self._whole(x, mine, group) for x in (key, value))
        out = []
        for length, *qkv in zip(lengths, queries, keys, values, strict=True):
            hidden_from = None if ranks == 1 else _later_positions(length, ranks, rank, query.device)
            out.append(super().forward(*qkv, hidden_from, attn_mask_type).squeeze(1))
        return torch.cat(out)

    def _whole(self, x: Tensor, mine: list[int], group: torch.distributed.ProcessGroup) -> list[Tensor]:
        """This rank's part of every segment `[t, heads, d]` -> each whole segment `[length, 1, heads, d]`."""
        ranks = group.size()
        if ranks == 1:
            return list(x.unsqueeze(1).split(mine))
        parts = [part.split(mine) for part in gather_rows(x, group).chunk(ranks)]
        whole = []
        for of_segment in zip(*parts, strict=True):
            early, late = zip(*(part.chunk(2) for part in of_segment), strict=True)
            whole.append(torch.cat([*early, *reversed(late)]).unsqueeze(1))
        return whole


def _later_positions(length: int, ranks: int, rank: int, device: torch.device) -> Tensor:
    """Attention mask `[1, 1, mine, length]`, True where a key lies after this rank's query."""
    everywhere = torch.arange(length, device=device)
    chunks = everywhere.chunk(2 * ranks)
    queries = torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])
    return (everywhere[None] > queries[:, None])[None, None]


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
