"""The trusted side: runs the tests, in a process that the program cannot reach, and asks the program only for values.

What the tests use of the program is called over a pipe (`wire.py`). Comparisons, assertions and the end of the tests happen
here, with this process's own builtins, so that the program can be right only by answering rightly.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import os
import sys
import time
import traceback
import types
from collections.abc import Iterator
from typing import Any

from unisd_megatron.evaluate.sandbox import wire

_TESTS = "<tests>"
_LONGEST = 200  # characters of a detail


class WorkerGone(BaseException):
    """The program's process has ended, or says what no program says. Not an `Exception`: tests must not go on without it."""


class ProgramError(Exception):
    """An exception of the program that is not one of Python's own."""


def verdict(fd: int, worker: int, code: str, tests: str, longest_value: int, cpu_s: int) -> tuple[str, str]:
    """`(kind, detail)` of the program `code`, which `worker`, a child of this process, runs and answers for at `fd`."""
    link = _Link(fd, longest_value)
    try:
        tree = ast.parse(tests, _TESTS)
    except (SyntaxError, ValueError) as error:
        return "broken tests", str(error)
    try:
        _run(link, tree, code)
    except BaseException as error:
        if not link.broken:
            return _kind(error, link), _short(f"{_text(error)}{_line(error, tests)}")
    if link.broken == "gone":
        return _end(worker, cpu_s)
    return ("output", "an answer that is too long") if link.broken else ("passed", "")


def _run(link: _Link, tree: ast.Module, code: str) -> None:
    imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    # No `__builtins__`: what the tests' builtins are is not the program's to say.
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not node.id.startswith("__")}
    modules = _modules(tree)
    job = {"code": code, "wanted": sorted(used - modules.keys()), "imports": ast.unparse(ast.Module(imports, []))}
    offered = link.start(job)
    if not isinstance(offered, dict):
        raise WorkerGone
    # A program that calls its function `sum` is tested by `sum`. But where the tests call anything else of the program, a
    # builtin's name means the builtin: a `set` that makes all things equal is not what they are about.
    offered = {name: offered[name] for name in job["wanted"] if name in offered}
    own = {name: value for name, value in offered.items() if not hasattr(builtins, name)}
    namespace = {"__name__": "tests", **modules, **(own or offered)}
    link.started = True
    exec(compile(tree, _TESTS, "exec"), namespace)


def _modules(tree: ast.Module) -> dict[str, types.ModuleType]:
    """The standard library's modules that the tests use by attributes alone, and do not say where from: `math.isclose(...)`.

    They are not the program's to say either. A name whose module lacks what is used of it is something else: it may be.
    """
    attributes: dict[str, set[str]] = {}
    owners = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, set()).add(node.attr)
            owners.add(node.value)
    otherwise = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in owners}
    found = {}
    for name in (attributes.keys() & sys.stdlib_module_names) - otherwise:
        with contextlib.suppress(ImportError):  # a module that this Python was built without
            module = importlib.import_module(name)
            if all(hasattr(module, one) for one in attributes[name]):
                found[name] = module
    return found


class _Link:
    """The program, as seen from the tests."""

    def __init__(self, fd: int, longest_value: int) -> None:
        self._fd = fd
        self._longest_value = longest_value
        self._objects: dict[int, Object] = {}
        self.started = False
        self.broken: str | None = None
        self.raised: BaseException | None = None
        """The last exception that came from the program."""

    def start(self, job: dict[str, Any]) -> Any:
        return self._exchange(job)

    def ask(self, operation: str, *arguments: Any) -> Any:
        return self._exchange([operation, wire.pack(arguments, _refer)])

    def _exchange(self, message: Any) -> Any:
        if self.broken:
            raise WorkerGone
        try:
            wire.send(self._fd, message)
            what, *rest = wire.receive(self._fd, self._longest_value)
            if what == "ok":
                return wire.unpack(rest[0], self._resolve)
            self.raised = _exception([str(name) for name in rest[0]], str(rest[1]))
        except wire.TooLong:
            self.broken = "too long"
            raise WorkerGone from None
        except Exception:  # the end of the pipe, or not a message: the program wrote into it
            self.broken = "gone"
            raise WorkerGone from None
        raise self.raised

    def _resolve(self, reference: list[Any]) -> Any:
        kind, what, *_ = reference
        if kind == "object" and type(what) is int:
            return self._objects.setdefault(what, Object(self, what))
        if kind == "module" and what in sys.stdlib_module_names:
            return importlib.import_module(what)
        raise ValueError("not a reference")


