"""Bytes of weights, gradients, optimizer, teacher and EMA: exact on every rank of CPU runs, in three sizes and more layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from measured import measure
from test_activations import arch_of

from unisd_megatron.config import Layout
from unisd_megatron.plan import rank_bytes
from world import World

TP, PP, DISTRIBUTED = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"use_distributed_optimizer": True},
)
KEPT = (("ema", "beside"), ("frozen", "swap"), ("ema", "host"), ("frozen", "beside"), ("live", "beside"))

# Layers of widths that buffers have to be padded for: an odd number of heads' rows, a norm of 96 + 2 numbers.
CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    (size, "qwen2", 2, {**layout, "bf16": bf16})
    for size, bf16 in (("narrow", True), ("square", False), ("wide", True))
    for layout in (TP, PP, DISTRIBUTED)
] + [
    ("narrow", "llama", 4, {**DISTRIBUTED, **PP, "bf16": True}),
    ("narrow", "qwen3", 4, {**TP, **DISTRIBUTED, "sequence_parallel": True}),
    ("narrow", "gemma3", 4, {**PP, **DISTRIBUTED, "virtual_pipeline_model_parallel_size": 2, "bf16": True}),
    ("narrow", "internlm3", 4, {**DISTRIBUTED, "bf16": True}),
    ("narrow", "qwen3_moe", 4, {**DISTRIBUTED, "expert_model_parallel_size": 2, "bf16": True}),
    ("narrow", "qwen3_moe", 4, {"expert_model_parallel_size": 2, "context_parallel_size": 2}),
    ("narrow", "qwen2", 3, DISTRIBUTED),
]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)))
def test_what_lasts_is_exact_on_every_rank(world: World, number: int, case: tuple[str, str, int, dict[str, Any]]) -> None:
    size, family, ranks, settings = case
    kind, memory = KEPT[number % len(KEPT)]
    layout = Layout(global_batch_size=4 * ranks, micro_batch_size=2, **settings)
    arch = arch_of(family, size)
    # Nothing here divides evenly: 98 is no multiple of 64, and the vocabulary's 384 rows are more than 300.
    arch = dataclasses.replace(arch, hidden_size=98) if size == "narrow" else arch
    for found in world.run(ranks, measure, arch, layout, kind, memory, 12, 4, timeout_s=120):
        said = rank_bytes(
            arch,
            layout,
            world_size=ranks,
            teacher=kind,
            teacher_memory=memory,
            pipeline_rank=found.place["pipeline"],
            data_rank=found.place["data"],
            expert_data_rank=found.place["expert_data"],
        )
        for name in ("parameters", "weights", "gradients", "optimizer", "teacher", "ema"):
            assert getattr(said, name) == getattr(found, name), name
