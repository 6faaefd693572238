"""Qwen2 and Qwen2.5: grouped-query attention with a bias on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.families.base import Arch
from unisd_megatron.families.llama import Llama
from unisd_megatron.families.reading import read_arch, read_rope, refuse


class Qwen2(Llama):
    name = model_type = "qwen2"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        refuse(config, self.name, "use_sliding_window")
        return read_arch(config, family=self.name, rope=read_rope(config, self.name, "default"), qkv_bias=True)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 256,  # head dimension 32: vLLM derives it from this
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "dtype": "float32",
        }
