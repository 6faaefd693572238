"""Questions as vectors, kept by content, and the most similar ones of each. The door to sentence-transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unisd_megatron.convert import fingerprint
from unisd_megatron.errors import CheckFailed, CheckpointError, ConfigError, MissingDependency
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.prepare.cache import FORMAT, cache_file, identity, partial_of
from unisd_megatron.prepare.generate import Progress
from unisd_megatron.prepare.order import Order, missing
from unisd_megatron.weights.hf import resolve_folder

KIND = "embeddings"
PART = 1024  # texts between two saves
BATCH = 256  # texts embedded together
QUERIES = 512  # whose similarities to all others are held together


def read(order: Order) -> Tensor:
    """Unit vectors `[N, D]` of the questions, fp32; `ConfigError` with the command that prepares them if they are not."""
    path, header, _ = _identity(order)
    vectors = _stored(path, header)
    if vectors is None:
        raise missing(order, "embeddings", path)
    return vectors


def prepare(order: Order) -> str:
    """Writes the cache, or what is left of it to be written. One process.

    Raises `MissingDependency` without sentence-transformers, `CheckpointError` for a model that cannot be read.
    """
    if start.world_size_from_environment() > 1:
        raise ConfigError("prepare embeddings is for one process; start it without torchrun")
    path, header, texts = _identity(order)
    vectors = _stored(path, header)
    if vectors is None:
        parts, partial = _parts(order, partial_of(path), header, texts), partial_of(path)
        vectors = torch.cat([load_file(part)["embeddings"] for part in parts])
        _write_json(path.with_suffix(".json"), dict(header))
        (partial / "all").write_bytes(save({"embeddings": vectors}))  # save_file makes a file that only its owner may read
        os.replace(partial / "all", path)
        shutil.rmtree(partial)
    return f"{path}: {len(vectors)} embeddings of width {vectors.shape[1]}"


def nearest(vectors: Tensor, count: int) -> list[list[int]]:
    """For each row the positions of the `count` rows of largest cosine, itself among them; of equal ones the earlier first.

    Args: vectors: unit rows `[N, D]`.
    """
    found: list[list[int]] = []
    for queries in vectors.split(QUERIES):
        similarity = (queries @ vectors.T).double()
        # One text in two places has one vector, but products may differ in their last bits with the place in memory.
        similarity = (similarity * 1e6).round() - torch.arange(len(vectors), dtype=torch.float64) / (2 * len(vectors))
        found += similarity.topk(min(count, len(vectors)), dim=1).indices.tolist()
    return found


def _identity(order: Order) -> tuple[Path, dict[str, Any], list[str]]:
    """Where the vectors lie, the header beside them, and the texts they are of."""
    texts = [order.task.topic(record) for record in order.pool]
    model, cache_dir = order.caches.retrieval_model, order.caches.cache_dir
    header = {
        "kind": KIND,
        "format": FORMAT,
        "task": order.task.name,
        "rows": len(texts),
        "texts": fingerprint.of_texts(texts),
        "model": Path(model).name,
        "weights": fingerprint.of_checkpoint(_folder(model), cache_dir=Path(cache_dir)),
    }
    return cache_file(cache_dir, KIND, header, ".safetensors"), header, texts


def _folder(model: str) -> Path:
    try:
        return resolve_folder(model)
    except CheckpointError as error:
        raise CheckpointError(f"--retrieval_model {error}; give a folder that holds it") from error


def _stored(path: Path, header: dict[str, Any]) -> Tensor | None:
    """The vectors, or None where they are not complete. `CheckFailed` where the files are not what their name says."""
    if not path.is_file():
        return None
    try:
        known = identity(json.loads(path.with_suffix(".json").read_text()))
        vectors = load_file(path)["embeddings"]
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckFailed(f"{path}: damaged ({error}); remove it and prepare it again") from error
    if known != identity(header) or len(vectors) != header["rows"]:
        raise CheckFailed(f"{path}: damaged, it is not the cache that its name says; remove it and prepare it again")
    return vectors


def _parts(order: Order, folder: Path, header: dict[str, Any], texts: Sequence[str]) -> list[Path]:
    """The vectors in files of `PART` texts each; those that an earlier attempt has written are kept."""
    paths = [folder / f"{first:09}.safetensors" for first in range(0, len(texts), PART)]
    todo = [(number, path) for number, path in enumerate(paths) if not path.is_file()]
    if not todo:
        return paths
    model = _load(order.caches.retrieval_model)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(KIND, len(texts), min(len(texts), PART * (len(paths) - len(todo))), speaks=True)
    for number, path in todo:
        part = list(texts[number * PART : (number + 1) * PART])
        vectors = model.encode(
            part, batch_size=BATCH, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        path.with_suffix(".writing").write_bytes(save({"embeddings": vectors.float().cpu().contiguous()}))
        os.replace(path.with_suffix(".writing"), path)
        progress.advance(len(part))
    progress.close()
    return paths


def _load(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingDependency(
            "retrieval needs the `sentence-transformers` library; pip install sentence-transformers"
        ) from error
    device = platforms.choose().device
    try:
        return SentenceTransformer(str(_folder(name)), device=str(device), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"--retrieval_model {name}: not a model of sentence-transformers ({error})") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = partial_of(path)
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)
