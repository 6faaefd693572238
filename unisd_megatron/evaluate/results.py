"""The folder of an evaluation: rows that are added as they are made, what made them, and the numbers at the end.

    answers.jsonl, answers.key.json       one row for each question and sample, and everything that shaped them
    retention.jsonl, reverse.jsonl, fit.jsonl, each with its .key.json     where asked for
    table.md, accuracy.png, result.json   written beside and renamed, result.json last: where it is, the rest is complete
    .lock                                 held by the one process that writes

Running the same command again adds the rows that are missing; other settings are refused. What is extended, such as by a
measure more, has no result.json while it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd_megatron.data import Record
from unisd_megatron.errors import CheckFailed, CheckpointError, ConfigError
from unisd_megatron.weights.hf import read_json

Row = dict[str, Any]
ANSWERS, RESULT, LOCK = "answers", "result.json", ".lock"


class Ledger:
    """Rows in the order in which they are asked for, on disk as soon as they are appended; without a folder in memory only.

    Opening writes nothing. Raises `CheckpointError` where the folder holds something else, or rows of other settings.
    """

    def __init__(self, folder: Path | None, name: str, key: Mapping[str, Any]) -> None:
        self.rows: list[Row] = []
        self._name, self.key = name, json.loads(json.dumps(key))
        self._folder = folder
        if folder is None:
            return
        self._file, self._key_file = folder / f"{name}.jsonl", folder / f"{name}.key.json"
        self._ends: list[int] = []  # of each row, bytes from the start of the file
        if self._key_file.is_file():
            self._check_key()
            self._read()
        elif name == ANSWERS:
            _require_own_folder(folder)

    def _check_key(self) -> None:
        there = read_json(self._key_file)
        for field in [*self.key, *there]:
            if there.get(field) != self.key.get(field):
                values = f"{field} {_short(there.get(field))} there, {_short(self.key.get(field))} here"
                raise CheckpointError(
                    f"{self._folder}: holds {self._name} of other settings ({values}); use a new --output_dir"
                )

    def _read(self) -> None:
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError as error:
                if number < len(lines):
                    raise CheckpointError(f"{self._file}, line {number}: not JSON ({error}); use a new --output_dir") from error
                row = None
            if row is None:
                break  # cut short by a kill
            self.rows.append(row)
            self._ends.append(len(line) + (self._ends[-1] if self._ends else 0))

    def keep(self, count: int) -> None:
        """Forgets the rows after the first `count`; on disk with the next `append`."""
        del self.rows[count:]
        if self._folder is not None:
            del self._ends[count:]

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows behind those that are there; on disk when this returns. `CheckFailed` where the disk does not take them."""
        self.rows += rows
        if self._folder is not None:
            try:
                self._write(self._folder, rows)
            except OSError as error:
                raise CheckFailed(f"{self._folder}: could not be written ({error.strerror})") from error

    def _write(self, folder: Path, rows: Sequence[Row]) -> None:
        (folder / RESULT).unlink(missing_ok=True)  # it is not of all rows any more
        if not self._key_file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_beside(self._key_file, json.dumps(self.key, indent=2) + "\n")
        end = self._ends[-1] if self._ends else 0
        with self._file.open("ab") as stream:
            stream.truncate(end)
            for row in rows:
                line = (json.dumps(row) + "\n").encode()
                end += stream.write(line)
                self._ends.append(end)
            stream.flush()
            os.fsync(stream.fileno())


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """The folder, made if it is new, for this process alone. Without a folder nothing.

    Raises `ConfigError` where another process writes it, `CheckpointError` where it holds something else.
    """
    if folder is None:
        yield
        return
    if not (folder / f"{ANSWERS}.key.json").is_file():
        _require_own_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder}: another process is writing it ({error.strerror}); wait for that one") from error
        yield


def _require_own_folder(folder: Path) -> None:
    """Raises `CheckpointError` unless the folder is new or empty, and can be written to."""
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already and holds no answers of `evaluate`; choose another folder")
    parent = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{folder}: cannot be created, because {parent} is not a folder that can be written to")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Finished:
    """A finished evaluation: its answers, and what shaped them."""

    rows: list[Row]
    key: dict[str, Any]


def read_finished(folder: Path) -> Finished:
    """Of a folder; `CheckpointError` where it is none, not finished, or not whole."""
    if not (folder / RESULT).is_file():
        raise CheckpointError(f"{folder}: no finished evaluation ({RESULT} is missing)")
    key = read_json(folder / f"{ANSWERS}.key.json")
    rows, wanted = Ledger(folder, ANSWERS, key).rows, read_json(folder / RESULT).get("answers")
    if len(rows) != wanted:
        raise CheckpointError(
            f"{folder}: {ANSWERS}.jsonl holds {len(rows)} answers and {RESULT} speaks of {wanted}; run that evaluation again"
        )
    return Finished(rows, key)


def write_beside(path: Path, content: str) -> None:
    """Writes a file that is complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def digest(parts: Iterable[Any]) -> str:
    """Sixteen hexadecimal digits that stand for the parts, in their order; each as JSON."""
    total = hashlib.sha256()
    for part in parts:
        total.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return total.hexdigest()[:16]


def records_digest(records: Iterable[Record]) -> str:
    """The same for what a task has loaded."""
    return digest([record.id, dict(record.fields)] for record in records)
