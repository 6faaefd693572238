"""InternLM3 for `transformers`, which has no class for it: a Llama with two bias flags. No code of the checkpoint runs."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class InternLM3Config(LlamaConfig):
    """The published `config.json`. `qkv_bias`: on queries, keys and values; `bias`: on every other projection."""

    model_type = "internlm3"
    qkv_bias: bool = False
    bias: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        # Llama's names, as far as they can say it; vLLM reads them too.
        self.attention_bias, self.mlp_bias = self.qkv_bias and self.bias, self.bias


class InternLM3ForCausalLM(LlamaForCausalLM):
    """A Llama whose attention has its biases where InternLM3's flags put them."""

    config_class = InternLM3Config

    def __init__(self, config: InternLM3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            biased = [attention.q_proj, attention.k_proj, attention.v_proj] if config.qkv_bias else []
            for projection in biased + ([attention.o_proj] if config.bias else []):
                if projection.bias is None:
                    projection.bias = torch.nn.Parameter(projection.weight.new_zeros(projection.out_features))


def register() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` of this process know InternLM3."""
    AutoConfig.register("internlm3", InternLM3Config, exist_ok=True)
    AutoModelForCausalLM.register(InternLM3Config, InternLM3ForCausalLM, exist_ok=True)
