"""The graph of a sweep: prepare -> train -> evaluate -> report, every node named by what shapes it.

    SWEEP/sweep.json                                      the grid, resolved: runs, evaluations, nodes
    SWEEP/runs/<mode>-<dataset>-<digest>/settings.json    what `train --config` reads
    SWEEP/runs/.../seed<N>/train/                         the run
    SWEEP/runs/.../seed<N>/evaluate-<dataset>-<digest>/
    SWEEP/base/<model>-<digest>/evaluate-...              the checkpoint that runs start from
    SWEEP/report/

Beside the folder of a node lie its `.done.json`, `.failed.json`, `.log` and `.lock`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unisd_megatron.caches import CACHE_SETTINGS, CacheKind
from unisd_megatron.config import Caches, Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.experiments import identity
from unisd_megatron.experiments.grid import Cell, Grid
from unisd_megatron.experiments.identity import Contents
from unisd_megatron.prepare.needs import kinds_of, task_of

Kind = Literal["prepare", "train", "evaluate", "report"]
LAYERS: tuple[Kind, ...] = ("prepare", "train", "evaluate", "report")


@dataclass(frozen=True)
class Node:
    """A piece of work: one `unisd` command with everything it writes in one folder."""

    name: str
    kind: Kind
    folder: str  # under the sweep's
    command: tuple[str, ...]  # in the folder that the sweep was started in
    identity: str
    needs: tuple[str, ...] = ()
    ranks: int = 1

    @staticmethod
    def of(row: Mapping[str, Any]) -> Node:
        """Back from JSON."""
        return Node(**{**row, "command": tuple(row["command"]), "needs": tuple(row["needs"])})


@dataclass(frozen=True)
class Sweep:
    """What `sweep.json` holds. Folders are under the sweep's own."""

    name: str
    runs: list[dict[str, Any]]  # name, mode, dataset, seed, settings that vary, identity, train, evaluations, base
    base: list[dict[str, Any]]  # model_name, dataset, evaluation
    not_run: list[dict[str, str]]
    nodes: list[Node]
    files: dict[str, Any]  # settings.json of each run, by folder

    def content(self) -> dict[str, Any]:
        """As JSON."""
        plain = {"name": self.name, "runs": self.runs, "base": self.base, "not_run": self.not_run}
        return plain | {"nodes": [dataclasses.asdict(node) for node in self.nodes]}


def build(grid: Grid, folder: Path, contents: Contents) -> Sweep:
    """The graph of a grid in a folder. Raises `ConfigError` where a run cannot be, or two are the same."""
    cells = grid.cells()
    builder = _Builder(grid, folder, contents, {})
    varying = _varying(cells)
    runs: list[dict[str, Any]] = []
    files: dict[str, Any] = {}
    taken: dict[str, int] = {}
    for number, cell in enumerate(cells):
        key = identity.of_run(cell.run, grid.ranks(cell.run), contents)
        if key in taken:
            raise ConfigError(f"{grid.where}: {_name(cells[taken[key]], varying)!r} stands there twice; drop one of the two")
        taken[key] = number
        place = f"runs/{cell.run.mode}-{cell.run.data.dataset}-{key}"
        files[place] = dict(cell.stated)
        runs += [builder.run(cell, place, key, seed, varying) for seed in grid.seeds]
    base = builder.base(cells)
    builder.report(runs)
    return Sweep(grid.name, runs, base, [dict(row) for row in grid.not_run], list(builder.nodes.values()), files)


