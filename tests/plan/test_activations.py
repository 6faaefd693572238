"""What the planner says autograd keeps, against what it keeps: three sizes, layouts and recompute settings on CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from measured import measure

from unisd_megatron.config import Layout
from unisd_megatron.families import FAMILIES, Arch
from unisd_megatron.plan.activations import Rows, activations
from world import World

PROMPT, COMPLETION = 96, 32
SIZES = {
    "narrow": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
    "square": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
    },
    "wide": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
}


def arch_of(family: str, size: str, layers: int = 4) -> Arch:
    arch = FAMILIES[family].arch({**FAMILIES[family].tiny_config(), "vocab_size": 300, **SIZES[size]})
    local = None if arch.local is None else dataclasses.replace(arch.local, layers=(arch.local.layers * layers)[:layers])
    return dataclasses.replace(arch, num_layers=layers, local=local)


TP = {"tensor_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
AGAIN: tuple[str | None, ...] = (None, "selective", "full")
SEQUENCE, CONTEXT = TP | {"sequence_parallel": True}, {"context_parallel_size": 2}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((size, "qwen2", TP | {"recompute_granularity": again}) for size in ("narrow", "square") for again in AGAIN),
    *(("wide", "qwen2", {**cut, "bf16": True, "recompute_granularity": again}) for cut in (SEQUENCE, PP) for again in AGAIN),
    *(("narrow", family, {"bf16": bf16}) for family in ("qwen3", "gemma3", "qwen3_moe") for bf16 in (False, True)),
    ("wide", "qwen2", CONTEXT | {"bf16": True}),
    ("wide", "qwen2", TP | {"packing": False}),
    ("wide", "qwen2", PP | {"virtual_pipeline_model_parallel_size": 2}),
]


@pytest.mark.parametrize(("size", "family", "settings"), CASES)
def test_activations_are_predicted_within_a_tenth(world: World, size: str, family: str, settings: dict[str, Any]) -> None:
    layout = Layout(global_batch_size=8, micro_batch_size=2, **settings)
    if layout.model_parallel_size == 1:
        layout = dataclasses.replace(layout, global_batch_size=16)
    arch = arch_of(family, size)
    count = layout.micro_batches(2)
    rows = Rows(2, PROMPT, COMPLETION)
    for found in world.run(2, measure, arch, layout, "frozen", "beside", PROMPT, COMPLETION, timeout_s=120):
        said = activations(arch, layout, rows, stage=found.place["pipeline"], micro_batches=count)
        assert found.saved > 1 << 20
        assert said.saved == pytest.approx(found.saved, rel=0.1)
