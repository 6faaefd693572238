"""Runs the checks one after the other and keeps the page up to date, so that a page is there whatever happens."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from unisd_megatron.errors import ConfigError
from unisd_megatron.selftest import machine as machines
from unisd_megatron.selftest import page
from unisd_megatron.selftest.checks import CHECKS, DEVICES, Check, Work, reason
from unisd_megatron.selftest.launch import Ended, run
from unisd_megatron.selftest.machine import Machine
from unisd_megatron.selftest.page import FAILED, HELD, NOT_RUN, Row, Surroundings


def select(names: Sequence[str] | None) -> list[Check]:
    """The checks of these names, or of the groups before their dots; all if None. `ConfigError` for a name that is none."""
    known = {check.name for check in CHECKS} | {check.name.split(".")[0] for check in CHECKS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--only {name}: no such check; use some of {', '.join(check.name for check in CHECKS)}")
    return [check for check in CHECKS if not names or {check.name, check.name.split(".")[0]} & set(names)]


def selftest(folder: Path, names: Sequence[str] | None, quick: bool, say: Callable[[str], None]) -> bool:
    """Whether every check that ran held. Writes the page, and the output of every program under `logs`, into `folder`.

    Raises `ConfigError` for an unknown name or a folder that has something in it.
    """
    chosen = select(names)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output_dir {folder} exists already; remove it or name another")
    folder = folder.absolute()
    (folder / "logs").mkdir(parents=True)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    surroundings = Surroundings(
        machines.describe(folder), machines.settings_of_environment(), machines.listed_gpus(), machines.nvidia_smi("topo", "-m")
    )
    machine, rows = Machine(), list[Row]()
    for check in [DEVICES, *(one for one in chosen if one is not DEVICES)]:
        row = _carry_out(check, machine, folder, quick)
        if check is DEVICES:  # what it found decides about the others
            machine = machines.machine_of(row.numbers or None)
            libraries = {f"torch's {name}": str(row.numbers[name]) for name in ("CUDA", "cuDNN", "NCCL") if name in row.numbers}
            surroundings = dataclasses.replace(surroundings, facts={**surroundings.facts, **libraries})
        rows.append(row)
        page.write(folder, rows, surroundings, when, complete=False)
        say(f"{row.name:20} {row.verdict:8} {row.seconds:6.1f} s  {row.found}")
    page.write(folder, rows, surroundings, when, complete=True)
    say(f"{page.summary(rows)}\npage: {folder / 'selftest.md'}")
    return all(row.verdict != FAILED for row in rows)


def _carry_out(check: Check, machine: Machine, folder: Path, quick: bool) -> Row:
    why_not = reason(check, machine, quick)
    if why_not:
        return Row(check.name, check.shows, NOT_RUN, why_not)
    work = Work(machine, folder / "work" / check.name, quick)
    work.folder.mkdir(parents=True)
    jobs, ended = check.jobs(work), list[Ended]()
    for number, job in enumerate(jobs):
        ended.append(run(job, folder / "logs" / f"{check.name}.{number}.log", work.folder, check.limit_s))
        if ended[-1].status != 0:
            break
    row = _judge(check, work, ended)
    if row.verdict == HELD:
        shutil.rmtree(work.folder)
        return row
    commands = [job.shown() for job in jobs[: len(ended)]]
    return dataclasses.replace(row, commands=commands, tail=page.tail(ended[-1].output))


def _judge(check: Check, work: Work, ended: Sequence[Ended]) -> Row:
    """A check holds if all its programs ended well and its reading says so; a broken reading is told, never passed."""
    seconds, last = sum(one.seconds for one in ended), ended[-1]
    said, numbers, holds = "", {}, False
    try:
        found = check.read(work.folder, [one.output for one in ended])
        said, numbers, holds = found.found, found.numbers, found.holds
    except (OSError, ValueError, LookupError, ArithmeticError, StopIteration, TypeError) as error:
        if last.status == 0:
            said = f"its output could not be read ({type(error).__name__}: {error})"
    if last.status is None:
        return Row(check.name, check.shows, FAILED, f"did not end in {check.limit_s:g} s; {said or _last_words(last)}", seconds)
    if last.status != 0:
        return Row(check.name, check.shows, FAILED, f"exit status {last.status}; {said or _last_words(last)}", seconds, numbers)
    return Row(check.name, check.shows, HELD if holds else FAILED, said, seconds, numbers)


def _last_words(ended: Ended) -> str:
    """The program's own error line, else the last line."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("unisd")]
    return (own or lines or ["printed nothing"])[-1]
