"""Digests of what shapes a cache or an evaluation: a checkpoint's own files, all of each, and the records of a task.

Reading every byte of a 70B takes minutes, so the digest of a file of weights can be remembered: in a file beside the caches,
under its path, size, modification time (ns) and inode.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unisd_megatron.data import Record
from unisd_megatron.errors import CheckpointError

MEMORY = "weights.json"
"""In the cache folder: the digests of files of weights."""
SAMPLES, BLOCK = 32, 4096  # of each file of weights, and bytes of each

_TEXTS = (".json", ".jinja", ".txt", ".model")
_NOT_THE_MODEL = ("README", "trainer_state.json", "training_args", "state.json", "data_config.json")
_TEMPLATES, _MODULES = "additional_chat_templates", "modules.json"


def of_checkpoint(folder: Path, shards: Path | None = None, *, cache_dir: Path | None = None) -> str:
    """Of a checkpoint's contents: what computes the outputs, not where it lies, how it is called or what else lies there.

    Args: shards: of a Megatron checkpoint; cache_dir: where digests of weights are remembered, if that folder is there.
    Raises `CheckpointError` for a folder without configuration and weights.
    """
    return _of_files(folder, shards, _of_file if cache_dir is None else lambda path: _remembered(path, cache_dir / MEMORY))


def of_samples(folder: Path, shards: Path | None = None) -> str:
    """The same in seconds for any size: of a file of weights, its size and `SAMPLES` x `BLOCK` of its bytes.

    Training moves nearly every weight, so another model of the same shapes is another digest; one that was edited in a few
    numbers may not be. Raises `CheckpointError` for a folder without configuration and weights.
    """
    return _of_files(folder, shards, _of_samples)


def _of_files(folder: Path, shards: Path | None, of_weights: Callable[[Path], str]) -> str:
    files = {str(path.relative_to(folder)): path for path in _own_files(folder)}
    if shards is not None:
        files |= {f"shards/{path.name}": path for path in shards.iterdir() if path.is_file()}
    if not files:
        raise CheckpointError(f"{folder}: no configuration and no weights")
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        found = _of_file(path) if path.suffix in _TEXTS else of_weights(path)
        total.update(f"{name} {found}\n".encode())
    return total.hexdigest()[:16]


def _own_files(folder: Path) -> list[Path]:
    """Of the folder itself and of those below it that belong to the model; not of results or caches that lie there too."""
    places = [folder, folder / _TEMPLATES]
    if (folder / _MODULES).is_file():  # a model of sentence-transformers: a folder for each of its modules
        try:
            places += [folder / module["path"] for module in json.loads((folder / _MODULES).read_text()) if module["path"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / _MODULES}: not a list of modules ({error})") from error
    return [path for place in places if place.is_dir() for path in _files_of_model(place)]


def _files_of_model(place: Path) -> list[Path]:
    files = [path for path in place.iterdir() if path.is_file() and not path.name.startswith(_NOT_THE_MODEL)]
    weights = [path for path in files if path.suffix == ".safetensors"] or [path for path in files if path.suffix == ".bin"]
    return [path for path in files if path.suffix in _TEXTS] + weights


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_samples(path: Path) -> str:
    """Of blocks from the first byte to the last, evenly spaced; of all of a small file."""
    size = path.stat().st_size
    total = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as stream:
        if size <= SAMPLES * BLOCK:
            total.update(stream.read())
        else:
            for number in range(SAMPLES):
                stream.seek(number * (size - BLOCK) // (SAMPLES - 1))
                total.update(stream.read(BLOCK))
    return total.hexdigest()


def _remembered(path: Path, memory: Path) -> str:
    """The digest, from memory where it is known. Of several processes one reads the file and the others wait."""
    state, name = path.stat(), str(path.resolve())
    seen = [state.st_size, state.st_mtime_ns, state.st_ino]
    try:
        with memory.open("a+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            known = _parsed(stream.read())
            if name not in known or known[name][:-1] != seen:
                known[name] = [*seen, _of_file(path)]
                stream.truncate(0)
                stream.write(json.dumps(known, indent=1) + "\n")
            return str(known[name][-1])
    except OSError:  # no such folder yet, one that is only read, or no locks there
        return _of_file(path)


def _parsed(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError:  # new, or cut by a kill
        return {}


def of_records(records: Sequence[Record]) -> str:
    """Of records, in order."""
    total = hashlib.sha256()
    for record in records:
        total.update(json.dumps([record.id, dict(record.fields)], sort_keys=True, default=str).encode() + b"\n")
    return total.hexdigest()[:16]


def of_texts(texts: Sequence[str]) -> str:
    """Of texts, in order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(json.dumps(text).encode() + b"\n")
    return total.hexdigest()[:16]
