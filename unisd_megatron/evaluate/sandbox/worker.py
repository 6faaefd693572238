"""The untrusted side: runs the program, then does what its tests ask of it. It never sees the tests.

Nothing here protects anything: the program can change all of it, and gains no more than the right to answer as it likes.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from unisd_megatron.evaluate.sandbox import wire

OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "call": lambda function, args, named: function(*args, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def serve(fd: int) -> NoReturn:
    """Answers the messages at `fd`: first `{"code", "wanted", "imports"}`, then `[operation, arguments]`, until the end."""
    side = _Side()
    try:
        wire.write(fd, side.attempt(lambda: side.run(wire.receive(fd))))
        while True:
            operation, arguments = wire.receive(fd)
            wire.write(fd, side.attempt(lambda: OPERATIONS[operation](*side.unpack(arguments))))  # noqa: B023
    except (EOFError, OSError):  # the tests are over
        sys.exit(0)


class _Side:
    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def attempt(self, action: Callable[[], Any]) -> bytes:
        """The message of what the action gives, or of its exception: the names of its classes, and what it says."""
        try:
            return wire.message(["ok", wire.pack(action(), self._refer)])
        except BaseException as error:
            names = [cls.__name__ for cls in type(error).__mro__]
            try:
                text = str(error)
            except Exception:
                text = ""
            return wire.message(["error", names, text[:300]])

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        module = types.ModuleType("answer")
        sys.modules["answer"] = module  # dataclasses and pickling look a class's module up
        exec(compile(job["imports"], "<imports>", "exec"), module.__dict__)  # of the tests: the code may count on them
        exec(compile(job["code"], "<answer>", "exec"), module.__dict__)
        return {name: vars(module)[name] for name in job["wanted"] if name in vars(module)}

    def unpack(self, data: Any) -> Any:
        return wire.unpack(data, lambda one: self._objects[one[1]])

    def _refer(self, value: Any) -> list[Any]:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return ["object", self._numbers[id(value)], type(value).__name__]
