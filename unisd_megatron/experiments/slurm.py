"""What a node asks of Slurm: as resources of Snakemake's plug-in, and as the sbatch script that says the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd_megatron.experiments.graph import Node


@dataclass(frozen=True)
class Cluster:
    """Where jobs go. One job is one node of the graph, on one host; times in minutes, memory in GiB."""

    account: str | None = None
    partition: str | None = None
    minutes: int = 240
    gpus_per_rank: int = 1
    cpus_per_rank: int = 4
    memory_per_rank: int = 32


def threads(node: Node, cluster: Cluster) -> int:
    """Cores of the job."""
    return node.ranks * cluster.cpus_per_rank


def resources(node: Node, cluster: Cluster) -> dict[str, Any]:
    """In the names of snakemake-executor-plugin-slurm."""
    asked: dict[str, Any] = {"runtime": cluster.minutes, "mem_mb": node.ranks * cluster.memory_per_rank * 1024, "nodes": 1}
    asked["cpus_per_task"] = threads(node, cluster)
    if gpus(node, cluster):
        # One task for the whole job, not one for each GPU: it starts its ranks itself.
        asked |= {"gpu": gpus(node, cluster), "tasks_per_gpu": 0}
    if cluster.account:
        asked["slurm_account"] = cluster.account
    if cluster.partition:
        asked["slurm_partition"] = cluster.partition
    return asked


def gpus(node: Node, cluster: Cluster) -> int:
    """GPUs of the job; a report needs none."""
    return 0 if node.kind == "report" else node.ranks * cluster.gpus_per_rank


def flags(cluster: Cluster) -> list[str]:
    """Of Snakemake itself."""
    return ["--latency-wait", "60", "--slurm-init-seconds-before-status-checks", "5", "--default-resources", "mem_mb=1024"]


def script(node: Node, cluster: Cluster, command: str, log: Path) -> str:
    """The job as a file that `sbatch` takes: the same request and the same work, without the engine around it."""
    asked = resources(node, cluster)
    lines = ["#!/bin/bash", f"#SBATCH --job-name={node.name}", f"#SBATCH --output={log}"]
    lines += [f"#SBATCH --account={cluster.account}"] if cluster.account else []
    lines += [f"#SBATCH --partition={cluster.partition}"] if cluster.partition else []
    lines += [f"#SBATCH --time={asked['runtime']}", f"#SBATCH --mem={asked['mem_mb']}", "#SBATCH --nodes=1"]
    lines += [f"#SBATCH --cpus-per-task={threads(node, cluster)}"]
    lines += [f"#SBATCH --gpus={asked['gpu']}" if "gpu" in asked else "#SBATCH --ntasks=1"]
    if node.needs:
        lines += ["# after: " + " ".join(map(shlex.quote, node.needs))]
    return "\n".join([*lines, command, ""])
