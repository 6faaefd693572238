"""Llama 2 to 3.1: grouped-query attention without bias, RoPE with Llama-3.1's frequency scaling."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Family, Mapping, decoder_mappings
from unisd_megatron.families.reading import base_arch, rope_settings


class Llama(Family):
    model_type = "llama"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ConfigError(f"config.json: {name} is true; this llama model file covers models without it")
        rope = rope_settings(config)
        if rope.type not in ("default", "llama3"):
            raise ConfigError(f"config.json: rope type {rope.type!r} is not covered for llama; use default or llama3")
        return base_arch(config, family="llama", rope=rope, qkv_bias=False)

    def mappings(self, arch: Arch) -> list[Mapping]:
        return decoder_mappings(arch)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
