"""A setting: a dataclass field that is also a flag, a line of a file and an entry of `run.json`. No torch here."""

from __future__ import annotations

import types
import typing
from dataclasses import field
from typing import Any, Literal


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with its help text; `unit`, `short` and `advanced` may be given as metadata."""
    return field(default=default, metadata={"help": help, **extra})


def setting_type(cls: type, name: str) -> tuple[type, tuple[str, ...] | None, bool]:
    """`(python type, choices or None, whether None is allowed)` of a field."""
    hint = typing.get_type_hints(cls)[name]
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    optional = type(None) in arms
    (arm,) = [a for a in arms if a is not type(None)]
    if typing.get_origin(arm) is Literal:
        return str, typing.get_args(arm), optional
    return arm, None, optional
