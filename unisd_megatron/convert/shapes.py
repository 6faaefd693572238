"""What shape a Hugging Face tensor must have, from the config alone: for refusing a folder before anything is started."""

from __future__ import annotations

from unisd_megatron.families import Arch


def expected_shape(name: str, arch: Arch) -> tuple[int, ...] | None:
    """The shape of a tensor under the names that decoders share; None for one that only the family knows.

    What is not known here is compared when it is loaded, against the shape of its Megatron parameter.
    """
    if ".experts." in name or name.count(".") < 2:
        return (arch.vocab_size, arch.hidden_size) if name == "lm_head.weight" else None
    module, kind = name.split(".")[-2:]
    heads, groups = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    known = {
        "embed_tokens": (arch.vocab_size, arch.hidden_size),
        "q_proj": (heads, arch.hidden_size),
        "k_proj": (groups, arch.hidden_size),
        "v_proj": (groups, arch.hidden_size),
        "o_proj": (arch.hidden_size, heads),
        "gate_proj": (arch.ffn_hidden_size, arch.hidden_size),
        "up_proj": (arch.ffn_hidden_size, arch.hidden_size),
        "down_proj": (arch.hidden_size, arch.ffn_hidden_size),
        "input_layernorm": (arch.hidden_size,),
        "post_attention_layernorm": (arch.hidden_size,),
        "norm": (arch.hidden_size,),
    }
    shape = known.get(module)
    return shape[:1] if shape and kind == "bias" else shape
