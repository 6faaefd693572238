"""The wire between one sender of weights and the workers of one engine: a process group of its own, gloo or NCCL.

The sender is rank 0. The group belongs to nobody's default world, so trainers and engines may be started and stopped apart.
It is not authenticated: keep its port on a private network. No vLLM here, trainers have none.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class Link:
    """One end of the wire. Constructing it blocks until all `size` ends are there, at most `timeout_s`.

    Args: address, port: of the sender; rank: 0 sends; backend: "gloo" or "nccl".
    Raises `RuntimeError` (torch's) when the others do not come, or go away during a transfer.
    """

    def __init__(self, address: str, port: int, rank: int, size: int, backend: str, timeout_s: float) -> None:
        self.rank, self.backend = rank, backend
        self._timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            address, port, size, is_master=rank == 0, timeout=self._timeout, wait_for_workers=False, multi_tenant=True
        )
        self.port = store.port
        self._store = dist.PrefixStore("unisd", store)
        self._size = size
        self._group: dist.ProcessGroup | None = None

    def open(self) -> None:
        """Meets the other ends."""
        if self.backend == "nccl":
            self._group = dist.ProcessGroupNCCL(self._store, self.rank, self._size, self._timeout)
        else:
            self._group = dist.ProcessGroupGloo(self._store, self.rank, self._size, self._timeout)

    def carry(self, flat: Tensor) -> None:
        """Fills `flat` on every end with the sender's."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        self._group.broadcast([flat], options).wait()
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()


def checksum(tensor: Tensor) -> int:
    """Two sums over the tensor's bits, modulo 2^63: any changed element, and any two that changed places, change it."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(kind)
    plain = placed = 0
    for begin in range(0, bits.numel(), _CHUNK):
        part = bits[begin : begin + _CHUNK].long()
        place = torch.arange(begin + 1, begin + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        placed += int((part * (place * 2654435761 % 2147483647)).sum())
    return (plain * 1000003 + placed) % (1 << 63)


_CHUNK = 1 << 22  # elements; their int64 copies are the memory that a checksum needs
