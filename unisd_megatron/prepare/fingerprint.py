"""Digests of what shapes a cache: a checkpoint's configuration, tokenizer and weights, and the records of a task.

Weights are sampled: sizes, headers, and blocks spread over each file. An optimizer step changes every tensor and so is seen;
one value of a 70B model changed by hand may not be. Reading a few MB per file, it costs next to nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from unisd_megatron.data import Record
from unisd_megatron.errors import CheckpointError

BLOCK = 1 << 16  # bytes
BLOCKS = 16  # of each file of weights
_WEIGHTS = (".safetensors", ".bin", ".distcp")
_TEXTS = (".json", ".jinja", ".txt", ".model")
_NOT_THE_MODEL = ("README", "trainer_state.json", "training_args", "state.json", "data_config.json")


def of_folder(*folders: Path) -> str:
    """Of checkpoints' files, wherever the folders lie: what computes the outputs, not what was written about them.

    Raises `CheckpointError` for a folder without such files.
    """
    total = hashlib.sha256()
    files = [(path.relative_to(folder), path) for folder in dict.fromkeys(folders) for path in sorted(folder.rglob("*"))]
    shaping = [(name, path) for name, path in files if path.is_file() and _shapes(path)]
    if not shaping:
        raise CheckpointError(f"{folders[0]}: no configuration and no weights")
    for name, path in shaping:
        total.update(f"{name}\n{path.stat().st_size}\n".encode())
        if path.suffix in _TEXTS:
            total.update(path.read_bytes())
        else:
            _sample(path, total)
    return total.hexdigest()[:16]


def _shapes(path: Path) -> bool:
    return path.suffix in (*_WEIGHTS, *_TEXTS) and not path.name.startswith(_NOT_THE_MODEL)


def _sample(path: Path, total: hashlib._Hash) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if path.suffix == ".safetensors":
            total.update(stream.read(int.from_bytes(stream.read(8), "little")))
        for number in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            total.update(stream.read(BLOCK))


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
