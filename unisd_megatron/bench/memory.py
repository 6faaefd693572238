"""Peak memory of a piece of work beyond what was there before, as the system or the allocator counted it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` then `peak.bytes`: the largest amount beyond the amount at the start.

    CUDA: the caching allocator's count. CPU: the resident size of this process, from the kernel's high-water mark where that
    can be reset, else sampled every 2 ms. Linux only.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        try:
            _CLEAR.write_text("5")
            self._sampler = None
        except OSError:
            self._sampler = _Sampler()
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status("VmHWM") if self._sampler is None else self._sampler.stop()
        self.bytes = max(0, peak - self._before)


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_asked, self._peak = threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(0.002):
            self._peak = max(self._peak, _status("VmRSS"))

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return self._peak


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name}")
