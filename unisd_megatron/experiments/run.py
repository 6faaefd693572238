"""A sweep from the grid to the table."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.experiments import devices, engine, graph, slurm, state, table
from unisd_megatron.experiments.engine import Say
from unisd_megatron.experiments.graph import Node, Sweep
from unisd_megatron.experiments.grid import Grid
from unisd_megatron.experiments.identity import Contents
from unisd_megatron.experiments.slurm import Cluster


@dataclass(frozen=True)
class Manner:
    """How a sweep is carried out; nothing of it shapes a result."""

    output: Path
    jobs: int | None = None  # ranks at a time; on a cluster, jobs
    cluster: Cluster | None = None
    dry_run: bool = False
    scripts: Path | None = None  # where the sbatch files are written, instead of being submitted

    @property
    def only_shows(self) -> bool:
        """Whether nothing is started."""
        return self.dry_run or self.scripts is not None


def carry_out(grid: Grid, manner: Manner, say: Say) -> None:
    """Runs what of a grid is not done. Raises `ConfigError` before anything is written, `CheckFailed` where a node failed."""
    sweep = manner.output.absolute()
    memory = sweep if sweep.is_dir() and not manner.only_shows else None
    perform(graph.build(grid, sweep, Contents(memory)), manner, say)


def perform(built: Sweep, manner: Manner, say: Say) -> None:
    """Runs what of a graph is not done, or shows it; raises as `carry_out`."""
    sweep = manner.output.absolute()
    jobs = _jobs(manner, built.nodes)
    if manner.only_shows:
        found = state.survey(sweep, built.nodes)
        for line in state.layers(found):
            say(line)
        if manner.cluster is not None:
            _scripts(sweep, built, [one.node for one in found if one.status == "run"], manner, say)
        return
    engine.require_snakemake(manner.cluster)
    with engine.alone(sweep) as lock:
        todo = [one.node for one in state.survey(sweep, built.nodes) if one.status == "run"]
        say(f"{sweep}: {len(built.nodes)} nodes, {len(todo)} to run")
        _write(sweep, built)
        outcome = engine.carry_out(sweep, todo, jobs=jobs, cluster=manner.cluster, lock=lock, say=say)
    for line in table.lines(sweep, built.content()):
        say(line)
    if outcome.failed or outcome.cancelled:
        why = ", ".join(outcome.failed) or f"none of its own; {sweep / 'snakemake.log'} says why the engine stopped"
        raise CheckFailed(
            f"{len(outcome.failed)} failed ({why}), {len(outcome.cancelled)} not run because of it; "
            "the same command again goes on from here"
        )


def _jobs(manner: Manner, nodes: list[Node]) -> int:
    most = max(node.ranks for node in nodes)
    if manner.cluster is not None:
        return manner.jobs or 100
    devices.require(most)
    jobs = manner.jobs or max(most, devices.ranks_at_a_time())
    if most > jobs:
        raise ConfigError(f"--jobs {jobs}: a training has {most} ranks; give it --jobs {most} or more")
    return jobs


def _write(sweep: Path, built: Sweep) -> None:
    for folder, settings in built.files.items():
        state.write(sweep / folder / "settings.json", settings)
    state.write(sweep / "sweep.json", built.content())
    if (sweep / ".engine").exists():  # of an invocation that was killed
        shutil.rmtree(sweep / ".engine")


def _scripts(sweep: Path, built: Sweep, todo: list[Node], manner: Manner, say: Say) -> None:
    """The sbatch file of every node that would be submitted: shown, or written to a folder of their own, with the sweep that
    they are of."""
    assert manner.cluster is not None
    folder = manner.scripts
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--sbatch_dir {folder}: not empty; choose a new folder")
    if manner.dry_run and folder is not None:
        raise ConfigError("--dry_run writes nothing, not even --sbatch_dir; give one of the two")
    logs = {node.name: state.beside(sweep, node, "slurm.log") for node in todo}
    commands = {node.name: engine.command_of(sweep, node, manner.cluster) for node in todo}
    texts = {node.name: slurm.script(node, manner.cluster, commands[node.name], logs[node.name]) for node in todo}
    if folder is None:
        for text in texts.values():
            say(f"\n{text}")
        return
    with engine.alone(sweep):
        _write(sweep, built)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        logs[name].parent.mkdir(parents=True, exist_ok=True)  # Slurm makes none
        (folder / f"{name}.sbatch").write_text(text)
    say(f"{folder}: {len(todo)} sbatch files; each names what it comes after")
