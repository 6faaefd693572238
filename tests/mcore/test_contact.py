"""Only what says that a peer is gone is taken for that; a fault of the program in a collective keeps its own words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from unisd_megatron.mcore import contact
from world import World


def with_other_sizes(rank: int, group: Any) -> str:
    try:
        with contact.explained():
            dist.all_gather([torch.zeros(2), torch.zeros(3)], torch.zeros(2))
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_a_fault_of_the_program_is_no_lost_contact(world: World) -> None:
    assert world.run(2, with_other_sizes) == ["RuntimeError", "RuntimeError"]


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9ms for recv operation to complete", "Timed"),
        ("[../pair.cc:544] Connection closed by peer [10.0.0.2]:99. This is typically caused by", "Connection closed by peer"),
        ("wait timeout after 9ms, keys: /default_pg/0//cpu//0/1", "wait timeout after 9ms, keys"),
        ("NCCL error in: x.cpp:9\nncclRemoteError: A call failed possibly due to a network error", "ncclRemoteError"),
        ("CUDA out of memory. Tried to allocate 2 GiB", None),
        ("[enforce fail at allreduce.cc:30] inputs must have the same size", None),
    ],
)
def test_words_of_a_lost_peer(said: str, cause: str | None) -> None:
    found = contact.lost(RuntimeError(said))
    assert (found is None) if cause is None else (found is not None and found.startswith(cause)), found
