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

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron import stated
from unisd_megatron.config import Run
from unisd_megatron.data import TASKS
from unisd_megatron.errors import ConfigError, RequestError
from unisd_megatron.evaluate.settings import Questions, Settings
from unisd_megatron.resolve import resolve
from unisd_megatron.setting import checked
from unisd_megatron.validation import check_seed, is_hub_id, validate

_DECIDED = "is decided by the sweep; leave it out"
_SERVERS = "would be shared by trainings that each send their own weights there; leave it out: vLLM runs in each training"
OURS: Mapping[str, str] = {
    "output_dir": _DECIDED,
    "resume_from_checkpoint": _DECIDED,
    "export_hf": _DECIDED,
    "seed": f"{_DECIDED}, and give `seeds`",
    "exit_duration_in_mins": "would stop trainings, and a stopped one is no result; leave it out: a sweep resumes by itself",
    "tensorboard_dir": "would be one folder for all runs; leave it out: each has a `tensorboard` in its own",
    "vllm_server_urls": _SERVERS,
}
"""Settings of `train` that a sweep decides by itself or that its runs cannot share, and what to do instead."""
_OF_QUESTIONS = frozenset(f.name for f in dataclasses.fields(Questions))
_OF_SETTINGS = frozenset(f.name for f in dataclasses.fields(Settings))
EVALUATE_FLAGS = (_OF_SETTINGS | _OF_QUESTIONS) - {"dataset", "model_name", "output_dir", "compare", "vllm"}


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
        """The runs, entry by entry. Raises `ConfigError` for one that cannot be, or could not be evaluated."""
        for seed in self.seeds:
            with _place(self.where):
                check_seed(seed)
        numbered = [(number, self._cell(number, values)) for number, values in self._combinations()]
        seen: list[tuple[str, dict[str, Any]]] = []
        for number, cell in numbered:
            for asked in self.evaluations(cell.run).items():
                if asked not in seen:
                    seen.append(asked)
                    where = self.where if self.evaluate else f"{self.where}, entry {number}"
                    with _place(f"{where}: evaluate: {asked[0]}"):
                        _check_evaluation(*asked)
        return [cell for _, cell in numbered]

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
        taken = [name for name in OURS if name in values]
        if taken:
            raise ConfigError(f"{where}: {taken[0]} {OURS[taken[0]]}")
        _known(values.get("dataset"), where)
        with _place(where):
            run = resolve({}, values | {"output_dir": "run", "seed": self.seeds[0]}, where)
            if run.vllm.vllm_mode == "server":
                raise ConfigError(f"vllm_mode server {_SERVERS}")
            validate(run, self.ranks(run))
            TASKS[values["dataset"]]().check_split("train")
            _check_paths(run)
        return Cell(values, run)


def read(path: str) -> Grid:
    """The grid of a YAML file. Raises `ConfigError` with the place of what is wrong."""
    return from_content(stated.load(path, path), path)


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
    return stated.underscored(value, where)


def _known(dataset: Any, where: str) -> None:
    if not isinstance(dataset, str) or dataset not in TASKS:
        raise ConfigError(f"{where}: unknown dataset {dataset!r}; use one of {', '.join(TASKS)}")


@contextlib.contextmanager
def _place(where: str) -> Iterator[None]:
    """What is wrong in it is said with its place in the grid."""
    try:
        yield
    except RequestError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _check_paths(run: Run) -> None:
    """Raises `ConfigError` for files and folders that a run names and that are not there; hub ids may be."""
    models = {"model_name": run.model_name}
    models |= {"retrieval_model": run.caches.retrieval_model} if run.data.fewshot_method == "retrieval" else {}
    for name, model in models.items():
        _check_model(name, model)
    for name, file in {"data_path": run.data.data_path, "eval_data_path": run.schedule.eval_data_path}.items():
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{name}: {file}: no such file")
    if run.rollout.rollout == "replay" and not Path(run.rollout.replay_path or "").is_dir():
        raise ConfigError(f"replay_path: {run.rollout.replay_path}: no such folder")


def _check_model(name: str, model: str) -> None:
    if not Path(model).is_dir() and not is_hub_id(model):
        raise ConfigError(f"{name}: {model}: no such folder, and not a hub id (owner/name)")


def _check_evaluation(dataset: str, flags: Mapping[str, Any]) -> None:
    """Raises a `RequestError` for what `unisd evaluate` would refuse before it opens the checkpoint, the hub's data apart."""
    questions = Questions(dataset, **{name: value for name, value in flags.items() if name in _OF_QUESTIONS})
    settings = Settings(model_name="", **{name: value for name, value in flags.items() if name in _OF_SETTINGS})
    questions.check()
    settings.check()
    settings.check_possible(*questions.load_here(settings.semantics))
    if settings.base_model_name is not None:
        _check_model("base_model_name", settings.base_model_name)
    if settings.base_answers is not None and not (Path(settings.base_answers) / "result.json").is_file():
        raise ConfigError(f"base_answers: {settings.base_answers}: no finished evaluation")


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
    where = f"{where}: evaluate"
    _known(dataset, where)
    flags = _mapping({} if value is None else value, f"{where}: {dataset}")
    unknown = sorted(flags.keys() - EVALUATE_FLAGS)
    if unknown:
        raise ConfigError(f"{where}: {dataset}: unknown flag {unknown[0]!r}; use {', '.join(sorted(EVALUATE_FLAGS))}")
    owners = {name: Questions if name in _OF_QUESTIONS else Settings for name in flags}
    return {name: checked(owners[name], name, one, f"{where}: {dataset}: {name}") for name, one in flags.items()}


def _not_run(value: Any, where: str) -> list[dict[str, str]]:
    rows = [_mapping(row, f"{where}: not_run") for row in value] if isinstance(value, list) else [{}]
    if any(row.keys() != {"mode", "why"} or not all(isinstance(one, str) for one in row.values()) for row in rows):
        raise ConfigError(f"{where}: not_run is {value!r}; expected a list of `mode` and `why`")
    return rows
