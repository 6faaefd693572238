"""A grid as it is stated -> the runs in it. A YAML file, or a named experiment of `named.py`.

name: clip                       # of the sweep
settings: {dataset: addition}    # the same in all runs; names are those of `unisd train`
cross: {alpha: [0.0, 0.5]}       # every combination of these with every entry
entries: [{mode: vanilla}, {mode: clip, token_clip: 1.0}]
seeds: [0, 1, 2]
evaluate: {addition: {max_completion_length: 40}}    # by data set, flags of `unisd evaluate`
processes: 1                     # ranks of each training
not_run: [{mode: ema, why: ...}] # stands in the table
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.config import Run
from unisd_megatron.data import TASKS
from unisd_megatron.errors import ConfigError
from unisd_megatron.evaluate.settings import Settings
from unisd_megatron.resolve import resolve
from unisd_megatron.validation import validate

OURS = frozenset({"output_dir", "resume_from_checkpoint", "seed", "export_hf"})
"""Settings of `train` that a sweep decides by itself."""
EVALUATE_FLAGS = frozenset(f.name for f in dataclasses.fields(Settings)) - {"model_name", "output_dir", "compare", "vllm"} | {
    "data_path",
    "split",
    "max_examples",
}


@dataclass(frozen=True)
class Cell:
    """A training run but for its seed: what is stated, and what that resolves to (with the first seed)."""

    stated: Mapping[str, Any]
    run: Run


@dataclass(frozen=True)
class Grid:
    """A grid as stated, checked as far as that goes without resolving its runs."""

    name: str
    entries: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    cross: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (42,)
    evaluate: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    processes: int | None = None
    not_run: Sequence[Mapping[str, str]] = ()
    where: str = "the grid"

    def cells(self) -> list[Cell]:
        """The runs, entry by entry. Raises `ConfigError` for one that cannot be."""
        return [self._cell(number, values) for number, values in self._combinations()]

    def ranks(self, run: Run) -> int:
        """Processes of a training: what the grid says, else one replica."""
        return self.processes or run.layout.model_parallel_size

    def evaluations(self, run: Run) -> dict[str, dict[str, Any]]:
        """Flags of `unisd evaluate` by data set; without any, the run's own task."""
        if self.evaluate:
            return {dataset: dict(flags) for dataset, flags in self.evaluate.items()}
        flags: dict[str, Any] = {"max_completion_length": run.rollout.max_completion_length}
        flags |= {"semantics": "released"} if run.objective.semantics == "released" else {}
        flags |= {"data_path": run.schedule.eval_data_path} if run.schedule.eval_data_path else {}
        assert run.data.dataset is not None
        return {run.data.dataset: flags}

    def _combinations(self) -> Iterator[tuple[int, dict[str, Any]]]:
        names = list(self.cross)
        for number, entry in enumerate(self.entries, start=1):
            twice = sorted(set(entry) & set(names))
            if twice:
                raise ConfigError(f"{self.where}: entry {number} states {twice[0]}, which `cross` varies; give it in one place")
            for values in itertools.product(*self.cross.values()):
                yield number, {**self.settings, **dict(zip(names, values, strict=True)), **entry}

    def _cell(self, number: int, values: dict[str, Any]) -> Cell:
        where = f"{self.where}, entry {number}"
        taken = sorted(OURS & values.keys())
        if taken:
            hint = ", and give `seeds`" if "seed" in taken else ""
            raise ConfigError(f"{where}: {taken[0]} is decided by the sweep; leave it out{hint}")
        if values.get("dataset") not in TASKS:
            raise ConfigError(f"{where}: unknown dataset {values.get('dataset')!r}; use one of {', '.join(TASKS)}")
        try:
            run = resolve({}, values | {"output_dir": "run", "seed": self.seeds[0]}, where)
            validate(run, self.ranks(run))
        except ConfigError as error:
            raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        return Cell(values, run)


def read(path: str) -> Grid:
    """The grid of a YAML file. Raises `ConfigError` with the place of what is wrong."""
    import yaml

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return from_content(content, path)


def from_content(content: Any, where: str) -> Grid:
    """The grid of what a file holds."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a mapping with `entries` or `settings`")
    known = {f.name for f in dataclasses.fields(Grid)} - {"where"}
    unknown = sorted(map(str, content.keys() - known))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; use {', '.join(sorted(known))}")
    settings = _mapping(content.get("settings", {}), f"{where}: settings")
    cross = _mapping(content.get("cross", {}), f"{where}: cross")
    entries = content.get("entries", [{}])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: entries is {entries!r}; expected a list of settings")
    for name, values in cross.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: cross: {name} is {values!r}; expected a list of values")
    evaluate = _mapping(content.get("evaluate", {}), f"{where}: evaluate")
    return Grid(
        name=str(content.get("name", Path(where).stem)),
        entries=[_mapping(entry, f"{where}, entry {number}") for number, entry in enumerate(entries, start=1)],
        settings=settings,
        cross=cross,
        seeds=_seeds(content.get("seeds", [42]), where),
        evaluate={str(dataset): _flags(dataset, flags, where) for dataset, flags in evaluate.items()},
        processes=_processes(content.get("processes"), where),
        not_run=_not_run(content.get("not_run", []), where),
        where=where,
    )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {value!r}; expected `name: value`")
    return {str(name).replace("-", "_"): one for name, one in value.items()}


def _seeds(value: Any, where: str) -> list[int]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: seeds is {value!r}; expected different whole numbers, such as [0, 1, 2]")
    return seeds


def _processes(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{where}: processes is {value!r}; expected the ranks of each training")
    return value


def _flags(dataset: Any, value: Any, where: str) -> dict[str, Any]:
    if dataset not in TASKS:
        raise ConfigError(f"{where}: evaluate: unknown data set {dataset!r}; use one of {', '.join(TASKS)}")
    flags = _mapping(value or {}, f"{where}: evaluate: {dataset}")
    unknown = sorted(flags.keys() - EVALUATE_FLAGS)
    if unknown:
        raise ConfigError(f"{where}: evaluate: {dataset}: unknown flag {unknown[0]!r}; use {', '.join(sorted(EVALUATE_FLAGS))}")
    own = {name: one for name, one in flags.items() if name not in ("data_path", "split", "max_examples")}
    Settings(model_name="", **own).check()
    return flags


def _not_run(value: Any, where: str) -> list[dict[str, str]]:
    rows = [_mapping(row, f"{where}: not_run") for row in value] if isinstance(value, list) else [{}]
    if any(row.keys() != {"mode", "why"} for row in rows):
        raise ConfigError(f"{where}: not_run is {value!r}; expected a list of `mode` and `why`")
    return rows
