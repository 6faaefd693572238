"""Attention of packed rows and of sliding windows for the local layer spec: each segment by itself, with Megatron's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.losses.collectives import gather_rows
from unisd_megatron.mcore.rope import GLOBAL, LOCAL


class SegmentAttention(DotProductAttention):
    """`DotProductAttention` that accepts packed rows: query, key, value `[t, heads, d]`, result `[t, heads * d]`.

    Costs the sum of the segments' squares, like the kernels of Transformer Engine and flash-attn, not the square of the row.
    Under context parallel, keys and values of all ranks are gathered: exact and simple, for where Transformer Engine's ring
    is not there. In a layer with a window, a query sees the `config.window_size[0]` tokens before it and itself.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # Megatron's class refuses more, since it would not gather
        alone.window_size = None  # and takes a window's mask to be that of a whole row
        super().__init__(alone, layer_number, *args, **kwargs)
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._back = config.window_size[0] if local else None

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
            if self._back is not None:
                everywhere = torch.arange(len(query), device=query.device)
                attention_mask = _hidden(everywhere, everywhere, self._back)
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        group = parallel_state.get_context_parallel_group()
        ranks, rank = group.size(), group.rank()
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        mine = [length // ranks for length in lengths]
        queries = query.unsqueeze(1).split(mine)
        keys, values = (self._whole(x, mine, group) for x in (key, value))
        out = []
        for length, *qkv in zip(lengths, queries, keys, values, strict=True):
            mask = None
            if ranks > 1 or self._back is not None:
                everywhere = torch.arange(length, device=query.device)
                mask = _hidden(_part_of(everywhere, ranks, rank), everywhere, self._back)
            out.append(super().forward(*qkv, mask, attn_mask_type).squeeze(1))
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


class FlashSegmentAttention(SegmentAttention):
    """The same through flash-attn's kernel for packed rows: memory linear in the row. bf16 on a GPU, one context-parallel rank.

    Padded rows go the way of `SegmentAttention`.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        from flash_attn import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

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
        said: Tensor = self._attend(
            query,
            key,
            value,
            packed_seq_params.cu_seqlens_q,
            packed_seq_params.cu_seqlens_kv,
            packed_seq_params.max_seqlen_q,
            packed_seq_params.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=True,
            window_size=(-1, -1) if self._back is None else (self._back, 0),
        )
        return said.flatten(1)


def _part_of(positions: Tensor, ranks: int, rank: int) -> Tensor:
    """This context-parallel rank's part of a segment: of 2 cp chunks the rank-th, and the rank-th from the end."""
    if ranks == 1:
        return positions
    chunks = positions.chunk(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


def _hidden(queries: Tensor, keys: Tensor, back: int | None) -> Tensor:
    """Attention mask `[1, 1, queries, keys]` from positions, True where a key lies after the query or too far back."""
    distance = queries[:, None] - keys[None]
    hidden = distance < 0 if back is None else (distance < 0) | (distance > back)
    return hidden[None, None]


class LocalGlobalSelfAttention(SelfAttention):
    """Self-attention of a model with local layers: takes its layer's part of what `LocalAndGlobalRope` made."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        kwargs["rotary_pos_emb"] = kwargs["rotary_pos_emb"][LOCAL if local else GLOBAL]
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


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
