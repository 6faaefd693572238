"""Fresh processes for a measurement: one per rank, each printing a line of JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from unisd_megatron.errors import CheckFailed

TIMEOUT_S = 1200


def measure_in_fresh_processes(
    module: str, request: dict[str, Any], ranks: int, threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs `python -m module REQUEST` as `ranks` processes that know each other as torchrun's would; what each said last.

    `threads` of each; None: the machine's cores are shared out. Raises `CheckFailed` with their last words if one fails.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // ranks)
    shared = {"OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # MALLOC_ settings keep freed memory mapped, which would count as used.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | shared | {"WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", module, json.dumps(request)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"benchmark of {request} took more than {TIMEOUT_S} s") from error
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode != 0:
            raise CheckFailed(f"benchmark of {request} failed: {' | '.join(errors.strip().splitlines()[-3:])}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
