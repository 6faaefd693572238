"""What a program may take, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from unisd_megatron.errors import ConfigError

KINDS = (
    "passed",
    "failed assertion",
    "exception",
    "syntax error",
    "timeout",
    "memory",
    "output",
    "exited early",
    "killed",
    "broken tests",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Per program."""

    cpu_s: int = 10
    """CPU time of each process; 10 s as in the authors' code, but of CPU, so that a busy machine fails nobody."""

    wall_s: float = 30.0
    """From the first line of the program to the end of its tests."""

    memory_mib: int = 512
    """Address space of each process. All processes together, with that of the tests, may have twice as much."""

    processes: int = 16
    """Processes and threads at a time."""

    scratch_mib: int = 32
    """All files of the scratch folder together."""

    file_mib: int = 16
    """Each file."""

    output_kib: int = 1024
    """What is written to standard output and error, and each value that the tests are given."""

    @property
    def memory_of_all_mib(self) -> int:
        """Two processes' worth, so that a program of one process never meets it: that of the tests is the other."""
        return 2 * self.memory_mib

    def __post_init__(self) -> None:
        least = {"processes": 1, "memory_mib": 128}  # the interpreter itself needs 100 MiB of addresses
        for name in self.__slots__:
            if getattr(self, name) < least.get(name, 0) or getattr(self, name) <= 0:
                raise ConfigError(
                    f"sandbox limit {name} is {getattr(self, name)}; use {least.get(name, 'more than 0')} or more"
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    passed: bool
    kind: str
    """One of `KINDS`; "passed" exactly when `passed`."""

    detail: str
    """What the failure was, in one line; empty when passed."""

    seconds: float
    """Wall time from its start to its end."""
