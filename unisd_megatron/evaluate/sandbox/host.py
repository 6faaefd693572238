"""The sandbox, as the rest of the program sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unisd_megatron.errors import ConfigError
from unisd_megatron.evaluate.sandbox import jail, wire
from unisd_megatron.evaluate.sandbox.limits import Limits, Outcome

if TYPE_CHECKING:  # a zygote imports this package too, and has to stay lean
    from unisd_megatron.data.task import Program

_ROOT = Path(__file__).resolve().parents[3]
# The path is taken away again before any program runs: it may be a folder of installed packages.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from unisd_megatron.evaluate.sandbox.zygote import main; "
_START += "sys.path.pop(0); main(int(sys.argv[2]), sys.argv[3])"
_PATIENCE_S = 60.0  # beyond a program's own wall time, before its zygote is given up

_NAMESPACES = "namespaces of its own (user, mount, PID, network, IPC), a read-only file system without this machine's files"
_SYSTEM_CALLS = "a filter of system calls"
_MEMORY_OF_ALL = "a limit on the memory of all processes together"
_ALWAYS = "a process of its own without this one's environment, limits on CPU and wall time, memory, file size and output"

# Each raises inside the sandbox, or is not what it should be, where a protection does not hold.
_PROBES: Mapping[str, tuple[str, str]] = {
    "no network": (
        "import socket\ndef f():\n try: socket.socket(socket.AF_INET)\n except OSError: return 1",
        "assert f() == 1",
    ),
    "no files of this machine": (
        "import os\ndef f(): return os.path.exists('/etc/passwd') or os.path.exists('/proc/1')",
        "assert f() is False",
    ),
    "no writing outside the scratch folder": (
        "import os\ndef f():\n try: os.mkdir('/new')\n except OSError as e: return e.errno",
        "assert f() == 30",
    ),
    "no rights of the superuser": ("import os\ndef f(): return os.geteuid()", "assert f() != 0"),
    "a limit on processes": (
        "import os, time\ndef f():\n for n in range($MANY):\n  try: pid = os.fork()\n  except OSError: return n\n"
        "  if not pid: time.sleep(60)",
        "assert f() < $MANY",
    ),
}


class Sandbox:
    """Runs programs as `docs/sandbox.md` describes.

    Raises `ConfigError` where the machine cannot provide all of it, unless `unsafe`: then what there is protects.
    """

    def __init__(self, limits: Limits | None = None, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self.missing: list[str] = []
        """What this machine does not provide, with the reason; empty where it provides everything."""
        self.protections = [_ALWAYS]
        """What programs are kept by."""
        if not sys.platform.startswith("linux"):
            raise ConfigError(f"programs can be run on Linux only, not on {sys.platform}; score a task that runs none")
        self._system_calls = self._offers(_SYSTEM_CALLS, namespaces=False, system_calls=True)
        self._namespaces = self._offers(_NAMESPACES, namespaces=True, system_calls=self._system_calls)
        # Where the kernel does not list a process's children, the keeper sees none of them.
        (self.protections if Path("/proc/thread-self/children").exists() else self.missing).append(_MEMORY_OF_ALL)
        self._probe()
        if self.missing and not unsafe:
            raise ConfigError(
                f"this machine cannot lock programs in: it lacks {'; '.join(self.missing)}; "
                "run where user namespaces are allowed, or pass --unsafe to run them without"
            )

    def run(self, program: Program) -> Outcome:
        """What becomes of one program."""
        return self.run_all([program], workers=1)[0]

    def run_all(
        self, programs: Sequence[Program], workers: int, progress: Callable[[int], object] | None = None
    ) -> list[Outcome]:
        """The outcome of each, in order; `workers` at a time. `progress` is told how many are done, from this thread."""
        if workers < 1:
            raise ConfigError(f"{workers} sandbox workers cannot run anything; use 1 or more")
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()
        for number in range(len(programs)):
            waiting.put(number)
        for _ in range(min(workers, len(programs))):
            threading.Thread(target=self._serve, args=(programs, waiting, done), daemon=True).start()
        outcomes: dict[int, Outcome] = {}
        try:
            while len(outcomes) < len(programs):
                number, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                outcomes[number] = outcome
                if progress is not None:
                    progress(len(outcomes))
        finally:
            with contextlib.suppress(queue.Empty):  # an interrupt: the threads stop after the program they are at
                while True:
                    waiting.get_nowait()
        return [outcomes[number] for number in range(len(programs))]

    def _serve(
        self,
        programs: Sequence[Program],
        waiting: queue.SimpleQueue[int],
        done: queue.SimpleQueue[tuple[int, Outcome | BaseException]],
    ) -> None:
        zygote = None
        number = -1
        try:
            with contextlib.suppress(queue.Empty):
                while True:
                    number = waiting.get_nowait()
                    zygote = zygote or _Zygote(self.limits, self._namespaces, self._system_calls)
                    began = time.monotonic()
                    outcome = zygote.run(programs[number].code, programs[number].tests)
                    if outcome is None:
                        zygote.close()
                        seconds = time.monotonic() - began
                        zygote, outcome = None, Outcome(False, "killed", "it ended the process that watched it", seconds)
                    done.put((number, outcome))
        except BaseException as error:
            done.put((number, error))
        finally:
            if zygote is not None:
                zygote.close()

    def _offers(self, what: str, *, namespaces: bool, system_calls: bool) -> bool:
        """Whether a program runs under this protection here; found by running one."""
        try:
            zygote = _Zygote(self.limits, namespaces, system_calls)
        except OSError as error:
            self.missing.append(f"{what} ({error})")
            return False
        try:
            outcome = zygote.run("def f(): return 1", "assert f() == 1")
        finally:
            zygote.close()
        if outcome is None or not outcome.passed:
            self.missing.append(f"{what} (a trivial program does not run with it: {outcome and outcome.detail})")
            return False
        self.protections.append(what)
        return True

    def _probe(self) -> None:
        """Tries, from inside, what must be impossible."""
        many = str(self.limits.processes + 20)
        zygote = _Zygote(self.limits, self._namespaces, self._system_calls)
        try:
            for name, (code, tests) in _PROBES.items():
                outcome = zygote.run(code.replace("$MANY", many), tests.replace("$MANY", many))
                (self.protections if outcome is not None and outcome.passed else self.missing).append(name)
        finally:
            zygote.close()


class _Zygote:
    """A zygote process. `OSError` with the kernel's reason where it cannot provide what is asked."""

    def __init__(self, limits: Limits, namespaces: bool, system_calls: bool) -> None:
        self._scratch = None if namespaces else tempfile.mkdtemp(prefix="sandbox-")
        if self._scratch:
            Path(self._scratch).chmod(0o777)
        settings = {
            "limits": dataclasses.asdict(limits),
            "namespaces": namespaces,
            "system_calls": system_calls,
            "scratch": self._scratch or jail.SCRATCH,
        }
        self._control, theirs = socket.socketpair()
        self._patience(_PATIENCE_S)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-B",
                "-W",
                "ignore",
                "-c",
                _START,
                str(_ROOT),
                str(theirs.fileno()),
                json.dumps(settings),
            ],
            env={},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # an interrupt at the keyboard is for the host to deal with
        )
        theirs.close()
        try:
            self._begin()
            self._patience(limits.wall_s + _PATIENCE_S)
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        while (sign := self._control.recv(1)) == b"m":
            try:
                jail.map_ids(self._process.pid)
            except OSError as error:
                raise OSError(f"mapping ids: {error.strerror}") from error
            self._control.sendall(b"m")
        if sign != b"r":
            assert self._process.stderr is not None
            raise OSError(f"its process ended: {self._process.stderr.read().decode(errors='replace').strip()[-300:]}")
        refused = wire.receive(self._control.fileno())
        if refused is not None:
            raise OSError(refused)

    def _patience(self, seconds: float) -> None:
        """How long to wait for what the zygote says. Not `settimeout`, which `os.read` knows nothing of."""
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), 0))

    def run(self, code: str, tests: str) -> Outcome | None:
        """The outcome; None when there is none because the zygote has ended."""
        try:
            wire.send(self._control.fileno(), {"code": code, "tests": tests})
            answer = wire.receive(self._control.fileno())
        except (OSError, EOFError):
            return None
        return Outcome(answer["kind"] == "passed", answer["kind"], answer["detail"], answer["seconds"])

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
