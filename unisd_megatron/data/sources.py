"""Rows of a data set: from a JSON, JSONL or parquet file (the first two also gzipped), or from the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from unisd_megatron.errors import DataError, MissingDependency


def read_rows(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Yields `(where, index, row)` for each record of a `.json`, `.jsonl` file, its `.gz`, or a `.parquet` file.

    `where` names the line or the row. Raises `DataError` for what cannot be read, `MissingDependency` for parquet without its
    library.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in _READERS:
        raise DataError(f"{path}: unknown kind of data file; use .json, .jsonl, either with .gz, or .parquet")
    try:
        with cast(TextIO, opener(path, "rt", encoding="utf-8")) as stream:
            for index, (where, row) in enumerate(_READERS[kind](path, stream)):
                if not isinstance(row, Mapping):
                    raise DataError(f"{where}: expected an object, got {type(row).__name__}")
                yield where, index, row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:  # cut short, not gzip, not UTF-8, not ours to read
        raise DataError(f"{path}: cannot be read as {'gzipped ' * (path.suffix == '.gz')}UTF-8 text: {error}") from error


def hub_rows(hub_id: str, config: str | None, split: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """The same for a split of a data set on the hub, through the `datasets` library.

    Raises `MissingDependency` without it, `DataError` for a data set, configuration or split that cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            f"loading {hub_id} needs the `datasets` library; pip install datasets, or pass --data_path FILE"
        ) from error
    try:
        table = datasets.load_dataset(hub_id, config, split=split).with_format("arrow")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # No network, no such data set or no access to it; no such configuration or split; a loading script; files broken.
        reason = " ".join(str(error).split())
        raise DataError(f"{hub_id} cannot be loaded from the hub ({reason}); pass --data_path FILE") from error
    # As stored: decoding would need an image library for columns that no task looks into.
    rows = (row for batch in table.iter(batch_size=1000) for row in batch.to_pylist())
    for index, row in enumerate(rows):
        yield f"{hub_id}, {split} row {index}", index, row


def _parquet(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(f"{path}: parquet files need the `pyarrow` library; pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for index, row in enumerate(rows):
                yield f"{path}, row {index}", index, row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error


def _json_records(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply for a data file") from error
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        yield from ((f"{path}, record {key!r}", {"id": key, **row}) for key, row in rows.items())
        return
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of records, or an object of them by id, got {type(rows).__name__}")
    yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error


_READERS = {".json": _json_records, ".jsonl": _json_lines}
