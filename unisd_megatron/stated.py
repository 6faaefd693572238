"""Files in which a user states something, YAML or JSON, and the names in them. A name that stands there twice is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unisd_megatron.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML, but a key that stands twice in a mapping is a `ConfigError`; plain YAML keeps the last and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        lines: dict[str, int] = {}
        for key in keys:  # merge keys (<<) are not expanded yet: what they bring may be stated again
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(f"line {line}: {key.value!r} stands in line {lines[key.value]} already; keep one")
            lines[key.value] = line
        return node


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The same for an object of JSON."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{name!r} stands there twice; keep one")
        found[name] = value
    return found


def load(path: str, stated: str) -> Any:
    """What a file holds. Args: stated: how an error names it. Raises `ConfigError` with the place of what is wrong."""
    if not Path(path).is_file():
        raise ConfigError(f"{stated}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_once) if path.endswith(".json") else yaml.load(text, _Loader)
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:  # what is wrong in JSON or UTF-8 is a ValueError
        raise ConfigError(f"{stated}: {error}") from error


def underscored(content: Mapping[Any, Any], stated: str) -> dict[str, Any]:
    """The values by names in one spelling. Raises `ConfigError` for a name that stands there in both."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise ConfigError(f"{stated}: {name} stands there twice, with - and with _; keep one")
        found[name] = value
    return found
