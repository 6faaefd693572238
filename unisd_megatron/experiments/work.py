"""One node, carried out: resumed where it was cut, tried again with less memory, finished by a receipt."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from unisd_megatron import processes
from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError, UnisdError
from unisd_megatron.experiments import devices, state
from unisd_megatron.experiments.graph import Node, read
from unisd_megatron.resolve import resolve

ATTEMPTS = 4
"""Of a training that runs out of memory, each at a smaller micro-batch."""
GRACE_S = 30.0
"""For a command that is asked to stop, before it is killed."""
_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|Cuda failure.*out of memory|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError"
    r"|^MemoryError|ArrayMemoryError|can't allocate memory|Signal 9 \(SIGKILL\)|oom-kill|out-of-memory",
    re.MULTILINE,
)


def work(sweep: Path, name: str, *, own_job: bool = False) -> int:
    """Carries out a node of a sweep; the exit status. Waits where another process carries out the same.

    Args: own_job: a cluster's job was submitted for this node alone, and all of its GPUs are the node's.
    """
    rows = [row for row in read(sweep)["nodes"] if row["name"] == name]
    if not rows:
        raise ConfigError(f"{sweep}/sweep.json: no node {name!r}")
    node = Node.of(rows[0])
    with _alone(state.beside(sweep, node, "lock")) as lock:
        if state.receipt(sweep, node) is not None:
            return 0
        return _Worker(sweep, node, lock, own_job).carry_out()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[int]:
    """A lock that the command inherits: one that outlives its worker still keeps a second one out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


class _Worker:
    def __init__(self, sweep: Path, node: Node, lock: int, own_job: bool) -> None:
        self._sweep, self._node, self._lock, self._own_job = sweep, node, lock, own_job
        self._log = state.beside(sweep, node, "log")
        self._output = sweep / node.folder
        self._runs = False  # a command, or one may
        self._stopped: int | None = None  # by which signal

    def carry_out(self) -> int:
        failed = state.beside(self._sweep, self._node, "failed.json")
        failed.unlink(missing_ok=True)
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self._stop)
        self._output.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self._log.open("a", encoding="utf-8") as log:
            try:
                status, attempt, micro = self._tries(log)
            except UnisdError as error:
                _note(log, f"unisd: {error}")
                status, attempt, micro = 1, 0, None
        about: dict[str, Any] = {"identity": self._node.identity, "attempts": attempt, "command": self._node.command}
        about |= {"seconds": round(time.monotonic() - began, 1)} | ({"micro_batch_size": micro} if micro else {})
        if status:
            state.write(failed, about | {"exit": status})
            return 1
        state.write(state.beside(self._sweep, self._node, "done.json"), about)
        return 0

    def _tries(self, log: IO[str]) -> tuple[int, int, int | None]:
        """`(exit status, attempts, micro-batch of the last one where it is not the run's own)`."""
        attempt, micro = 1, None
        while True:
            status, text = self._attempt(log, micro)
            smaller = self._smaller(micro) if status and ran_out(status, text) else None
            if smaller is None or attempt == ATTEMPTS:
                break
            attempt, micro = attempt + 1, smaller
            _note(log, f"out of memory: again with --micro-batch-size {smaller}, the same global batch")
        if not status and self._node.kind == "train" and not state.is_finished(self._output):
            _note(log, "was asked to stop before its last step; goes on from its checkpoint the next time")
            status = 1
        return status, attempt, micro

    def _attempt(self, log: IO[str], micro: int | None) -> tuple[int, str]:
        """`(exit status, what it said)` of one start of the command."""
        command = list(self._node.command)
        if self._node.kind == "train":
            command += self._resumed()
            command += ["--micro-batch-size", str(micro)] if micro else []
        _note(log, shlex.join(command))
        begins = log.tell()
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
        claimed = contextlib.nullcontext(devices.Claim({}, ())) if self._own_job else devices.claim(self._node.ranks)
        with claimed as gpus:
            self._runs = True
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | dict(gpus.environment),
                start_new_session=True,
                pass_fds=(self._lock, *gpus.locks),
            )
            status = self._wait(child)
            self._runs = False
        with self._log.open(encoding="utf-8", errors="replace") as said:
            said.seek(begins)
            return status, said.read()

    def _resumed(self) -> list[str]:
        """Goes on from the last complete checkpoint. What was cut before its first one is begun anew."""
        if state.last_checkpoint(self._output) is not None:
            return ["--resume_from_checkpoint", "latest"]
        if self._output.exists():
            shutil.rmtree(self._output)
        return []

    def _run(self) -> Run:
        stated = json.loads((self._sweep / Path(self._node.folder).parent.parent / "settings.json").read_text())
        return resolve({}, stated | {"output_dir": str(self._output)}, "settings.json")

    def _smaller(self, micro: int | None) -> int | None:
        """A micro-batch of half the size or less with which the layout still holds; None where there is no other."""
        if self._node.kind != "train":
            return None
        run = self._run()
        if run.objective.semantics == "released":  # which normalises over each micro-batch
            return None
        for size in range((micro or run.layout.micro_batch_size) // 2, 0, -1):
            with contextlib.suppress(ConfigError):
                dataclasses.replace(run.layout, micro_batch_size=size).validate(self._node.ranks)
                return size
        return None

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Its exit status; when this process is asked to stop, ends the command with all its processes, then itself."""
        while child.poll() is None and self._stopped is None:
            time.sleep(0.05)
        if self._stopped is not None:
            end(child, GRACE_S)
            os._exit(128 + self._stopped)
        return child.returncode

    def _stop(self, number: int, _: object) -> None:
        """Only notes it while a command runs: whoever waits for a child inside a handler waits for who it has interrupted."""
        self._stopped = number
        if not self._runs:
            os._exit(128 + number)


def end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Asks a process group to stop, and kills it when it does not, ranks in groups of their own included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(grace_s)
    except subprocess.TimeoutExpired:
        processes.kill(child)
    with contextlib.suppress(ProcessLookupError):  # those of the group that are left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def ran_out(status: int, text: str) -> bool:
    """Whether memory ran out: by what was said, or killed, as Linux does to whoever takes the last of it."""
    return status in (-signal.SIGKILL, 128 + signal.SIGKILL) or _OUT_OF_MEMORY.search(text) is not None


def _note(log: IO[str], text: str) -> None:
    log.seek(0, os.SEEK_END)
    log.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")
    log.flush()
