"""The safetensors format: headers checked whole, tensors read into memory of their own, files written tensor by tensor.

A file is 8 bytes (the header's length), a JSON header (name -> dtype, shape, bytes from and to), and the tensors' bytes. The
library reads through a map of the whole file, whose pages stay resident, and writes what it holds in memory all at once; a
conversion may do neither.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unisd_megatron.errors import CheckFailed, CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

HEADER_BYTES = 128 << 10
"""What a written file reserves for its header (about a thousand tensors); the format allows spaces behind it."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of `file`, unless that is a pickle; dtype as a header spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    pickled: bool = False


def read_header(file: Path) -> dict[str, Entry]:
    """What a safetensors file holds, by tensor name.

    Raises `CheckpointError` for a file that is no safetensors, is cut short or too long, or names a tensor twice.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file}: not a complete safetensors file (cut short in its header, {size} bytes)")
            content = json.loads(stream.read(length), object_pairs_hook=lambda pairs: _unique(pairs, file))
        content.pop("__metadata__", None)
        entries = {name: _entry(file, name, one, 8 + length) for name, one in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a safetensors file ({str(error)[:100]})") from error
    _check_ranges(entries, 8 + length, size, file)
    return entries


def _entry(file: Path, name: str, stated: Any, begin: int) -> Entry:
    start, stop = stated["data_offsets"]
    numbers = (*stated["shape"], start, stop)
    if type(stated["dtype"]) is not str or any(type(one) is not int or one < 0 for one in numbers):
        raise CheckpointError(f"{file}: tensor {name} has a header that is none (dtype, shape or data_offsets)")
    return Entry(file, stated["dtype"], tuple(stated["shape"]), begin + start, begin + stop)


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{file}: tensor {double} is there twice")
    return out


def _check_ranges(entries: dict[str, Entry], start: int, size: int, file: Path) -> None:
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start or entry.stop < start:
            raise CheckpointError(f"{file}: tensor {name} does not begin where the one before it ends")
        if entry.stop > size:
            where = f"cut short in tensor {name}, {size} bytes of at least {entry.stop}"
            raise CheckpointError(f"{file}: not a complete safetensors file ({where})")
        if entry.dtype in DTYPES and entry.stop - entry.start != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            raise CheckpointError(f"{file}: tensor {name} has {entry.stop - entry.start} bytes, which is not {entry.shape}")
        start = entry.stop
    if start != size:
        raise CheckpointError(f"{file}: {size - start} bytes behind the last tensor that its header names")


def read_tensor(entry: Entry) -> Tensor:
    """The tensor of a header's entry, on the CPU, in memory of its own. Raises `CheckpointError` if it cannot be read."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    view = memoryview(_as_bytes(tensor))
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            done = 0
            while done < len(view):
                count = stream.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise CheckpointError(f"{entry.file}: cut short while it was read")
                done += count
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read ({error.strerror})") from error
    return tensor


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_files(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Writes named tensors into safetensors files of at most `shard_bytes` (or one tensor), with an index if there are several.

    One tensor at a time is in memory; dtype: cast to it, None: as it comes. Raises `CheckFailed`, naming file and tensor,
    where the disk does not take it.
    """
    files: list[_File] = []
    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not files or not files[-1].has_room(name, tensor, shard_bytes):
            if files:
                files[-1].close()
            files.append(_File(folder / f"shard-{len(files)}"))
        files[-1].add(name, tensor)
        del tensor
    if not files:
        raise CheckFailed(f"{folder}: there are no tensors to write")
    files[-1].close()
    if len(files) == 1:
        os.replace(files[0].path, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(file.path, folder / final)
        weight_map |= dict.fromkeys(file.header, final)
    index = {"metadata": {"total_size": sum(file.held for file in files)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class _File:
    """One file being written; its header goes into the space kept for it when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, dict[str, Any]] = {}
        self.held = 0
        self._header_bytes = len('{"__metadata__":{"format":"pt"}}')
        self._stream: BinaryIO = path.open("wb", buffering=0)
        self._stream.seek(8 + HEADER_BYTES)

    def has_room(self, name: str, tensor: Tensor, shard_bytes: int) -> bool:
        room = HEADER_BYTES - self._header_bytes - len(json.dumps({name: self._entry(tensor)}))
        return self.held + tensor.nbytes <= shard_bytes and room > 0

    def add(self, name: str, tensor: Tensor) -> None:
        entry = self._entry(tensor)
        with self._explained(f"at tensor {name}"):
            self._write(memoryview(_as_bytes(tensor)))
        self.header[name] = entry
        self.held += tensor.nbytes
        self._header_bytes += len(json.dumps({name: entry}))

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.header}, separators=(",", ":")).encode()
        with self._explained("in its header"):
            self._stream.seek(0)
            self._write(memoryview(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES)))
            os.fsync(self._stream.fileno())
            self._stream.close()

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[self._stream.write(content[: 1 << 30]) :]

    @contextlib.contextmanager
    def _explained(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stream.close()
            raise CheckFailed(f"{self.path}: could not be written {where} ({error.strerror})") from error

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        offsets = [self.held, self.held + tensor.nbytes]
        return {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
