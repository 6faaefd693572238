"""A vLLM server for a measurement: started, waited for, and always ended with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from unisd_megatron.bench.processes import free_port
from unisd_megatron.errors import CheckFailed
from unisd_megatron.rollout.guard import server_token
from unisd_megatron.rollout.server import Server

START_S = 600
_SERVE = "import sys; from unisd_megatron.rollout.serve import main; sys.exit(main(sys.argv[1:]))"


@contextlib.contextmanager
def running(folder: Path, dtype: str, max_model_len: int, cache_bytes: int) -> Iterator[str]:
    """The URL of a server of the model in `folder`, with weights of no meaning, as long as the block; as `tools/serve_vllm.py`.

    What it says goes to `folder/server.log`. Raises `CheckFailed` with its last words if it ends or takes ten minutes.
    """
    port, log = free_port(), folder / "server.log"
    words = ["--model", folder, "--port", port, "--dtype", dtype, "--max_model_len", max_model_len]
    more = ["--load-format", "dummy", "--kv-cache-memory-bytes", cache_bytes, "--block-size", 32]
    command = [sys.executable, "-c", _SERVE, *map(str, [*words, "--", *more])]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    with contextlib.closing(Server(url, server_token(), timeout_s=10)) as client:
        while not client.healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
                raise CheckFailed(f"the vLLM server of the benchmark did not start: {last}")
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The leader first, which ends its workers; then whatever is left of its process group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
