"""When a run ends before its last step, with a checkpoint: a signal to any rank, or its own time limit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from unisd_megatron.exchange import largest
from unisd_megatron.grid import Axis

TIME_IS_UP = 1  # as a reason; the others are signal numbers, which are larger
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopping:
    """Notes signals from the moment it is entered, and brings the ranks to one decision at the end of a step.

    Args: minutes: of the whole start, model loading included, after which rank 0 asks for the end; None: no limit.
    A signal during a step or before the first one waits for the end of that step, so every start makes progress.
    """

    def __init__(self, minutes: float | None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handler
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def reason(self, world: Axis) -> str | None:
        """Why the run is to end now, the same on every rank; None: it goes on. Collective, one number per rank."""
        late = world.rank == 0 and self._deadline is not None and time.monotonic() >= self._deadline
        told = largest(self._signal or TIME_IS_UP * late, world)
        if told == TIME_IS_UP:
            return "--exit-duration-in-mins"
        return signal.Signals(told).name if told else None