def _varying(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """By mode and data set, what a run's name tells: the data set where there are several, and what its runs do not share."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(_group(cell.run), []).append(cell.run.flat())
    several = ["dataset"] if len({cell.run.data.dataset for cell in cells}) > 1 else []
    return {
        group: several + [name for name, value in rows[0].items() if any(row[name] != value for row in rows)]
        for group, rows in groups.items()
    }


def _group(run: Run) -> str:
    return f"{run.mode} {run.data.dataset}"


def _name(cell: Cell, varying: Mapping[str, list[str]]) -> str:
    flat = cell.run.flat()
    return " ".join([cell.run.mode, *(f"{name}={flat[name]}" for name in varying[_group(cell.run)])])


@dataclass
class _Builder:
    grid: Grid
    folder: Path
    contents: Contents
    nodes: dict[str, Node]

    def run(self, cell: Cell, place: str, key: str, seed: int, varying: Mapping[str, list[str]]) -> dict[str, Any]:
        """Adds the nodes of one run; its row in `sweep.json`."""
        home, name = f"{place}/seed{seed}", f"{place.removeprefix('runs/')}-seed{seed}"
        flat = cell.run.flat()
        words = ["train", "--config", str(self.folder / place / "settings.json"), "--seed", str(seed)]
        words += ["--output_dir", str(self.folder / home / "train")]
        task = task_of(cell.run.data, cell.run.objective.semantics)
        needs = tuple(self._prepare(cell.run, kind) for kind in kinds_of(cell.run, task))
        ranks = self.grid.ranks(cell.run)
        train = Node(f"train-{name}", "train", f"{home}/train", _unisd(words, ranks), f"{key}-{seed}", needs, ranks)
        self._add(train)
        evaluations = {
            dataset: self._evaluate(dataset, flags, str(self.folder / train.folder / "hf"), home, name, train)
            for dataset, flags in self.grid.evaluations(cell.run).items()
        }
        settings = {one: flat[one] for one in varying[_group(cell.run)]}
        row = {"name": _name(cell, varying), "mode": cell.run.mode, "dataset": cell.run.data.dataset, "seed": seed}
        start = self._base(cell.run.model_name)
        base = {dataset: f"{start}/{Path(place).name}" for dataset, place in evaluations.items()}
        return row | {"settings": settings, "identity": key, "train": train.folder, "evaluations": evaluations, "base": base}

    def base(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The evaluations of what the runs start from, once for each checkpoint."""
        found: dict[str, dict[str, Any]] = {}
        for cell in cells:
            model = cell.run.model_name
            home = self._base(model)
            for dataset, flags in self.grid.evaluations(cell.run).items():
                place = self._evaluate(dataset, flags, model, home, home.removeprefix("base/"), None)
                found[place] = {"model_name": model, "dataset": dataset, "evaluation": place}
        return list(found.values())

    def _base(self, model: str) -> str:
        return f"base/{_safe(Path(model).name)}-{identity.digest(self.contents.of_model(model))}"

    def report(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """The last node: the pages of the whole sweep, by the room `report`. The only place that names its command."""
        words = ("report", str(self.folder), "--output_dir", str(self.folder / "report"))
        needs = tuple(node.name for node in self.nodes.values() if node.kind == "evaluate")
        shown = identity.digest([list(runs), [dict(row) for row in self.grid.not_run]])
        self._add(Node("report", "report", "report", _unisd(words), shown, needs))

    def _evaluate(self, dataset: str, flags: Mapping[str, Any], model: str, home: str, name: str, train: Node | None) -> str:
        key = identity.of_evaluation(dataset, flags, self.contents)
        folder = f"{home}/evaluate-{dataset}-{key}"
        words = ["evaluate", "--dataset", dataset, "--model_name", model, "--output_dir", str(self.folder / folder)]
        words += _words(flags)
        needs = (train.name,) if train is not None else ()
        self._add(Node(f"evaluate-{name}-{dataset}-{key}", "evaluate", folder, _unisd(words), key, needs))
        return folder

    def _prepare(self, run: Run, kind: CacheKind) -> str:
        names = CACHE_SETTINGS[kind] | {"cache_dir"}
        flags: dict[str, Any] = {"dataset": run.data.dataset, "data_path": run.data.data_path}
        flags |= {"num_train_examples": run.data.num_train_examples, "semantics": run.objective.semantics}
        flags |= {one.name: getattr(run.caches, one.name) for one in dataclasses.fields(Caches) if one.name in names}
        flags |= {} if kind == "embeddings" else {"model_name": run.model_name}
        models = [self.contents.of_model(str(flags[one])) for one in ("model_name", "retrieval_model") if one in flags]
        assert run.data.dataset is not None
        key = identity.digest([kind, flags, models, self.contents.of_data(run.data.dataset, run.data.data_path)])
        name = f"prepare-{kind}-{run.data.dataset}-{key}"
        words = ("prepare", kind, *_words({one: value for one, value in flags.items() if value is not None}))
        self._add(Node(name, "prepare", f"prepare/{name}", _unisd(words), key))
        return name

    def _add(self, node: Node) -> None:
        self.nodes.setdefault(node.name, node)


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a command line has them; a switch that is off is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            words += [f"--{name}", str(value)]
    return words


def _unisd(words: Sequence[str], ranks: int = 1) -> tuple[str, ...]:
    """The command line of a subcommand, under torchrun where it has more ranks than one."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    return (sys.executable, *torchrun, "-m", "unisd_megatron", *words)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name) or "model"


def read(folder: Path) -> dict[str, Any]:
    """`sweep.json` of a folder. Raises `ConfigError` where there is none."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no sweep (sweep.json is missing)")
    return dict(json.loads(path.read_text()))
