"""A distributed world that costs milliseconds: forked gloo workers that live as long as the test session.

    results = world.run(2, fn, *args)      # fn(rank, group, *args) on ranks 0 and 1; results in rank order

A spawned world costs 15-30 s per test (each process imports torch), a forked one 0.2 s, this one the price of a message. Three
conditions make forking safe and cheap: everything heavy is imported before the fork, each worker uses one thread, and workers
are forked by a nursery, a process forked before any test has run, which does nothing else. A pool that replaces a broken one
is therefore as clean as the first: the parent has by then run tests of its own, and process groups, threads and CUDA do not
survive a fork (a worker that inherits the parent's old gloo group dies when it drops it).

Inside a call the *default* process group has exactly `size` ranks, so that code which asks for the whole world (Megatron's
parallel_state) sees the world it is meant to see; `group` is that same group. It ends with the call, and all groups made in it:
every gloo group has a thread of its own that wakes up a hundred times a second, and a suite makes thousands.
An exception in a worker is raised again in the parent, with the worker's traceback as its cause. A worker that does not answer
in time, or fails while others wait for it, costs the pool: it is killed, and the next call gets a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from typing import Any

import psutil
import torch
import torch._dynamo  # imported by the first optimizer or checkpoint anyway; seconds per worker if not done before the fork
import torch.distributed as dist

GRACE_S = 0.2  # how long the other ranks may take to answer once one rank has failed; they may wait for it for ever
MOST_THREADS = 30  # of a worker between calls; one that has trained a dense model keeps about ten


class WorkerError(RuntimeError):
    """A worker died, hung, or raised something that cannot be sent to the parent."""


class RemoteTraceback(Exception):
    """The traceback of a worker, as the cause of the exception raised in the parent."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class World:
    """Up to `size` workers. `preload` names modules to import before forking, skipped where they are not installed."""

    def __init__(self, size: int = 4, *, preload: Sequence[str] = (), timeout_s: float = 60.0) -> None:
        self.size = size
        self.preload = tuple(preload)
        self.timeout_s = timeout_s
        self._workers: list[tuple[int, Connection]] = []  # process id and pipe
        self._leaving: list[Connection] = []  # of workers that have answered and still end their groups
        self._nursery: tuple[int, Connection] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def start(self) -> None:
        """Forks the nursery. To be called while this process is still clean; the first `run` does it if nobody did."""
        if self._nursery is not None:
            return
        for name in self.preload:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)
        ours, theirs = Pipe()
        process = os.fork()  # not multiprocessing's: its children are joined at exit, and a daemon may have none of its own
        if process == 0:
            try:
                ours.close()
                _nurse(theirs)
            finally:
                os._exit(0)  # what the parent registered to run at its exit is not ours to run
        theirs.close()
        self._nursery = (process, ours)
        atexit.register(self.shut_down)

    def _fork(self) -> None:
        """Has the nursery fork a pool."""
        self.start()
        assert self._nursery is not None
        self._folder = tempfile.TemporaryDirectory(prefix="world-", ignore_cleanup_errors=True)
        with Listener(os.path.join(self._folder.name, "hello"), "AF_UNIX", backlog=self.size) as listener:
            self._nursery[1].send((self.size, self._folder.name, self.timeout_s))
            hello = {}
            for _ in range(self.size):
                connection = listener.accept()
                rank, process = connection.recv()
                hello[rank] = (process, connection)
        self._workers = [hello[rank] for rank in range(self.size)]

    def run(self, size: int, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """`fn(rank, group, *args)` on the first `size` ranks; what each returned. fn is a function at module level."""
        if not 1 <= size <= self.size:
            raise ValueError(f"this world has 1..{self.size} ranks, asked for {size}")
        if self._is_worn():
            self.close()
        if not self._workers:
            self._fork()
        self._calls += 1
        message = pickle.dumps((size, f"store-{self._calls}", fn, args))
        members = self._workers[:size]
        try:
            for _, connection in members:
                connection.send_bytes(message)
            answers = self._collect(members, time.monotonic() + (timeout_s or self.timeout_s))
        except BaseException:  # interrupted: answers to this call must not be read as answers to the next
            self.close()
            raise
        missing = [rank for rank in range(size) if rank not in answers]
        failures = {rank: answer[1:] for rank, answer in answers.items() if answer[0] == "error"}  # first come first
        if missing or failures:
            # Even if every rank answered: after a failure nobody knows which collectives are half done.
            self.close()
        if failures:
            rank, (error, text) = next(iter(failures.items()))
            raise error from RemoteTraceback(f"rank {rank} of {size}:\n{text}")
        if missing:
            raise WorkerError(f"{getattr(fn, '__name__', fn)}: no answer in time from rank(s) {missing} of {size}; pool killed")
        self._leaving = [connection for _, connection in members]
        return [answers[rank][1] for rank in range(size)]

    def _is_worn(self) -> bool:
        """Whether workers have kept groups of earlier calls: each of their threads wakes a hundred times a second.

        A mixture of experts that was trained is held by hooks of its own and holds its groups.
        """
        try:
            return any(not one.poll(self.timeout_s) or one.recv() > MOST_THREADS for one in self._leaving)
        except EOFError:
            return True
        finally:
            self._leaving = []

    def _collect(self, members: list[tuple[Any, Connection]], deadline: float) -> dict[int, tuple[Any, ...]]:
        answers: dict[int, tuple[Any, ...]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(members)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("error", WorkerError(f"rank {rank} died"), "no traceback: the process is gone")
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def close(self) -> None:
        """Kills the workers; the next `run` forks new ones. Does nothing without workers."""
        for process, connection in self._workers:
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # its children too, such as Megatron's checkpoint writer
        self._workers, self._leaving = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def shut_down(self) -> None:
        """Ends the workers and the nursery."""
        self.close()
        if self._nursery is not None:
            process, connection = self._nursery
            connection.close()
            os.waitpid(process, 0)
            self._nursery = None


def _nurse(connection: Connection) -> None:
    """Forks a pool for each message, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # killed workers leave no zombies
    while True:
        try:
            size, folder, timeout_s = connection.recv()
        except EOFError:
            return
        for rank in range(size):
            if os.fork() == 0:
                connection.close()  # else the nursery's pipe would outlive the parent
                try:
                    _serve(rank, folder, timeout_s)
                finally:
                    os._exit(0)


def _serve(rank: int, folder: str, timeout_s: float) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = Client(os.path.join(folder, "hello"), "AF_UNIX")
    connection.send((rank, os.getpid()))
    with open(os.path.join(folder, f"rank{rank}.log"), "ab", buffering=0) as log:  # progress bars are not the suite's output
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)  # an inherited OpenMP pool has no threads behind it
    while True:
        try:
            size, store, fn, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            _join(rank, size, os.path.join(folder, store), timeout_s)
            answer: tuple[Any, ...] = ("ok", fn(rank, dist.group.WORLD, *args))
            message = pickle.dumps(answer)
        except BaseException as error:  # whatever it is, the parent must learn of it
            connection.send_bytes(_failure(error))  # and the pool is killed
        else:
            connection.send_bytes(message)
            _leave()
            connection.send(psutil.Process().num_threads())


def _join(rank: int, size: int, store: str, timeout_s: float) -> None:
    """Makes the first `size` workers the whole world."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )


def _leave() -> None:
    """Ends the world and every group in it, when nobody is waiting for this rank any more."""
    dist.barrier()
    if "megatron.core.parallel_state" in sys.modules:  # it holds groups, which live as long as they are held
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()


def _failure(error: BaseException) -> bytes:
    text = traceback.format_exc()
    if isinstance(error, SystemExit | KeyboardInterrupt):  # would end the parent
        error = WorkerError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(Exception):
        message = pickle.dumps(("error", error, text))
        pickle.loads(message)  # some exceptions can be written and not read
        return message
    return pickle.dumps(("error", WorkerError(f"{type(error).__name__}: {error}"), text))
