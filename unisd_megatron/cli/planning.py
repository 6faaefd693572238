"""`unisd plan`: the settings of `train` and a cluster in, a page or JSON out. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

from unisd_megatron.cli.flags import flag
from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.plan import GPUS, Arch, Assumed, Cluster, Plan, find_arch, flags, gpu_named, plan_run, propose, refuse
from unisd_megatron.plan.hardware import GIB
from unisd_megatron.plan.kernels import kernels
from unisd_megatron.plan.page import table
from unisd_megatron.plan.search import CHOSEN, distinct, nothing_fits
from unisd_megatron.resolve import resolve
from unisd_megatron.validation import validate_objective, validate_ranges

_OWN = ("gpus", "gpu", "gpus_per_node", "gpu_memory_gib", "network_gbps", "efficiency", "bandwidth")
_MEAN = ("mean_prompt_length", "mean_completion_length", "server_gpus")
OWN = frozenset({*_OWN, *_MEAN, "json"})
"""Flags of `plan` that are no settings of a run."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the cluster, the lengths and what is assumed; the settings of `train` are added by the caller."""
    cluster = parser.add_argument_group("cluster")
    flag(cluster, "gpus", type=int, required=True, metavar="N", help="GPUs that train")
    flag(cluster, "gpu", default="h100", help=f"one of {', '.join(GPUS)} (h100)")
    flag(cluster, "gpus_per_node", type=int, default=8, metavar="N", help="GPUs of a node (8)")
    flag(cluster, "gpu_memory_gib", type=float, metavar="X", help="memory of a GPU instead of its kind's")
    flag(cluster, "network_gbps", type=float, metavar="X", help="network of a GPU, Gbit/s, instead of its kind's")
    assumed = parser.add_argument_group("assumed")
    flag(assumed, "efficiency", type=float, default=0.6, metavar="X", help="part of the rated matrix products reached (0.6)")
    flag(assumed, "bandwidth", type=float, default=0.8, metavar="X", help="part of rated bandwidths reached (0.8)")
    flag(assumed, "mean_prompt_length", type=int, metavar="N", help="mean tokens of a prompt (half of the longest)")
    flag(assumed, "mean_completion_length", type=int, metavar="N", help="mean tokens of a completion (half of the longest)")
    flag(assumed, "server_gpus", type=int, metavar="N", help="GPUs of rollout servers (a quarter of --gpus)")
    flag(assumed, "json", action="store_true", help="numbers for a machine")


def plan(request: argparse.Namespace, stated: tuple[dict[str, Any], dict[str, Any], str]) -> int:
    """Judges the layout that was stated, or proposes some. `ConfigError` where nothing fits."""
    given = {name: value for name, value in stated[0].items() if name not in OWN}
    name = given.get("model_name") or stated[1].get("model_name")
    if not name:
        raise ConfigError("--model_name is missing; give a published model's name, a config.json or its folder")
    shown, arch = find_arch(name)
    run = dataclasses.replace(_resolved((given, stated[1], stated[2])), model_name=shown)
    validate_ranges(run)
    validate_objective(run)
    cluster, assumed = _cluster(request), Assumed(request.efficiency, request.bandwidth, *(getattr(request, n) for n in _MEAN))
    kernels(run, arch, cluster)  # what this GPU cannot compute with is no matter of layouts
    asked = frozenset(name for name, origin in run.origins.items() if origin in ("flag", "file"))
    if asked & CHOSEN:
        one = plan_run(run, arch, cluster, assumed)
        refuse(one)
        print(json.dumps(one.numbers(), indent=1) if request.json else "\n".join(one.lines()))
        return 0
    return _proposals(run, arch, cluster, assumed, asked, as_json=request.json)


def _proposals(run: Run, arch: Arch, cluster: Cluster, assumed: Assumed, asked: frozenset[str], *, as_json: bool) -> int:
    began = time.perf_counter()
    found = propose(run, arch, cluster, assumed, asked)
    if not found:
        raise ConfigError(f"{run.model_name}: {nothing_fits(run, arch, cluster, assumed)}")
    best: list[Plan] = distinct(found, 5)
    if as_json:
        print(json.dumps([one.numbers() for one in best], indent=1))
        return 0
    print("\n".join([*best[0].lines(), "", f"{len(found)} layouts fit; the fastest by arithmetic:", *table(best)]))
    print(f"\nthe first as flags: {flags(best[0])}  ({time.perf_counter() - began:.1f} s)")
    return 0


def _resolved(stated: tuple[dict[str, Any], dict[str, Any], str]) -> Run:
    """A run as `train` would resolve it, in bf16 unless something else is said."""
    flags, of_file, file_name = stated
    return resolve(flags if "bf16" in of_file else {"bf16": True, **flags}, of_file, file_name)


def _cluster(request: argparse.Namespace) -> Cluster:
    gpu = gpu_named(request.gpu)
    for name in ("gpu_memory_gib", "network_gbps"):
        value = getattr(request, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}; it must be positive")
    if request.gpu_memory_gib is not None:
        gpu = dataclasses.replace(gpu, memory=request.gpu_memory_gib * GIB)
    if request.network_gbps is not None:
        gpu = dataclasses.replace(gpu, network=request.network_gbps * 1e9 / 8)
    return Cluster(request.gpus, request.gpus_per_node, gpu)