class Object:
    """Something of the program that is no plain value: a function, a class, an instance, a generator, a module.

    It equals itself alone, whatever it says.
    """

    __slots__ = ("_link", "_number")

    def __init__(self, link: _Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._link.ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.ask("setitem", self, key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(self._link.ask("contains", self, item))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._link.ask("iter", self)
        while True:
            try:
                yield self._link.ask("next", iterator)
            except StopIteration:
                return

    def __len__(self) -> int:
        return self._link.ask("len", self)

    def __bool__(self) -> bool:
        return self._link.ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._link.ask("str", self))

    def __repr__(self) -> str:
        return str(self._link.ask("repr", self))

    def __lt__(self, other: Any) -> bool:
        return self._link.ask("lt", self, other) is True

    def __le__(self, other: Any) -> bool:
        return self._link.ask("le", self, other) is True

    def __gt__(self, other: Any) -> bool:
        return self._link.ask("gt", self, other) is True

    def __ge__(self, other: Any) -> bool:
        return self._link.ask("ge", self, other) is True


def _refer(value: Any) -> list[Any]:
    if type(value) is Object:
        return ["object", object.__getattribute__(value, "_number")]
    raise TypeError(f"the tests give the program a {type(value).__name__}, which cannot be passed to it")


def _exception(names: list[str], text: str) -> BaseException:
    """The same exception here, or of the nearest class that Python has; `SystemExit` and its kind as `ProgramError`."""
    for name in names:
        cls = getattr(builtins, name, None)
        if isinstance(cls, type) and issubclass(cls, Exception):
            try:
                return cls(text) if cls is not Exception else ProgramError(names[0], text)
            except TypeError:  # such as UnicodeDecodeError, which is not made of one text
                continue
    return ProgramError(names[0], text)


def _kind(error: BaseException, link: _Link) -> str:
    if isinstance(error, ProgramError) and error.args[0] == "SystemExit":
        return "exited early"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SyntaxError) and not link.started:
        return "syntax error"
    return "failed assertion" if isinstance(error, AssertionError) and error is not link.raised else "exception"


def _text(error: BaseException) -> str:
    if isinstance(error, ProgramError):
        return f"{error.args[0]}: {error.args[1]}".removesuffix(": ")
    return f"{type(error).__name__}: {error}" if error.args else type(error).__name__


def _line(error: BaseException, tests: str) -> str:
    """Where in the tests, and what stands there; nothing where they had not begun."""
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TESTS]
    lines = tests.splitlines()
    if not numbers or numbers[-1] is None or numbers[-1] > len(lines):
        return ""
    return f", in test line {numbers[-1]}: {lines[numbers[-1] - 1].strip()}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _end(worker: int, cpu_s: int) -> tuple[str, str]:
    """How the program's process ended, or that it only stopped answering."""
    ended = _ended(worker)
    if ended is None:
        return "exited early", "its process stopped answering before its tests were over"
    status, cpu_time = ended
    if cpu_time >= cpu_s:
        return "timeout", f"{cpu_s} s of CPU time"
    if os.WIFSIGNALED(status):
        return "killed", f"by signal {os.WTERMSIG(status)}"
    return "exited early", f"its process ended with status {os.WEXITSTATUS(status)} before its tests were over"


def _ended(worker: int) -> tuple[int, float] | None:
    """Its exit status and CPU seconds. The end of its pipe comes a moment before its own; None when there is no end."""
    for _ in range(100):
        pid, status, used = os.wait4(worker, os.WNOHANG)
        if pid:
            return status, used.ru_utime + used.ru_stime
        time.sleep(0.01)
    return None
