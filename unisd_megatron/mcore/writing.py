"""How shards reach the disk: in the foreground, or from a forked process while training goes on."""

from __future__ import annotations

import contextlib
import inspect
import os
import queue
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from unisd_megatron.errors import CheckFailed, UnisdError


def write(folder: Path, state: ShardedStateDict) -> None:
    """Writes the shards of all ranks; everything is on disk when it returns. Collective over all ranks.

    Raises `CheckFailed`, on every rank, where a rank could not write.
    """
    filesystem_async._results_queue = _Results()
    with explained(folder):
        dist_checkpointing.save(state, str(folder))


class Background:
    """Writes one checkpoint at a time from a process forked off each rank; training may go on meanwhile.

    The fork is the snapshot: on a GPU the tensors are copied to the host before it, on a CPU the forked process keeps the
    pages as they were. (Megatron's copy to the host is none on a CPU, so its persistent writer would see later steps.)
    """

    def __init__(self) -> None:
        self._calls = AsyncCallsQueue()
        self._folder: Path | None = None

    def start(self, folder: Path, state: ShardedStateDict) -> None:
        """Takes the snapshot and returns. Collective over all ranks; an earlier write must be finished."""
        assert self._folder is None, f"{self._folder} is still being written"
        filesystem_async._results_queue = _Results()
        # The later default needs nvidia-resiliency-ext; the earlier version has one way and no argument for it.
        known = inspect.signature(dist_checkpointing.save).parameters
        how: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in known else {}
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **how)
        self._folder = folder
        self._calls.schedule_async_request(request)

    def finish(self, *, wait: bool) -> bool:
        """Whether what was started is now on disk, of every rank; true once for each start. Collective over all ranks.

        Args: wait: until it is. Raises `CheckFailed`, on every rank, where a rank could not write.
        """
        if self._folder is None:
            return False
        folder, done = self._folder, False
        try:
            with explained(folder):
                done = bool(self._calls.maybe_finalize_async_calls(blocking=wait))
        except CheckFailed:
            self._folder = None
            raise
        if done:
            self._folder = None
        return done


class _Results:
    """What a writer reports to its rank, which the library asks for by `put` and `get_nowait`.

    The library's own is a queue in a process of its own: 2 s and 270 MB per rank, left behind by a kill. A file without a
    name, shared over the fork, needs no process and holds any amount; a pipe would stop a writer at 64 KiB, for ever.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._file = Connection(os.dup(file.fileno()))

    def put(self, results: Any) -> None:
        self._file.send(results)

    def get_nowait(self) -> Any:
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        try:
            return self._file.recv()
        except (EOFError, OSError) as error:  # the writer died before it had reported
            raise queue.Empty from error


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a failed write into `CheckFailed`; an error that was raised on purpose, and an interrupt, stay what they are."""
    try:
        yield
    except CheckpointException as error:  # a BaseException; only rank 0 is told the causes
        ours = [one for one, _ in error.failures.values() if isinstance(one, UnisdError | KeyboardInterrupt | SystemExit)]
        if ours:
            raise ours[0] from error
        causes = [str(cause).splitlines()[0] for cause, _ in error.failures.values() if str(cause)]
        raise CheckFailed(f"{folder}: could not be written ({causes[0][:300] if causes else 'on another rank'})") from error
