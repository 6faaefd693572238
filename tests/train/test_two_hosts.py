"""Two hosts train one model, TP=2 on each and PP=2 between them. One dies, then the link does; the run is none the worse."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runs import QUICK, STAR, run
from two_hosts import CARD, Host, NoHosts, two_hosts
from unisd_megatron.train import checkpoint
from unisd_megatron.train.metrics import read_metrics
from world import World

pytestmark = pytest.mark.timeout(900)  # three starts of four processes, each of them all imports
ROOT = Path(__file__).parents[2]
FLAGS: dict[str, Any] = {
    **QUICK,
    **STAR,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "token_clip_quantile": 0.9,
    "max_steps": 8,
    "save_steps": 2,
}
TIMEOUT_MINUTES = 0.5  # a busy machine takes seconds for a step
PATIENCE_S = 400.0  # of the test, for all that a start may take on a busy machine
Both = tuple[Host, Host]


@dataclass(frozen=True)
class Stop:
    """How a start of the run came to its end on each host."""

    statuses: list[int]
    logs: list[str]
    left: list[int]  # processes
    complete: str  # the last checkpoint

    def lines(self, host: int) -> list[str]:
        """What the run itself says on a host, beside torchrun."""
        return [line for line in self.logs[host].splitlines() if line.startswith("unisd:")]


@dataclass
class Launch:
    """A start of the run on both hosts, as a user does it: the same command, each with its own number."""

    hosts: Both
    folder: Path
    name: str
    more: dict[str, Any]

    def torchrun(self, number: int, port: int) -> list[str]:
        where = ["--nnodes=2", "--nproc-per-node=2", f"--node-rank={number}", f"--master-port={port}"]
        request = self.folder / f"{self.name}.json"
        request.write_text(json.dumps(FLAGS | {"output_dir": str(self.output)} | self.more))
        run_it = [sys.executable, "-m", "torch.distributed.run", *where, f"--master-addr={self.hosts[0].address}"]
        return [*run_it, "-m", "unisd_megatron", "train", "--config", str(request)]

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def carry_out(self, strike: Callable[[], None] | None = None, after: int = 0) -> Stop:
        """Runs to its end; with `strike`, that happens at some moment of the step after `after` recorded ones."""
        env = {"GLOO_SOCKET_IFNAME": CARD, "NCCL_SOCKET_IFNAME": CARD, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        logs = [self.folder / f"{self.name}.{host.name}.log" for host in self.hosts]
        started = [
            host.start(self.torchrun(number, 29500), log, env)
            for number, (host, log) in enumerate(zip(self.hosts, logs, strict=True))
        ]
        if strike is not None:
            until(lambda: steps_of(self.output) >= after or any(one.poll() is not None for one in started))
            assert all(one.poll() is None for one in started), [log.read_text()[-2000:] for log in logs]
            time.sleep(random.Random(after).random())
            strike()
        until(lambda: all(one.poll() is not None for one in started))
        left = [pid for host in self.hosts for pid in host.processes()]
        complete = [path.name for path in checkpoint.complete(self.output)]
        return Stop([one.returncode for one in started], [log.read_text() for log in logs], left, complete[-1])


def steps_of(output: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len(read_metrics(output))
    return 0


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end, "a host neither went on nor stopped"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(world, 4, tmp_path_factory.mktemp("unbroken") / "run", **FLAGS)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(two_hosts(tmp_path_factory.mktemp("hosts")))
        except NoHosts as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def stops(unbroken: list[Any], hosts: Both, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Stop]]:
    """The run: its second host is killed, then the cable is pulled without a word, then it reaches its end."""
    folder, second = tmp_path_factory.mktemp("two_hosts"), hosts[1]
    resume = {"resume_from_checkpoint": "latest"}
    killed = Launch(hosts, folder, "killed", {}).carry_out(second.kill, after=3)
    short = {**resume, "distributed_timeout_minutes": TIMEOUT_MINUTES}
    cut = Launch(hosts, folder, "cut", short).carry_out(second.unplug, after=5)
    second.plug_in()
    return folder / "run", [killed, cut, Launch(hosts, folder, "last", resume).carry_out()]


def test_a_host_dies(stops: tuple[Path, list[Stop]]) -> None:
    stop = stops[1][0]
    assert stop.statuses == [1, -9] and stop.left == []
    assert_says_it(stop, 0, r"closed|reset|broken pipe")


def test_the_link_goes_silent(stops: tuple[Path, list[Stop]]) -> None:
    stop = stops[1][1]
    assert stop.statuses == [1, 1] and stop.left == []
    for host in (0, 1):
        assert_says_it(stop, host, "Timed out waiting 30000ms")


def assert_says_it(stop: Stop, host: int, cause: str) -> None:
    lines = stop.lines(host)
    assert 1 <= len(lines) <= 2 and "unisd_megatron/" not in stop.logs[host], stop.logs[host]
    for line in lines:
        who = rf"unisd: rank [{2 * host}{2 * host + 1}] on host-{'ab'[host]} lost contact with its peers: "
        assert re.match(who + r".*; \d+ s into step \d; ", line) and re.search(cause, line, re.IGNORECASE), line
        way_on = f"the last complete checkpoint is {stop.complete}; start all hosts again with --resume_from_checkpoint auto"
        assert line.endswith(way_on), line


def test_the_curve_goes_on(stops: tuple[Path, list[Stop]], unbroken: list[dict[str, Any]]) -> None:
    output, (_, _, last) = stops
    assert last.statuses == [0, 0] and last.left == [], last.logs
    assert "resumed from" in last.logs[0] and last.complete == "step_000008"
    assert numbers(read_metrics(output)) == numbers(unbroken)


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "tokens_per_second", "memory/"))} for row in rows]
