"""The parts that weight maps are put together from. Left: Megatron's names; right: those of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from unisd_megatron.families.base import Arch
from unisd_megatron.families.mapping import QKV, GateUp, Mapping, Replicated, Split, Vocabulary


def decoder(arch: Arch, layer: Callable[[int], list[Mapping]]) -> list[Mapping]:
    """Embedding, layers, final norm and head."""
    vocabulary = ((arch.vocab_size, arch.hidden_size),)
    head = [Vocabulary("output_layer.weight", ("lm_head.weight",), vocabulary, arch.padded_vocab_size)]
    return [
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary, arch.padded_vocab_size),
        *(mapping for i in range(arch.num_layers) for mapping in layer(i)),
        Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), ((arch.hidden_size,),)),
        *([] if arch.tied else head),
    ]


def norm(arch: Arch, i: int, megatron: str, hf: str) -> Mapping:
    """A norm over the hidden size in layer i."""
    return Replicated(f"decoder.layers.{i}.{megatron}.weight", (f"model.layers.{i}.{hf}.weight",), ((arch.hidden_size,),))


def attention(arch: Arch, i: int) -> list[Mapping]:
    """Attention of layer i, without the norm before it."""
    to, of = f"decoder.layers.{i}.self_attention.", f"model.layers.{i}.self_attn."
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    rows, groups, hidden = (queries, keys, keys), arch.num_query_groups, arch.hidden_size

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{of}{part}_proj.{kind}" for part in "qkv")

    out: list[Mapping] = [QKV(to + "linear_qkv.weight", qkv("weight"), tuple((n, hidden) for n in rows), groups)]
    if arch.qkv_bias:
        out.append(QKV(to + "linear_qkv.bias", qkv("bias"), tuple((n,) for n in rows), groups))
    if arch.qk_norm:
        out.append(Replicated(to + "q_layernorm.weight", (of + "q_norm.weight",), ((arch.head_dim,),)))
        out.append(Replicated(to + "k_layernorm.weight", (of + "k_norm.weight",), ((arch.head_dim,),)))
    out.append(Split(to + "linear_proj.weight", (of + "o_proj.weight",), ((hidden, queries),), dim=1))
    if arch.linear_bias:
        out.append(Replicated(to + "linear_proj.bias", (of + "o_proj.bias",), ((hidden,),)))
    return out


def feed_forward(arch: Arch, i: int) -> list[Mapping]:
    """The feed-forward block of layer i, without the norm before it."""
    return _gated(arch, f"decoder.layers.{i}.mlp.", f"model.layers.{i}.mlp.")


def mixture(arch: Arch, i: int) -> list[Mapping]:
    """Router and experts of layer i, without the norm before them."""
    assert arch.experts is not None
    to, of = f"decoder.layers.{i}.mlp.", f"model.layers.{i}.mlp."
    router = Replicated(to + "router.weight", (of + "gate.weight",), ((arch.experts.count, arch.hidden_size),))
    experts = [_gated(arch, f"{to}experts.local_experts.{n}.", f"{of}experts.{n}.") for n in range(arch.experts.count)]
    return [router, *(mapping for expert in experts for mapping in expert)]


def _gated(arch: Arch, to: str, of: str) -> list[Mapping]:
    wide, hidden = arch.ffn_hidden_size, arch.hidden_size
    gate_up, down = (of + "gate_proj.", of + "up_proj."), of + "down_proj."
    out: list[Mapping] = [
        GateUp(to + "linear_fc1.weight", tuple(one + "weight" for one in gate_up), ((wide, hidden),) * 2),
        Split(to + "linear_fc2.weight", (down + "weight",), ((hidden, wide),), dim=1),
    ]
    if arch.linear_bias:
        out.insert(1, GateUp(to + "linear_fc1.bias", tuple(one + "bias" for one in gate_up), ((wide,),) * 2))
        out.append(Replicated(to + "linear_fc2.bias", (down + "bias",), ((hidden,),)))
    return out
