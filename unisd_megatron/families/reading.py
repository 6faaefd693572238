"""Reading a Hugging Face `config.json`, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Llama3Scaling, Rope


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


def refuse(config: Mapping[str, Any], family: str, *names: str) -> None:
    """Raises `ConfigError` for the first switch of the config that is on and that the family file does not cover."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"config.json: {name} is {config[name]!r}; this {family} model file covers models without it")


def read_rope(config: Mapping[str, Any], family: str, *covered: str) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Raises `ConfigError` for a type that is not among those `covered`. `dynamic` is the default up to
    `max_position_embeddings`, and no sequence here is longer.
    """
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return make_rope(stated, float(stated.get("rope_theta") or config.get("rope_theta") or 10000.0), family, *covered)


def make_rope(stated: Mapping[str, Any], base: float, family: str, *covered: str) -> Rope:
    """The RoPE that a `rope_scaling` states; see `read_rope`."""
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in covered:
        raise ConfigError(f"config.json: rope type {kind!r} is not covered for {family}; use {' or '.join(covered)}")
    if kind == "linear":
        return Rope(base, linear_factor=float(required(stated, "factor")))
    if kind != "llama3":
        return Rope(base)
    return Rope(
        base,
        llama3=Llama3Scaling(
            factor=float(required(stated, "factor")),
            low_freq_factor=float(required(stated, "low_freq_factor")),
            high_freq_factor=float(required(stated, "high_freq_factor")),
            original_max_position=int(required(stated, "original_max_position_embeddings")),
        ),
    )


def read_arch(config: Mapping[str, Any], *, family: str, rope: Rope, ffn: str = "intermediate_size", **switches: Any) -> Arch:
    """The dimensions that all families state alike, and the `switches` of this one. ffn: the key of that dimension."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    covered = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[switches.get("activation", "silu")]
    if activation != covered:
        raise ConfigError(f"config.json: hidden_act {activation!r} is not covered for {family}; only {covered} is")
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    return Arch(
        family=family,
        num_layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=whole(config, ffn),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_key_value_heads", heads),
        head_dim=whole(config, "head_dim", hidden // heads),
        vocab_size=whole(config, "vocab_size"),
        max_position=whole(config, "max_position_embeddings"),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
        **switches,
    )
