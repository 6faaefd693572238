"""Packed rows through flash-attn's function give what the segments give one by one. The kernel itself needs a GPU: here its
documented interface is carried out in plain torch, so that what is shown is how it is called."""

from __future__ import annotations

import itertools
import sys
import types
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.families import FAMILIES
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.attention import FlashSegmentAttention, SegmentAttention
from unisd_megatron.mcore.model import transformer_config
from unisd_megatron.weights.tiny import tiny_model
from world import World


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """flash-attn 2: q `[t, heads, d]`, k and v `[t, groups, d]`, result as q; `window_size` counts tokens before and after."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and causal and dropout_p == 0.0
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    out = torch.empty_like(q)
    for begin, end in itertools.pairwise(cu_seqlens_q.tolist()):
        one, keys, values = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        repeat = len(one) // len(keys)
        scores = one @ keys.repeat_interleave(repeat, 0).transpose(1, 2) * (softmax_scale or q.shape[-1] ** -0.5)
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (distance >= 0) & ((distance <= window_size[0]) | torch.tensor(window_size[0] < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = (weights @ values.repeat_interleave(repeat, 0)).transpose(0, 1)
    return out


def differences(rank: int, group: Any, family: str) -> list[float]:
    platform = platforms.choose()
    with start.world(platform, Layout(), 1):
        arch = FAMILIES[family].arch(tiny_model(family, 1).config.to_dict())
        config, found = transformer_config(arch, Layout(), platform), []
        ends = torch.tensor([0, 5, 6, 30], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=24, max_seqlen_kv=24)
        how: dict[str, Any] = {
            "attn_mask_type": AttnMaskType.causal,
            "attention_type": "self",
            "softmax_scale": arch.attention_scale,
        }
        library = types.ModuleType("flash_attn")
        library.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
        for layer in range(1, arch.num_layers + 1):
            torch.manual_seed(layer)
            query = torch.randn(30, arch.num_attention_heads, arch.head_dim)
            key, value = torch.randn(2, 30, arch.num_query_groups, arch.head_dim)
            with mock.patch.dict(sys.modules, {"flash_attn": library}):
                flash = FlashSegmentAttention(config, layer, **how)
            results = [
                one(query, key, value, None, packed_seq_params=packed)
                for one in (SegmentAttention(config, layer, **how), flash)
            ]
            assert results[0].shape == results[1].shape
            found.append(float((results[0] - results[1]).abs().max()))
        return found


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_equals_the_segments_one_by_one(world: World, family: str) -> None:
    found = world.run(1, differences, family)[0]
    assert found and max(found) < 1e-5
