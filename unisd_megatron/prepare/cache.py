"""Caches of what a model wrote: JSON lines under a header of all that shaped them, appended as results arrive.

The file's name is a digest of its header, so a cache that is found is the right one; what the model was called stands in the
header for people and counts for nothing, because its weights are in there too. It is written as `.partial` and renamed
when complete. A line that a kill has cut is dropped when the work is resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from unisd_megatron.errors import CheckFailed, ConfigError

Header = Mapping[str, Any]
FORMAT = 1  # of headers and lines; another one is another cache
_FOR_PEOPLE = "model"  # the entry that shapes nothing


def cache_file(cache_dir: str, kind: str, header: Header, suffix: str = ".jsonl") -> Path:
    """Where a cache of this header lies: one folder for each kind, the task in front of the digest."""
    return Path(cache_dir) / kind / f"{header['task']}-{digest(identity(header))}{suffix}"


def identity(header: Header) -> dict[str, Any]:
    """What makes a cache the one that it is."""
    return {name: value for name, value in header.items() if name != _FOR_PEOPLE}


def digest(value: Any) -> str:
    """Of any JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def partial_of(path: Path) -> Path:
    """Where a cache is while it is not complete."""
    return path.with_name(path.name + ".partial")


def read_rows(path: Path, header: Header) -> list[dict[str, Any]] | None:
    """The rows of a complete cache; None where there is none. `CheckFailed` for one that is not what its name says."""
    if not path.is_file():
        return None
    found, *rows = _whole_lines(path)[0] or [None]
    if not _same(found, header) or len(rows) != header["rows"]:
        raise CheckFailed(f"{path}: damaged, it is not the cache that its name says; remove it and prepare it again")
    return rows


class Appending:
    """A cache that is being written: a context manager, for one process at a time.

    Args: align: rows that are made together; what is left of such a group after a kill is made again, so that a resumed cache
    is made of the same groups. `done` is the number of rows that are there. Raises `ConfigError` if another process writes it.
    """

    def __init__(self, path: Path, header: Header, align: int) -> None:
        self._path, self._partial, self._rows = path, partial_of(path), header["rows"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise ConfigError(f"{self._partial}: another process is writing it; wait for that one") from error
        lines, ends = _whole_lines(self._partial)
        if not lines or not _same(lines[0], header):
            self._stream.truncate(0)
            self._write([header])
            self.done = 0
            return
        self.done = len(lines) - 1 if len(lines) - 1 >= self._rows else (len(lines) - 1) // align * align
        self._stream.truncate(ends[self.done])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, on the disk when this returns."""
        self._write(rows)
        self.done += len(rows)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # ASCII: a model may write half a surrogate pair, which no UTF-8 file can hold.
        self._stream.write("".join(json.dumps(row) + "\n" for row in rows).encode("ascii"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> Appending:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Takes its final name if all rows are there; else it stays `.partial`, to be resumed."""
        if error is None and self.done == self._rows:
            os.replace(self._partial, self._path)
        self._stream.close()


def _same(found: Any, header: Header) -> bool:
    return isinstance(found, dict) and identity(found) == identity(header)


def _whole_lines(path: Path) -> tuple[list[Any], list[int]]:
    """The lines that were written to their end, and where each ends, bytes; none after a damaged one."""
    lines: list[Any] = []
    ends: list[int] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(line))
        except ValueError:  # a block that the disk had not been given yet
            break
        ends.append(end)
    return lines, ends
