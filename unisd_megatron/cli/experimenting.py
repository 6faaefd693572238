"""`unisd experiments`: its flags, which stand on either side of the subcommand. Heavy imports are inside."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unisd_megatron.cli.commands import say
from unisd_megatron.cli.flags import Parser, command, flag
from unisd_megatron.errors import ConfigError

_SLURM = {
    "slurm_account": (str, "account", "NAME", "account of the jobs"),
    "slurm_partition": (str, "partition", "NAME", "partition of the jobs"),
    "slurm_minutes": (int, "minutes", "N", "time limit of each job (240)"),
    "slurm_gpus_per_rank": (int, "gpus_per_rank", "N", "GPUs of each rank (1)"),
    "slurm_cpus_per_rank": (int, "cpus_per_rank", "N", "cores of each rank (4)"),
    "slurm_memory": (int, "memory_per_rank", "GIB", "host memory of each rank, GiB (32)"),
}
_HOW = frozenset({"dry_run", "output_dir", "jobs", "slurm", "sbatch_dir", *_SLURM})
_WHAT = frozenset({"seeds", "processes", "recipe", "grid", "config"})


def add_experiments(subparsers: Any, add_settings: Callable[[Any], None], stated: Callable[[Any], dict[str, Any]]) -> None:
    """The subcommand. Args: add_settings: adds the flags of `train`; stated: what a request says of them, with --config."""
    from unisd_megatron.experiments.named import NAMED

    parser = subparsers.add_parser("experiments", help="Sweeps: prepare, train, evaluate and report, as a graph.")
    _add_how(parser)
    parts = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT", parser_class=Parser)
    for name, modes in NAMED.items():
        help_text = f"{', '.join(dict.fromkeys(('vanilla', *modes)))}, with the published settings."
        one = command(parts, name, lambda request: _named(request, stated), help_text)
        _add_how(one)
        flag(one, "seeds", default=argparse.SUPPRESS, metavar="N,N,...", help="a run for each (42)")
        flag(one, "processes", type=int, default=argparse.SUPPRESS, metavar="N", help="ranks of each training")
        recipes = ["direct", "orchestrator"]
        flag(one, "recipe", choices=recipes, default="orchestrator", help="whose settings: docs/experiments.md (orchestrator)")
        add_settings(one)
    one = command(parts, "run", _run, "The grid of a YAML file.")
    one.add_argument("grid", metavar="GRID.yaml", help="settings, what is crossed, entries, seeds: docs/experiments.md")
    _add_how(one)
    one = command(parts, "study", _study, "All modes and baselines on the demo model, three seeds each.")
    _add_how(one)
    one = command(parts, "work", _work, "One node of a sweep: what its jobs call.")
    one.add_argument("sweep", metavar="SWEEP", help="folder of a sweep")
    one.add_argument("node", metavar="NODE", help="its name in sweep.json")
    flag(one, "own_job", action="store_true", help="of a job submitted for it alone: all GPUs of the job are its own")


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Absent from the request where not given: neither side of the subcommand resets what the other side said."""
    group = parser.add_argument_group("how")

    def add(name: str, **options: Any) -> None:
        flag(group, name, default=argparse.SUPPRESS, **options)

    add("dry_run", action="store_true", help="show what would be run, layer by layer; start and write nothing")
    add("output_dir", metavar="SWEEP", help="folder of the sweep (runs/NAME)")
    add("jobs", type=int, metavar="N", help="ranks at a time (the GPUs, else the cores); with --slurm, jobs (100)")
    add("slurm", action="store_true", help="submit to Slurm instead of running here")
    add("sbatch_dir", metavar="DIR", help="write the sbatch files that --slurm would submit, and submit nothing")
    for name, (kind, _, metavar, text) in _SLURM.items():
        add(name, type=kind, metavar=metavar, help=text)


def _named(request: argparse.Namespace, stated: Callable[[Any], dict[str, Any]]) -> int:
    from unisd_megatron.experiments.named import grid

    own = {name: value for name, value in vars(request).items() if name not in _HOW | _WHAT | {"experiment"}}
    settings = stated(argparse.Namespace(**own, config=request.config))
    seeds, processes = _seeds(getattr(request, "seeds", "42")), getattr(request, "processes", None)
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes is {processes}; it must be at least 1")
    return _carry_out(request, grid(request.experiment, settings, request.recipe, seeds, processes))


def _run(request: argparse.Namespace) -> int:
    from unisd_megatron.experiments.grid import read

    return _carry_out(request, read(request.grid))


def _study(request: argparse.Namespace) -> int:
    from unisd_megatron.experiments.named import study

    return _carry_out(request, study())


def _work(request: argparse.Namespace) -> int:
    from unisd_megatron.experiments.work import work

    return work(Path(request.sweep), request.node, own_job=request.own_job)


def _carry_out(request: argparse.Namespace, grid: Any) -> int:
    from unisd_megatron.experiments.run import Manner, carry_out
    from unisd_megatron.experiments.slurm import Cluster

    given = vars(request)
    asked = {_SLURM[name][1]: given[name] for name in _SLURM if name in given}
    cluster = Cluster(**asked) if given.get("slurm") else None
    idle = [name for name in (*_SLURM, "sbatch_dir") if name in given]
    if cluster is None and idle:
        raise ConfigError(f"--{idle[0]} does nothing without --slurm; add it, or drop --{idle[0]}")
    for name in ("jobs", *(one for one, (kind, *_) in _SLURM.items() if kind is int and one != "slurm_gpus_per_rank")):
        if given.get(name, 1) < 1:
            raise ConfigError(f"--{name} is {given[name]}; it must be at least 1")
    if given.get("slurm_gpus_per_rank", 0) < 0:
        raise ConfigError(f"--slurm_gpus_per_rank is {given['slurm_gpus_per_rank']}; it must not be negative")
    scripts = Path(given["sbatch_dir"]) if "sbatch_dir" in given else None
    output = Path(given.get("output_dir", f"runs/{grid.name}"))
    carry_out(grid, Manner(output, given.get("jobs"), cluster, given.get("dry_run", False), scripts), say)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(one) for one in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds is {text!r}; expected different whole numbers, such as 0,1,2")
    return seeds
