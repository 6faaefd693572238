"""The wire between one sender of weights and the workers of one engine: a process group of its own, gloo or NCCL.

The sender is rank 0. The group belongs to nobody's default world, so trainers and engines may be started and stopped apart.
It is not authenticated: keep its port on a private network. No vLLM here, trainers have none.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

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
        listening = {}
        if rank == 0:  # on this address alone; left to itself the store listens on all of them
            door = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
            port = door.getsockname()[1]
            listening = {"master_listen_fd": door.detach()}
        store = dist.TCPStore(
            address, port, size, is_master=rank == 0, timeout=self._timeout, wait_for_workers=False, **listening
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
        if not flat.is_cuda:
            self._group.broadcast([flat], options).wait()
            return
        with torch.cuda.device(flat.device):  # the current device is one of each thread, and this may be another thread
            self._group.broadcast([flat], options).wait()
            torch.cuda.current_stream(flat.device).synchronize()

    def close(self) -> None:
        """Leaves the group without waiting for anybody: the other ends may be gone."""
        group, self._group = self._group, None
        if group is not None and self.backend == "nccl":  # gloo's connections end with the last reference
            group.abort()


def address_towards(url: str) -> str:
    """The address of this host by which the server's host can reach it."""
    parts = urlsplit(url)
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # nothing is sent: the kernel picks the route
        probe.connect(address)
        return str(probe.getsockname()[0])


def checksum(tensor: Tensor) -> int:
    """A sum over the tensor's bits that knows their places, modulo 2^63; the same on every device.

    Any changed element changes it; so do two different ones that change places, for certain within a row of 2^15 elements and
    but for an accident of 64 bits beyond.
    """
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(kind)
    place = torch.arange(_ROW, device=bits.device)
    weights = place * 2654435761 % _PRIME * 2 + 1  # odd, all different, below 2^31: no product with a difference of bits is 0
    whole = bits.numel() // _ROW * _ROW
    rows = bits[:whole].view(-1, _ROW).split(_ROWS_ON_GPU if bits.is_cuda else 1)
    sums = [part.long().mul_(weights).sum(-1) for part in rows]
    rest = bits[whole:].long().mul_(weights[: bits.numel() - whole])
    total = 0
    for one in torch.cat([*sums, rest.sum(-1, keepdim=True)]).tolist():
        total = (total * 1000003 + one) % (1 << 63)
    return total


def part_sums(name: str, tensor: Tensor, columns: Sequence[int]) -> dict[str, int]:
    """`checksum` of a tensor's values, or of each of these columns of a matrix, by a name for each. Of the numbers in fp32, so
    that dtypes which hold the same numbers agree."""
    if not columns:
        return {name: checksum(tensor.float() + 0.0)}  # there is no -0: products with a one and zeros make none
    return {f"{name}[:, {column}]": checksum(tensor[:, column].float() + 0.0) for column in columns}


_ROW = 1 << 15  # elements; on a CPU their int64 copies stay in its cache, without which the sum takes many times as long
_ROWS_ON_GPU = 64
_PRIME = (1 << 30) - 35
