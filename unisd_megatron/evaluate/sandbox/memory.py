"""How much memory a program's processes can hold together: the kernel limits each alone, and counts no sum without a cgroup."""

from __future__ import annotations

import contextlib
import os


def open_proc() -> int:
    """A descriptor of `/proc` that goes on to show all processes in a file system without one. Not for a program to have."""
    return os.open("/proc", os.O_PATH | os.O_DIRECTORY)


def of_descendants(proc: int) -> int:
    """Bytes of address space of all processes below this one. Not resident memory: a shared mapping that is held for later
    by a process which does not touch it is in nobody's."""
    pages = 0
    waiting = ["self"]  # by this name: the number of this process may be another one in the namespace of `proc`
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended; or this kernel lists no children, which `host.py` says
            pages += int(_read(proc, f"{pid}/statm").split()[0]) if pid != "self" else 0
            waiting += _children(proc, pid)
    return pages * os.sysconf("SC_PAGE_SIZE")


def _children(proc: int, pid: str) -> list[str]:
    threads = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    try:
        return [child for thread in os.listdir(threads) for child in _read(threads, f"{thread}/children").split()]
    finally:
        os.close(threads)


def _read(folder: int, name: str) -> str:
    with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
        return file.read()
