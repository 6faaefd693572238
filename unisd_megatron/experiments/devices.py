"""Which GPUs a node may use. Snakemake counts how many are taken; which ones, locks in the machine's temporary folder tell."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unisd_megatron.errors import ConfigError


def gpus() -> list[str]:
    """The GPUs of this process: those of CUDA_VISIBLE_DEVICES, else those that the driver shows."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [one.strip() for one in stated.split(",") if one.strip() not in ("", "-1")]
    shown = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(i) for i in range(len(shown))]  # CUDA counts those that it sees: a container's only one is 0, whatever its name


def ranks_at_a_time() -> int:
    """What this machine has room for: a rank for each GPU, without one for each core."""
    return len(gpus()) or len(os.sched_getaffinity(0))


def require(ranks: int) -> None:
    """Raises `ConfigError` where a node has more ranks than this machine has GPUs. Without GPUs any number runs."""
    names = gpus()
    if names and ranks > len(names):
        raise ConfigError(f"{ranks} ranks and {len(names)} GPUs on this machine ({', '.join(names)}); lower `processes`")


@dataclass(frozen=True)
class Claim:
    """What a command is started with: the environment that shows its GPUs, and their locks, file descriptors to inherit."""

    environment: Mapping[str, str]
    locks: Sequence[int]


@contextlib.contextmanager
def claim(count: int) -> Iterator[Claim]:
    """Takes `count` GPUs that no other node of this user on this machine (in this Slurm job) has; nothing without GPUs.

    Waits until there are enough. Raises `ConfigError` for more than there are.
    """
    names = gpus()
    if not names:
        yield Claim({}, ())
        return
    require(count)
    with contextlib.ExitStack() as stack:
        # A Slurm job sees the GPUs of its own, and may count them from 0 as every other job does.
        job = f"-{os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        folder = Path(tempfile.gettempdir()) / f"unisd-gpus-{os.getuid()}{job}"
        folder.mkdir(exist_ok=True)
        turn = stack.enter_context((folder / "turn").open("a"))
        fcntl.flock(turn, fcntl.LOCK_EX)  # one process chooses at a time, so that two never wait for each other
        streams = {name: stack.enter_context((folder / re.sub(r"\W", "_", name)).open("a")) for name in names}
        taken: list[str] = []
        while len(taken) < count:
            for name in names:
                if name not in taken and len(taken) < count:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(streams[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
                        taken.append(name)
            if len(taken) < count:
                time.sleep(0.2)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield Claim({"CUDA_VISIBLE_DEVICES": ",".join(taken)}, [streams[name].fileno() for name in taken])
