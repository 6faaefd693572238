"""Processes that this program started: their end, with everything they started in turn."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher that leads a session of its own and to all it started, and waits until they are gone.

    Does nothing if it has ended.
    """
    if launcher.poll() is not None:
        return
    os.kill(launcher.pid, signal.SIGSTOP)  # it must not start, stop or reap ranks while they are counted
    members = psutil.Process(launcher.pid).children(recursive=True)
    # torchrun gives each rank a process group of its own, in which the rank's forked writers are too.
    groups = {launcher.pid}
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(member.pid))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    launcher.wait()
    while any(_runs(member) for member in members):  # until then it might still write into the run's folder
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
