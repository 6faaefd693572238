"""Qwen3, dense: queries and keys are normalised over a head dimension that the config states; no biases."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.families.base import Arch
from unisd_megatron.families.llama import Llama
from unisd_megatron.families.reading import read_arch, read_rope, refuse


class Qwen3(Llama):
    name = model_type = "qwen3"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        refuse(config, self.name, "use_sliding_window", "attention_bias")
        config = {"head_dim": 128, **config}
        return read_arch(config, family=self.name, rope=read_rope(config, self.name, "default"), qk_norm=True)

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
            "dtype": "float32",
        }
