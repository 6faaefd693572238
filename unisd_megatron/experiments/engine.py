"""Hands what is to be run to Snakemake, tells what becomes of it, and ends everything when it is asked to.

Every invocation gives Snakemake a fresh folder, so that nothing of a killed one (locks, marks of half-written files, times of
files) has a say. What is done is known from receipts alone (`state.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.errors import ConfigError, MissingDependency
from unisd_megatron.experiments import slurm, state
from unisd_megatron.experiments.graph import Node
from unisd_megatron.experiments.slurm import Cluster

Say = Callable[[str], None]
GRACE_S = 45.0
"""For Snakemake and what it started, more than a node's own."""


@dataclass
class Outcome:
    """What became of the nodes that were to be run."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


def require_snakemake(cluster: Cluster | None) -> None:
    """Raises `MissingDependency` with the line that installs it."""
    wanted = ["snakemake"] + (["snakemake_executor_plugin_slurm"] if cluster else [])
    for module in wanted:
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(f"{module} is not installed; `pip install 'unisd_megatron[experiments]'`")
    if cluster is not None and shutil.which("sbatch") is None:
        raise ConfigError("--slurm: no `sbatch` here; start it where jobs can be submitted, or leave --slurm out")


@contextlib.contextmanager
def alone(sweep: Path) -> Iterator[int]:
    """The sweep's lock, as a file descriptor. Raises `ConfigError` if another process is at it."""
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / ".lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            who = stream.read().strip() or "another process"
            raise ConfigError(
                f"{sweep}: {who} (or what it started) is carrying out this sweep; wait for it, or end it"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{sweep}: its file system has no locks ({error.strerror}); choose another --output_dir"
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}\n")
        stream.flush()
        yield stream.fileno()


def carry_out(sweep: Path, todo: Sequence[Node], *, jobs: int, cluster: Cluster | None, lock: int, say: Say) -> Outcome:
    """Runs the nodes in their order, as many ranks at a time as `jobs` (with a cluster: as many submitted jobs).

    Args: lock: inherited by Snakemake, so that one that outlives this process keeps others out. On SIGINT or SIGTERM everything
    that was started is ended, and `SystemExit` raised.
    """
    if not todo:
        return Outcome()
    for node in todo:
        state.beside(sweep, node, "done.json").unlink(missing_ok=True)
        state.beside(sweep, node, "failed.json").unlink(missing_ok=True)
    folder = sweep / ".engine" / secrets.token_hex(4)
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps([_rule(sweep, node, todo, cluster) for node in todo], indent=2))
    with (sweep / "snakemake.log").open("a") as log:
        process = subprocess.Popen(
            _command(folder, jobs, cluster),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        outcome = _Watch(sweep, todo, process, cluster, say).follow()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
    return outcome


def command_of(sweep: Path, node: Node, cluster: Cluster | None) -> str:
    """The shell line that carries out a node."""
    words = [sys.executable, "-m", "unisd_megatron", "experiments", "work", str(sweep), node.name]
    words += ["--own_job"] if cluster else []
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def _rule(sweep: Path, node: Node, todo: Sequence[Node], cluster: Cluster | None) -> dict[str, Any]:
    to_run = {one.name for one in todo}
    return {
        "name": node.name,
        "rule": re.sub(r"\W", "_", node.name),
        "needs": [need for need in node.needs if need in to_run],
        "threads": slurm.threads(node, cluster) if cluster else node.ranks,
        "resources": slurm.resources(node, cluster) if cluster else {},
        "command": command_of(sweep, node, cluster),
    }


def _command(folder: Path, jobs: int, cluster: Cluster | None) -> list[str]:
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("graph.smk"))]
    words += ["--directory", str(folder), "--config", "plan=plan.json", "--keep-going", "--nolock", "--scheduler", "greedy"]
    words += ["--profile", "none", "--workflow-profile", "none"]  # a user's profile is for workflows of theirs
    if cluster is None:
        return [*words, "--cores", str(jobs)]
    return [*words, "--executor", "slurm", "--jobs", str(jobs), *slurm.flags(cluster)]


class _Watch:
    """Follows Snakemake by the receipts that nodes write, which is the same for every backend."""

    def __init__(
        self, sweep: Path, todo: Sequence[Node], process: subprocess.Popen[bytes], cluster: Cluster | None, say: Say
    ) -> None:
        self._sweep, self._todo, self._process, self._cluster, self._say = sweep, todo, process, cluster, say
        self._outcome = Outcome()
        self._stopped: int | None = None  # by which signal
        self._open = {node.name: node for node in todo}

    def follow(self) -> Outcome:
        ends = [signal.SIGINT, signal.SIGTERM]
        ends += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []  # `nohup` means to go on
        before = {one: signal.signal(one, self._stop) for one in ends}
        try:
            while self._process.poll() is None:
                self._heed()
                self._look()
                time.sleep(0.2)
            self._look()
        except Exception:  # nobody reads what is said, or a receipt cannot be read: nothing goes on unwatched
            self._end()
            raise
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
        for node in list(self._open.values()):
            if not any(need in self._open or need in self._outcome.failed for need in node.needs):
                self._failed(node, "ended without a word, from outside")
        self._outcome.cancelled = list(self._open)
        return self._outcome

    def _look(self) -> None:
        for name, node in list(self._open.items()):
            found = state.receipt(self._sweep, node)
            failed = state.beside(self._sweep, node, "failed.json").is_file()
            if found is None and not failed:
                continue
            if found is None:
                self._failed(node, "FAILED")
                continue
            del self._open[name]
            self._outcome.done.append(name)
            less = f", at --micro-batch-size {found['micro_batch_size']}" if "micro_batch_size" in found else ""
            self._say(f"{self._count()} done    {name}  ({found['seconds']} s{less})")

    def _failed(self, node: Node, how: str) -> None:
        del self._open[node.name]
        self._outcome.failed.append(node.name)
        log = state.beside(self._sweep, node, "log")
        if not log.is_file():  # it never came to its own
            log = self._sweep / "snakemake.log"
        self._say(f"{self._count()} {how}  {node.name}; the end of {log}:")
        for line in state.tail(log):
            self._say(f"    {line}")

    def _count(self) -> str:
        return f"[{len(self._todo) - len(self._open)}/{len(self._todo)}]"

    def _stop(self, number: int, _: object) -> None:
        self._stopped = number

    def _heed(self) -> None:
        if self._stopped is None:
            return
        with contextlib.suppress(OSError):  # the terminal may be what is gone
            self._say("stopping: what has a checkpoint goes on from there the next time")
        self._end()
        raise SystemExit(128 + self._stopped)

    def _end(self) -> None:
        """Ends Snakemake and, on this machine, all nodes with their commands; on a cluster it takes its jobs back."""
        with contextlib.suppress(ProcessLookupError):
            if self._cluster is not None:
                self._process.send_signal(signal.SIGINT)
            else:
                os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
