"""Model families: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Family
from unisd_megatron.families.gemma3 import Gemma3
from unisd_megatron.families.internlm3 import InternLM3
from unisd_megatron.families.llama import Llama
from unisd_megatron.families.mapping import Mapping
from unisd_megatron.families.qwen2 import Qwen2
from unisd_megatron.families.qwen3 import Qwen3
from unisd_megatron.families.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen2(), Llama(), Gemma3(), InternLM3(), Qwen3(), Qwen3Moe())}


def family_named(name: str) -> Family:
    """The family that `--family` names; `ConfigError` names the supported ones."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown --family {name!r}; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: AbstractMapping[str, Any]) -> Family:
    """The family of a `config.json`; `ConfigError` names the supported ones."""
    model_type = config.get("model_type")
    by_type = {family.model_type: family for family in FAMILIES.values()}
    if model_type in by_type:
        return by_type[model_type]
    if "text_config" in config and (inner := config["text_config"].get("model_type")) in by_type:
        raise ConfigError(
            f"config.json: model_type {model_type!r} reads images too; of it only the language model ({inner}) is supported: "
            "load the folder with transformers, save its language model alone, and use that"
        )
    raise ConfigError(f"config.json: model_type {model_type!r} is not supported; use one of {', '.join(by_type)}")


__all__ = ["FAMILIES", "Arch", "Family", "Mapping", "family_named", "family_of"]
