"""Starts the scripts of `examples/` for real, on CPU processes and with a tiny model; Slurm is three stand-ins on the PATH."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from unisd_megatron.train.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parent.parent.parent
SCALE = ROOT / "examples" / "qwen2_5_7b"
TIMEOUT_S = 400
COURSE: dict[str, Any] = {
    "mode": "unisd_star",
    "dataset": "addition",
    "tensor_model_parallel_size": 2,
    "num_train_examples": 64,
    "num_auxiliary_contexts": 2,
    "fewshot_method": "random",
    "global_batch_size": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "ref_model_sync_steps": 1,
    "token_clip_quantile": 0.9,
    "save_steps": 2,
    "max_steps": 10,
}
# What the scripts need of Slurm: one host, one task on it that gets the signals of its step, and a word to be requeued.
SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$SLURM_STANDIN/scontrol.log"; fi\n',
}


class Desk:
    """A folder with a tiny configuration, and the environment in which scripts run there."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        (folder / "config.yaml").write_text(json.dumps({**COURSE, "model_name": str(model)}))
        (folder / "bin").mkdir()
        for name, text in SLURM.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
            (folder / "bin" / name).chmod(0o755)

    def environment(self, output: Path, **more: str) -> dict[str, str]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        machines = {"NODES": "1", "GPUS_PER_NODE": "2", "GPU": "cpu", "PORT": str(port), "OMP_NUM_THREADS": "1"}
        files = {"CONFIG": str(self.folder / "config.yaml"), "OUTPUT_DIR": str(output), "PYTHON": sys.executable}
        return {**os.environ, **machines, **files, **more}

    def slurm(self, output: Path) -> dict[str, str]:
        job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "localhost"}
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_STANDIN": str(self.folder)}
        return self.environment(output, **job, **path)

    @property
    def requeued(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []


@contextlib.contextmanager
def started(script: Path, environment: dict[str, str], log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script, output in `log`; nothing of it is left running."""
    with log.open("wb") as stream:
        process = subprocess.Popen(["bash", str(script), *words], stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        yield process
    finally:
        for one in [*descendants(process.pid), process]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def ranks(pid: int) -> list[psutil.Process]:
    """The training processes below a script: those whose environment has a rank."""
    found = []
    for one in descendants(pid):
        with contextlib.suppress(psutil.Error):
            if "LOCAL_RANK" in one.environ():
                found.append(one)
    return found


def watch(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def steps(output: Path) -> int:
    return len(read_metrics(output)) if (output / METRICS_FILE).is_file() else 0


def course(output: Path) -> list[dict[str, Any]]:
    """What every start of a run must agree in, bit for bit: all but what it cost."""
    times = ("seconds/", "tokens_per_second", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(times)} for row in read_metrics(output)]
