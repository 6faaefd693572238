"""InternLM3: a Llama whose config switches biases on by two flags (`qkv_bias`, `bias`) and states its head dimension."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch
from unisd_megatron.families.llama import Llama
from unisd_megatron.families.reading import read_arch, read_rope, switch


class InternLM3(Llama):
    name = model_type = "internlm3"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        on_qkv, elsewhere = switch(config, "qkv_bias"), switch(config, "bias")
        if elsewhere and not on_qkv:
            raise ConfigError("config.json: bias is true and qkv_bias is not; InternLM3 is covered with both, or without bias")
        rope = read_rope(config, self.name, "default", "dynamic")
        return read_arch(config, family=self.name, rope=rope, qkv_bias=on_qkv, linear_bias=elsewhere)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "internlm3",
            "architectures": ["InternLM3ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "qkv_bias": True,
            "bias": True,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50000000.0, "factor": 6.0},
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
