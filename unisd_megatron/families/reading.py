"""Reading a Hugging Face `config.json`, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, RopeScaling


@dataclass(frozen=True)
class Rope:
    """RoPE as a config states it."""

    type: str
    base: float
    scaling: RopeScaling | None


def required(config: Mapping[str, Any], name: str) -> Any:
    """The value of a key without which there is no model; `ConfigError` names the key."""
    if name not in config:
        raise ConfigError(f"config.json: {name} is missing")
    return config[name]


def whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number of the config; `ConfigError` names the key otherwise."""
    value = required(config, name) if default is None else config.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {name} is {value!r}; expected a positive whole number")
    return value


def rope_settings(config: Mapping[str, Any]) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = stated.get("rope_type", stated.get("type", "default"))
    base = float(stated.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind != "llama3":
        return Rope(kind, base, None)
    return Rope(
        kind,
        base,
        RopeScaling(
            factor=float(required(stated, "factor")),
            low_freq_factor=float(required(stated, "low_freq_factor")),
            high_freq_factor=float(required(stated, "high_freq_factor")),
            original_max_position=int(required(stated, "original_max_position_embeddings")),
        ),
    )


def base_arch(config: Mapping[str, Any], *, family: str, rope: Rope, qkv_bias: bool) -> Arch:
    """The dimensions that Llama-shaped configs share."""
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {config['hidden_act']!r} is not covered; only silu is")
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    return Arch(
        family=family,
        num_layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_key_value_heads", heads),
        head_dim=whole(config, "head_dim", hidden // heads),
        vocab_size=whole(config, "vocab_size"),
        max_position=whole(config, "max_position_embeddings"),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        qkv_bias=qkv_bias,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
