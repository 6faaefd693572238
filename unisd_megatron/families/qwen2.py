"""Qwen2 and Qwen2.5: grouped-query attention with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Family, Mapping, decoder_mappings
from unisd_megatron.families.reading import base_arch, rope_settings


class Qwen2(Family):
    model_type = "qwen2"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        if config.get("use_sliding_window"):
            raise ConfigError("config.json: use_sliding_window is true; this qwen2 model file covers full attention only")
        rope = rope_settings(config)
        if rope.type != "default":
            raise ConfigError(f"config.json: rope type {rope.type!r} is not covered for qwen2; only the default is")
        return base_arch(config, family="qwen2", rope=rope, qkv_bias=True)

    def mappings(self, arch: Arch) -> list[Mapping]:
        return decoder_mappings(arch)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "dtype": "float32",
        }
