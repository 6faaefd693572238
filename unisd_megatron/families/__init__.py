"""Model families: one file each, listed here."""

from __future__ import annotations

import sys
from collections.abc import Mapping as AbstractMapping
from pathlib import Path
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
from unisd_megatron.families.reading import section

FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen2(), Llama(), Gemma3(), InternLM3(), Qwen3(), Qwen3Moe())}


def family_named(name: str) -> Family:
    """The family that `--family` names; `ConfigError` names the supported ones."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown --family {name!r}; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: AbstractMapping[str, Any]) -> Family:
    """The family of a `config.json`; `ConfigError` names the supported ones and what can be done with another."""
    model_type = config.get("model_type")
    by_type = {family.model_type: family for family in FAMILIES.values()}
    if isinstance(model_type, str) and model_type in by_type:
        return by_type[model_type]
    inner = section(config, "text_config").get("model_type")
    if isinstance(inner, str) and inner in by_type:
        raise ConfigError(
            f"config.json: model_type {model_type!r} reads images too; only its language model, {inner}, is supported: "
            "save that as a folder of its own (docs/families.md says how) and use it"
        )
    message = f"config.json: model_type {model_type!r} is not supported; use one of {', '.join(by_type)}"
    if _is_installed("megatron", "bridge"):
        message += (
            "; to train it with Megatron itself, Megatron-Bridge, which is installed, may convert it: AutoBridge.import_ckpt"
        )
    raise ConfigError(message)


def _is_installed(*parts: str) -> bool:
    """Whether a package is there, without importing any part of it."""
    return any(Path(folder, *parts).is_dir() for folder in sys.path)


__all__ = ["FAMILIES", "Arch", "Family", "Mapping", "family_named", "family_of"]
