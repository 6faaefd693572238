"""Nothing that a program does lets it pass unearned, reaches the host, or outlasts its time."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

from hostile import HONEST, HOSTILE, TESTS
from sandboxes import sandbox_or_skip
from unisd_megatron.data.task import Program
from unisd_megatron.evaluate.sandbox import Limits, Outcome, Sandbox

LIMITS = Limits(cpu_s=1, wall_s=5.0, memory_mib=256, processes=8, scratch_mib=16, file_mib=8, output_kib=256)
EXPECTED = {
    "memory bomb": {"memory"},
    "many processes that each hold what one may": {"memory"},
    "shared memory that is in no process's pages": {"memory"},
    "killing the group": {"exception"},  # its first process is one that such signals do not end
    "stopping the group": {"exception"},
    "endless loop": {"timeout"},
    "endless loop that catches everything": {"timeout"},
    "endless sleep": {"timeout"},
    "endless loop in the function": {"timeout"},
    "endless output": {"output"},
    "endless output to standard error": {"output"},
    "huge file": {"exception"},
    "huge answer": {"output", "memory"},
    "crash": {"killed"},
    "sys.exit": {"exited early"},
    "sys.exit in the function": {"exited early"},
    "os._exit before the tests": {"exited early"},
    "os._exit in the function": {"exited early"},
    "an end at exit": {"exited early"},
    "an object that equals everything": {"failed assertion"},
    "a number that equals everything": {"failed assertion"},
    "a patched assertion": {"failed assertion"},
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip(LIMITS)


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """All run once, several at a time; then the host is looked at."""
    canary = tmp_path_factory.mktemp("host") / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    libraries = Path(os.__file__).stat()
    os.environ["UNISD_SECRET"] = "the secret"
    name = f"hostile-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        listener.setblocking(False)
        abstract.setblocking(False)
        marks = {"CANARY": canary, "PID": os.getpid(), "PORT": listener.getsockname()[1], "SOCKET": name}
        codes = [Template(code).safe_substitute(marks) for code in HOSTILE.values()]
        try:
            found = sandbox.run_all([Program(code, TESTS) for code in codes], workers=6)
        finally:
            del os.environ["UNISD_SECRET"]
        for door in (listener, abstract):
            with pytest.raises(BlockingIOError):  # nobody is at it
                door.accept()
    yield dict(zip(HOSTILE, found, strict=True))
    assert canary.read_text() == "alive" and Path(os.__file__).stat().st_mtime == libraries.st_mtime


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_program_passes_or_outlasts_its_time(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert not outcome.passed and outcome.kind != "broken tests", outcome
    assert outcome.kind in EXPECTED.get(name, {outcome.kind}), outcome
    assert outcome.seconds < LIMITS.wall_s + 30  # generous for a busy machine; a hang is what it must not be


def test_nothing_of_them_is_left(sandbox: Sandbox, outcomes: dict[str, Outcome]) -> None:
    """Neither daemons nor the sandbox's own processes; and honest programs still pass."""
    assert sandbox.run(Program(HONEST, TESTS)).passed
    deadline = time.monotonic() + 20
    while (left := descendants_and_daemons()) and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed process needs a moment to be gone
    assert not left


def descendants_and_daemons() -> list[str]:
    """Command names of processes that belong to sandboxes of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        ours = b"sandbox.zygote" in command and parent == os.getpid()
        if name == "hostile-daemon" or ours:
            found.append(f"{folder.name} {name}")
    return found


def test_a_program_never_meets_what_another_one_left(sandbox: Sandbox) -> None:
    leaves = Program("open('note', 'w').write('here')\ndef f(x): return x * x", TESTS)
    finds = Program("import os\ndef f(x): return x * x if os.path.exists('note') else None", TESTS)
    first, second = sandbox.run_all([leaves, finds], workers=1)
    assert first.passed and second.kind == "failed assertion"
