"""A setting: a dataclass field that is also a flag, a line of a file and an entry of `run.json`. No torch here."""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from unisd_megatron.errors import ConfigError


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with its help text; `unit`, `short` and `advanced` may be given as metadata."""
    return field(default=default, metadata={"help": help, **extra})


@functools.cache  # a start asks for over a thousand, and hints are parsed from text
def setting_type(cls: type, name: str) -> tuple[type, tuple[str, ...] | None, bool]:
    """`(python type, choices or None, whether None is allowed)` of a field."""
    hint = typing.get_type_hints(cls)[name]
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    optional = type(None) in arms
    (arm,) = [a for a in arms if a is not type(None)]
    if typing.get_origin(arm) is Literal:
        return str, typing.get_args(arm), optional
    return arm, None, optional


def checked(cls: type, name: str, value: Any, stated: str) -> Any:
    """A value of the field's type, a path as text. Args: stated: how an error names it. Raises `ConfigError` for another."""
    kind, choices, optional = setting_type(cls, name)
    kind = str if kind is Path else kind
    if value is None:
        if optional:
            return None
        raise ConfigError(f"{stated} must not be empty")
    if choices is not None:
        if value not in choices:
            raise ConfigError(f"{stated} is {value!r}; use one of {', '.join(choices)}")
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):  # YAML 1.1 reads 2e-5 as a string
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{stated} is {value}; expected a finite number")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{stated} is {value!r}; expected {kind.__name__}")
    return value
