"""Qwen3 with a mixture of experts in every layer: a softmax over all experts picks a few for each token."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Experts, Family
from unisd_megatron.families.decoder import attention, decoder, mixture, norm
from unisd_megatron.families.mapping import Mapping
from unisd_megatron.families.reading import read_arch, read_rope, refuse, switch, whole


class Qwen3Moe(Family):
    name = model_type = "qwen3_moe"

    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        refuse(config, self.name, "use_sliding_window", "attention_bias", "mlp_only_layers")
        if whole(config, "decoder_sparse_step", 1) != 1:
            raise ConfigError("config.json: decoder_sparse_step is not 1; qwen3_moe is covered with experts in every layer")
        counted = "num_experts" if "num_experts" in config else "num_local_experts"  # transformers 5 writes the second
        experts = Experts(whole(config, counted), whole(config, "num_experts_per_tok"), switch(config, "norm_topk_prob"))
        if experts.per_token > experts.count:
            raise ConfigError(f"config.json: num_experts_per_tok is {experts.per_token} of only {experts.count} experts")
        if experts.per_token == 1 and experts.renormalized:
            raise ConfigError("config.json: norm_topk_prob with one expert per token leaves the router without gradient")
        return read_arch(
            config,
            family=self.name,
            rope=read_rope(config, self.name, "default"),
            qk_norm=True,
            ffn="moe_intermediate_size",
            experts=experts,
        )

    def mappings(self, arch: Arch) -> list[Mapping]:
        return decoder(
            arch,
            lambda i: [
                norm(arch, i, "input_layernorm", "input_layernorm"),
                *attention(arch, i),
                norm(arch, i, "pre_mlp_layernorm", "post_attention_layernorm"),
                *mixture(arch, i),
            ],
        )

    def tiny_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
