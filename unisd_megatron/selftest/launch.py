"""One program of a check: started in a session of its own, with a time limit, its output in a log; nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unisd_megatron.processes import kill

_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """`python -m module words...`, under torchrun if `ranks` is given."""

    module: str
    words: tuple[str, ...]
    ranks: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """What is started, the interpreter first."""
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"] if self.ranks else []
        return [sys.executable, "-m", *launcher, self.module, *self.words]

    def shown(self) -> str:
        """The command as one would type it."""
        launcher = f"torchrun --standalone --nproc-per-node {self.ranks}" if self.ranks else "python"
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, launcher, "-m", self.module, *(f"'{w}'" if " " in w else w for w in self.words)])


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit status, None for one that was stopped at its time limit; seconds; all it printed."""

    status: int | None
    seconds: float
    output: str


def run(job: Job, log: Path, folder: Path, limit_s: float) -> Ended:
    """Carries out a job in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"} | dict(job.environment)
    began = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            job.command(), stdout=stream, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill(process)
    return Ended(status, time.monotonic() - began, log.read_text(errors="replace").replace("\r", "\n"))
