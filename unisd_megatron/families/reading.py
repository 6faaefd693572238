"""Reading a Hugging Face `config.json`, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import sys
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
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ConfigError(f"config.json: {name} is {value!r}; expected a positive whole number")
    return value


_LARGEST = 2**31 - 1  # of a dimension; products of two are still numbers to torch


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive, finite number of the config; `ConfigError` names the key otherwise. default: where the key is absent."""
    value = required(config, name) if default is None else config.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {name} is {value!r}; expected a positive number")
    return float(value)


def switch(config: Mapping[str, Any], name: str) -> bool:
    """A switch of the config, off where it is absent or null; `ConfigError` for what is neither true nor false."""
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise ConfigError(f"config.json: {name} is {value!r}; expected true or false")
    return bool(value)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within the config, empty where it is absent or null; `ConfigError` for what is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r}; expected an object")
    return value or {}


def refuse(config: Mapping[str, Any], family: str, *names: str) -> None:
    """Raises `ConfigError` for the first switch of the config that is on and that the family file does not cover."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"config.json: {name} is {config[name]!r}; this {family} model file covers models without it")


def read_rope(config: Mapping[str, Any], family: str, *covered: str) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Raises `ConfigError` for a type that is not among those `covered`, and where the spellings contradict each other.
    `dynamic` is the default up to `max_position_embeddings`, and no sequence here is longer.
    """
    base = number(config, "rope_theta", 10000.0)
    older, newer = section(config, "rope_scaling"), section(config, "rope_parameters")
    ropes = [make_rope(config, stated, base, family, *covered) for stated in (older or newer, newer or older)]
    return one_rope(*ropes)


def one_rope(first: Rope, second: Rope) -> Rope:
    """The RoPE that two readings agree on; `ConfigError` where they do not: which one counts changed with transformers."""
    if first != second:
        names = "rope_type, rope_theta and factors"
        raise ConfigError(f"config.json: rope_scaling and rope_parameters differ in {names}; keep the one that is meant")
    return first


def make_rope(config: Mapping[str, Any], stated: Mapping[str, Any], base: float, family: str, *covered: str) -> Rope:
    """The RoPE that a `rope_scaling` or `rope_parameters` of the config states, its base where it states none itself."""
    base = number(stated, "rope_theta", base)
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in covered:
        raise ConfigError(f"config.json: rope type {kind!r} is not covered for {family}; use {' or '.join(covered)}")
    if kind == "linear":
        return Rope(base, linear_factor=number(stated, "factor"))
    if kind != "llama3":
        return Rope(base)
    scaling = Llama3Scaling(
        factor=number(stated, "factor"),
        low_freq_factor=number(stated, "low_freq_factor"),
        high_freq_factor=number(stated, "high_freq_factor"),
        original_max_position=_original_max_position(config, stated),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(f"config.json: low_freq_factor {scaling.low_freq_factor:g} is not below high_freq_factor")
    return Rope(base, llama3=scaling)


def _original_max_position(config: Mapping[str, Any], stated: Mapping[str, Any]) -> int:
    """Beside the other numbers of the scaling, or at the top, which transformers prefers."""
    name = "original_max_position_embeddings"
    inner, outer = (whole(one if name in one else other, name) for one, other in ((stated, config), (config, stated)))
    if inner != outer:
        raise ConfigError(f"config.json: {name} is {outer}, and {inner} with the scaling; keep the one that is meant")
    return inner


def _refuse_other_layers(config: Mapping[str, Any], family: str) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and (type(kinds) is not list or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"config.json: layer_types has more than full_attention; this {family} model file covers no other")


def read_arch(config: Mapping[str, Any], *, family: str, rope: Rope, ffn: str = "intermediate_size", **switches: Any) -> Arch:
    """The dimensions that all families state alike, and the `switches` of this one. ffn: the key of that dimension."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    covered = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[switches.get("activation", "silu")]
    if activation != covered:
        raise ConfigError(f"config.json: hidden_act {activation!r} is not covered for {family}; only {covered} is")
    if switches.get("local") is None:
        _refuse_other_layers(config, family)
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    head_dim = whole(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {head_dim}; RoPE turns pairs of channels, so it must be even")
    return Arch(
        family=family,
        num_layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=whole(config, ffn),
        num_attention_heads=heads,
        num_query_groups=whole(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=whole(config, "vocab_size"),
        max_position=whole(config, "max_position_embeddings"),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        rope=rope,
        tied=switch(config, "tie_word_embeddings"),
        **switches,
    )
