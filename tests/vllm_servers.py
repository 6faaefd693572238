"""Real vLLM servers for tests: started together, waited for with a deadline, and always killed as whole process groups."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from unisd_megatron.rollout.guard import TOKEN_VARIABLE
from unisd_megatron.rollout.server import Server

# Small enough for two servers beside each other; a block of 32 tokens lets short prompts share a prefix.
SMALL = ("--max-num-seqs", "16", "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20))
START = "import sys; from unisd_megatron.rollout.serve import main; sys.exit(main(sys.argv[1:], transfer={transfer}))"
STARTED: list[Running] = []  # of this session, for their logs beside a failed test (conftest.py)


@dataclass
class Running:
    """A server process, the leader of a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    token: str | None

    def client(self, timeout_s: float = 120.0) -> Server:
        """A new client of it."""
        return Server(self.url, self.token, timeout_s)

    def freeze(self) -> None:
        """Stops all of its processes: sockets stay open and nothing answers."""
        for one in _family(self.process.pid):
            one.suspend()

    def thaw(self) -> None:
        """Lets them go on."""
        for one in _family(self.process.pid):
            one.resume()

    def kill(self) -> None:
        """SIGKILL to the whole group, and to what left it; returns when none of them runs."""
        family = _family(self.process.pid)
        for send in (lambda: os.killpg(self.process.pid, signal.SIGKILL), *(one.kill for one in family)):
            try:
                send()
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        self.process.wait(30)
        psutil.wait_procs(family, 30)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start(folder: Path, log: Path, *, token: str | None, transfer: bool, flags: Sequence[str] = ()) -> Running:
    """Starts `serve_vllm` on a model folder; `flags` are its own ones. Returns at once."""
    port = free_port()
    command = [sys.executable, "-c", START.format(transfer=transfer), "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max_model_len", "512", *flags, "--", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    environment |= {TOKEN_VARIABLE: token} if token else {}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    STARTED.append(Running(process, log, f"http://127.0.0.1:{port}", token))
    return STARTED[-1]


def wait_until_healthy(servers: Sequence[Running], within_s: float) -> None:
    """Raises with the end of the log if a server ends or does not answer in time."""
    deadline = time.monotonic() + within_s
    for one in servers:
        client = one.client()
        while not client.healthy():
            if one.process.poll() is not None:
                raise RuntimeError(f"{one.url} ended with status {one.process.returncode}:\n{tail(one.log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{one.url} is not healthy after {within_s:g} s:\n{tail(one.log)}")
            time.sleep(0.5)
        client.close()


@contextmanager
def running(
    folder: Path,
    logs: Path,
    count: int,
    *,
    token: str | None = None,
    transfer: bool = True,
    flags: Sequence[str] = (),
    within_s: float = 500.0,
) -> Iterator[list[Running]]:
    """`count` servers of one model, started side by side; none of their processes outlives the block.

    Their logs are `logs/server_0.log`, ...
    """
    logs.mkdir(parents=True, exist_ok=True)
    servers: list[Running] = []
    try:
        for index in range(count):
            servers.append(start(folder, logs / f"server_{index}.log", token=token, transfer=transfer, flags=flags))
        wait_until_healthy(servers, within_s)
        yield servers
    finally:
        for one in servers:
            one.kill()
            STARTED.remove(one)


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _family(pid: int) -> list[psutil.Process]:
    try:
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
