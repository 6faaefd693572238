"""What a collective says when a rank is gone or out of reach, as one sentence."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import torch.distributed as dist

from unisd_megatron.errors import LostContact

# Of gloo, of the store, and of NCCL: an error of another kind in a collective (sizes, types) is a fault of the program.
_SIGNS = re.compile(
    r"timed out waiting|wait timeout|timeout after|connection (was )?(closed|reset|refused)|pair closure|broken pipe"
    r"|no route to host|network is unreachable|host is unreachable|failed to (connect|recv)|connection timed out"
    r"|remote process exited|ncclRemoteError",
    re.IGNORECASE,
)


def lost(error: RuntimeError) -> str | None:
    """The line of an error of torch.distributed which says that a peer is gone; None if it says something else."""
    for line in str(error).splitlines():
        if _SIGNS.search(line):
            said = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", line.strip())
            return said.partition(". ")[0].rstrip(".")  # gloo adds advice
    return None


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what a broken collective raises into `LostContact`; every other error stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if (said := lost(error)) is None:
            raise
        rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this rank"
        raise LostContact(f"{rank} on {socket.gethostname()} lost contact with its peers: {said}") from error
