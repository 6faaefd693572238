"""A small process that makes ready processes for programs. Started by `host.py` as a lean Python: no torch, no environment.

For each program three processes are forked: the keeper, which watches the time and the output; the judge, which runs the
tests; the worker, which runs the program. The judge is the first process of a PID namespace and the worker of another one
below it, so that the program sees no process that it did not start, and nothing of it outlives the judge.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from unisd_megatron.evaluate.sandbox import jail, judge, kernel, memory, wire, worker
from unisd_megatron.evaluate.sandbox.limits import Limits

_LOOK_S = 0.1  # between two looks at the memory of all processes


@dataclass(frozen=True)
class Settings:
    """What the host asks of a zygote."""

    limits: Limits
    namespaces: bool
    system_calls: bool
    scratch: str

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        return cls(**{**fields, "limits": Limits(**fields["limits"])})


def main(control_fd: int, settings: str) -> None:
    """Says at `control_fd` what it could not provide, then answers each job there by an outcome, until its end."""
    control = socket.socket(fileno=control_fd)
    wanted = Settings.from_json(settings)
    proc = memory.open_proc()
    if wanted.namespaces:
        try:
            jail.enter(control)
        except OSError as error:
            control.sendall(b"r")
            wire.send(control_fd, error.strerror or str(error))
            return
    control.sendall(b"r")
    wire.send(control_fd, None)
    while control.recv(1, socket.MSG_PEEK):  # the job itself is read by the keeper, when the worker is already there
        keeper = os.fork()
        if keeper == 0:
            _keep(control_fd, proc, wanted)
        if os.waitpid(keeper, 0)[1] != 0:  # it gave no outcome, and never will: the end of this process says so at once
            return


def _keep(control: int, proc: int, settings: Settings) -> NoReturn:
    status = 1
    try:
        kernel.die_with_parent()
        if settings.namespaces:
            jail.new_scratch(settings.limits)
        else:
            kernel.adopt_orphans()
        job_in, job_out = os.pipe()
        result_in, result_out = os.pipe()
        output_in, output_out = os.pipe()
        first = os.fork()
        if first == 0:
            for fd in (control, proc, job_out, result_in, output_in):
                os.close(fd)
            _judge(job_in, result_out, output_out, settings)
        for fd in (job_in, result_out, output_out):
            os.close(fd)
        began = time.monotonic()
        job = wire.receive(control)
        kind, detail = _watch(first, job, (job_out, result_in, output_in, control, proc), settings.limits)
        _end_all(first)
        wire.send(control, {"kind": kind, "detail": detail, "seconds": time.monotonic() - began})
        status = 0
    finally:
        os._exit(status)


def _watch(first: int, job: Any, fds: tuple[int, int, int, int, int], limits: Limits) -> tuple[str, str]:
    """`(kind, detail)`: what the judge says, or why it was not waited for."""
    job_out, result_in, output_in, control, proc = fds
    deadline = time.monotonic() + limits.wall_s
    next_look = time.monotonic() + _LOOK_S
    written = 0
    try:
        wire.send(job_out, job)
    except OSError:
        return "killed", "the process of the tests could not be started"
    watched = [result_in, output_in, control]
    while True:
        ready, _, _ = select.select(watched, [], [], max(0.0, min(deadline, next_look) - time.monotonic()))
        if result_in in ready:
            try:
                kind, detail = wire.receive(result_in)
            except (EOFError, ValueError):
                return "killed", "the process of the tests was ended"
            return kind, detail
        if control in ready:  # nobody waits for the outcome any more
            os.kill(first, signal.SIGKILL)
            os._exit(1)
        if output_in in ready:
            count = len(os.read(output_in, 1 << 16))
            written += count
            if written > limits.output_kib * 1024:
                return "output", f"more than {limits.output_kib} KiB were written"
            if count == 0:
                watched.remove(output_in)
        if time.monotonic() >= next_look:
            if memory.of_descendants(proc) > limits.memory_of_all_mib << 20:
                return "memory", f"more than {limits.memory_of_all_mib} MiB in all processes together"
            next_look = time.monotonic() + _LOOK_S
        if time.monotonic() >= deadline:
            return "timeout", f"{limits.wall_s:g} s of wall time"


def _end_all(first: int) -> None:
    """The judge, and with it its namespace; without one, all that is left of the program."""
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as children:
                orphans = [int(pid) for pid in children.read().split()]
        except OSError:  # inside the namespaces there is no /proc, and nothing left to look for
            return
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _judge(job_in: int, result_out: int, output: int, settings: Settings) -> NoReturn:
    try:
        limits = settings.limits
        if settings.namespaces:
            jail.new_processes()
        jail.give_up_rights(limits, settings.namespaces, settings.system_calls)
        here, there = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _work(there.fileno(), output, settings.scratch)
        there.close()
        os.close(output)
        job = wire.receive(job_in)
        longest = limits.output_kib * 1024
        found = judge.verdict(here.fileno(), pid, job["code"], job["tests"], longest, limits.cpu_s)
        wire.send(result_out, found)
    finally:
        os._exit(0)


def _work(link: int, output: int, scratch: str) -> NoReturn:
    try:
        os.setsid()  # signals to its own group, which the walls of a PID namespace let through, must not reach the keeper
        kernel.die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for fd, own in ((null, 0), (output, 1), (output, 2), (link, 3)):
            os.dup2(fd, own) if fd != own else os.set_inheritable(fd, True)
        os.closerange(4, 1024)
        os.chdir(scratch)
        os.environ.update(HOME=scratch, TMPDIR=scratch)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        worker.serve(3)
    finally:
        os._exit(0)
