"""A report from the folders that were named to the folder of pages: complete, or not there."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unisd_megatron.errors import ConfigError
from unisd_megatron.report import drawing, pages
from unisd_megatron.report.reading import Answers, RunRecord, Sweep, answers_of, read_evaluation, read_run, read_sweep, slug

INDEX = "index.html"
PAGES_A_WORKER = 4
"""At least; for fewer, a process of its own takes longer to start than it saves."""


@dataclass(frozen=True)
class _Page:
    """A run with the answers it is shown by."""

    record: RunRecord
    file: str
    pair: tuple[Answers, Answers] | None = None


def report(sources: Sequence[Path], output: Path, evaluated: tuple[Path, Path] | None = None) -> list[str]:
    """Writes `output`/index.html, a page for each run and PNG files; what is said of it, one line each.

    A single run is the index itself. Otherwise the index is the overview: of a sweep, or of the runs.
    Args: sources: runs, or one sweep; evaluated: finished evaluations of a single run's checkpoint before and after.
    Raises `ConfigError` for folders that are neither, and for an output folder that holds something else.
    """
    target = output.resolve()
    _check_output(target)
    sweeps = [source for source in sources if (source / "sweep.json").is_file()]
    if sweeps and len(sources) > 1:
        raise ConfigError(f"{sweeps[0]} is a sweep; report it alone")
    if evaluated is not None and (sweeps or len(sources) > 1):
        raise ConfigError("--before and --after are evaluations of a single run; name one run")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a report that was killed
    if sweeps:
        said = _sweep(read_sweep(sweeps[0]), partial)
    else:
        records = [read_run(source) for source in sources]
        pair = _pair(*evaluated) if evaluated is not None else None
        said = _one(records[0], pair, partial) if len(records) == 1 else _several(records, partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return [*said, f"{output / INDEX}"]


def _check_output(output: Path) -> None:
    """An earlier report may be replaced, nothing else."""
    if not output.exists():
        return
    index = output / INDEX
    ours = index.is_file() and f'content="{pages.GENERATOR}"' in index.read_text(encoding="utf-8", errors="replace")[:2000]
    if not output.is_dir() or (any(output.iterdir()) and not ours):
        raise ConfigError(f"{output}: exists already and is no report; choose another --output_dir")


def _pair(before: Path, after: Path) -> tuple[Answers, Answers]:
    pair = (answers_of("before", read_evaluation(before)[1]), answers_of("after", read_evaluation(after)[1]))
    first, second = (one.rows.keys() for one in pair)
    if first != second:
        common = len(first & second)
        raise ConfigError(
            f"--before {before} has {len(first)} questions and --after {after} has {len(second)}, {common} in common; "
            "name two evaluations of the same questions"
        )
    return pair


def _one(record: RunRecord, pair: tuple[Answers, Answers] | None, folder: Path) -> list[str]:
    text, drawn = pages.of_run(record, pair, "", None)
    _write(folder, INDEX, text, drawn, folder)
    return _problems(record)


def _several(records: Sequence[RunRecord], folder: Path) -> list[str]:
    titles = _apart([record.name for record in records])
    told = [_renamed(record, title) for record, title in zip(records, titles, strict=True)]
    found = [_Page(record, f"{name}.html") for record, name in zip(told, _files(titles), strict=True)]
    _write_runs(found, folder)
    _write(folder, INDEX, pages.of_several(told, [page.file for page in found]), [], folder)
    return [line for record in told for line in _problems(record)]


def _sweep(sweep: Sweep, folder: Path) -> list[str]:
    cells = [cell for cell in sweep.cells if cell.record is not None]
    found: dict[str, _Page] = {}
    for cell, name in zip(cells, _files([cell.title for cell in cells]), strict=True):
        assert cell.record is not None
        own = cell.row["dataset"]
        before, after = sweep.before_run(cell, own), cell.results.get(own)
        pair = None
        if before is not None and after is not None:
            pair = answers_of("before training", before.rows), answers_of("after training", after[1])
        found[cell.row["train"]] = _Page(cell.record, f"{name}.html", pair)
    _write_runs(list(found.values()), folder)
    text, drawn = pages.of_sweep(sweep, {train: page.file for train, page in found.items()})
    _write(folder, INDEX, text, drawn, folder)
    missing = [f"{cell.title}: no result on {name} ({why})" for cell in sweep.cells for name, why in cell.missing.items()]
    return [*missing, *(line for page in found.values() for line in _problems(page.record))]


def _write_runs(found: Sequence[_Page], folder: Path) -> None:
    """On as many cores as there are: nearly all of a report's time is drawing."""
    workers = min(len(os.sched_getaffinity(0)), len(found) // PAGES_A_WORKER)
    write = functools.partial(_write_run, folder=folder)
    if workers < 2:
        list(map(write, found))
        return
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignored) as pool:
        list(pool.map(write, found))


def _write_run(page: _Page, folder: Path) -> None:
    name = page.file.removesuffix(".html")
    text, drawn = pages.of_run(page.record, page.pair, f"{name}/", INDEX)
    _write(folder, page.file, text, drawn, folder / name)


def _write(folder: Path, file: str, text: str, drawn: Sequence[drawing.Picture], pictures: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawing.write(drawn, pictures)
    (folder / file).write_text(text, encoding="utf-8")


def _problems(record: RunRecord) -> list[str]:
    return [f"{record.name}: {problem}" for problem in record.problems]


def _renamed(record: RunRecord, name: str) -> RunRecord:
    return record if record.name == name else RunRecord(**{**record.__dict__, "name": name})


def _apart(names: Sequence[str], numbered: str = "{} ({})") -> list[str]:
    """The names, those that occur again with a number."""
    found: list[str] = []
    for name in names:
        others = (numbered.format(name, number) for number in itertools.count(2))
        found.append(next(one for one in itertools.chain([name], others) if one not in found))
    return found


def _files(titles: Sequence[str]) -> list[str]:
    """A file name for each, all different, and none the index's."""
    return _apart([f"run-{slug(title)}" for title in titles], "{}-{}")
