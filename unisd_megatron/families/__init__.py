"""Model families: one file each, listed here."""

from __future__ import annotations

from collections.abc import Mapping as AbstractMapping
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.base import Arch, Family, Mapping
from unisd_megatron.families.llama import Llama
from unisd_megatron.families.qwen2 import Qwen2

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen2(), Llama())}


def family_of(config: AbstractMapping[str, Any]) -> Family:
    """The family of a `config.json`; `ConfigError` names the supported ones."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Arch", "Family", "Mapping", "family_of"]
