"""The only things that pass between a program and its tests: plain values, and numbers that stand for anything else.

A message is its length in four bytes, then JSON. In it, a JSON list is `[kind, ...]`; all else stands for itself.
Whatever class a value has in the program, on the other side it is a plain one: what an object says about itself (that it
equals everything, say) does not travel with it.
"""

from __future__ import annotations

import array
import builtins
import collections
import datetime
import decimal
import fractions
import json
import os
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

_HEADER = struct.Struct("=I")
_VIEWS: Mapping[str, type] = {"keys": type({}.keys()), "items": type({}.items())}
_SEQUENCES: Mapping[str, tuple[type, Callable[[list[Any]], Any]]] = {
    "list": (list, list),
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
    "deque": (collections.deque, collections.deque),
    "keys": (_VIEWS["keys"], lambda items: dict.fromkeys(items).keys()),
    "items": (_VIEWS["items"], lambda items: dict(items).items()),
}
_TEXTS: Mapping[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "int": (int, hex, lambda text: int(text, 16)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
}


class TooLong(Exception):
    """A message longer than the reader takes."""


def message(content: object) -> bytes:
    """The content, ready to be written."""
    data = json.dumps(content).encode()
    return _HEADER.pack(len(data)) + data


def send(fd: int, content: object) -> None:
    """Raises `OSError` when the other side is gone."""
    write(fd, message(content))


def write(fd: int, data: bytes) -> None:
    """All of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int, at_most: int = 1 << 28) -> Any:
    """The next message. Raises `EOFError` at the end, `TooLong`, and `ValueError` for what is no message."""
    (length,) = _HEADER.unpack(_exactly(fd, _HEADER.size))
    if length > at_most:
        raise TooLong(f"a value of {length} bytes; at most {at_most} are read")
    return json.loads(_exactly(fd, length))


def _exactly(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def pack(value: Any, refer: Callable[[Any], list[Any]]) -> Any:
    """The value as JSON; `refer` gives the stand-in of what is not plain. `RecursionError` for a value that contains itself."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 64:  # a longer one goes as hexadecimal text: decimal digits are limited
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return ["dict", *([pack(key, refer), pack(item, refer)] for key, item in dict.items(value))]
    for kind, (cls, _) in _SEQUENCES.items():
        if isinstance(value, cls):
            return [kind, *(pack(item, refer) for item in cast(Iterable[Any], value))]
    for kind, (cls, write, _) in _TEXTS.items():
        if isinstance(value, cls):
            return [kind, write(value)]
    return _pack_rare(value, refer)


def _pack_rare(value: Any, refer: Callable[[Any], list[Any]]) -> list[Any]:
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, array.array):
        return ["array", value.typecode, list(value)]
    if isinstance(value, datetime.timedelta):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, types.ModuleType):
        return ["module", value.__name__]
    if isinstance(value, type):
        name = type.__dict__["__name__"].__get__(value)  # whatever its class says
        if vars(builtins).get(name) is value:
            return ["type", name]
    return refer(value)


def unpack(data: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """The value that `pack` made `data` of; `resolve` gives the meaning of stand-ins. `ValueError` for what is none."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("not a value")
        return data
    kind, *rest = data
    if kind == "dict":
        return {unpack(key, resolve): unpack(item, resolve) for key, item in rest}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind][1]([unpack(item, resolve) for item in rest])
    if kind in _TEXTS:
        return _TEXTS[kind][2](rest[0])
    match kind:
        case "complex":
            return complex(*rest)
        case "range":
            return range(*rest)
        case "array":
            return array.array(*rest)
        case "timedelta":
            return datetime.timedelta(*rest)
        case "type":
            found = getattr(builtins, rest[0])
            if not isinstance(found, type):
                raise ValueError("not a type")
            return found
    return resolve(data)
