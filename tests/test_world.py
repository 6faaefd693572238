"""The test world itself: right ranks and groups, exceptions that arrive, hangs that end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from world import RemoteTraceback, WorkerError, World


@pytest.fixture
def own_world() -> Iterator[World]:
    """A pool that may be broken."""
    world = World(2, timeout_s=20.0)
    yield world
    world.shut_down()


def sum_of_ranks(rank: int, group: dist.ProcessGroup, offset: int) -> tuple[int, int, float, int]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total, group=group)
    return rank, dist.get_world_size(), float(total), os.getpid()


def fail_on_one(rank: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        raise KeyError("broken on purpose")
    dist.barrier(group)


def hang_on_one(rank: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        time.sleep(3600)


def die_on_one(rank: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        os._exit(3)


def test_default_group_has_the_asked_size_and_workers_persist(world: World) -> None:
    pids = {}
    for size in (4, 2, 4, 1, 2):
        results = world.run(size, sum_of_ranks, 10)
        assert [r[0] for r in results] == list(range(size))
        assert {r[1] for r in results} == {size}
        assert {r[2] for r in results} == {10.0 * size + size * (size - 1) / 2}
        for rank, result in enumerate(results):
            assert pids.setdefault(rank, result[3]) == result[3] != os.getpid()


def test_an_exception_arrives_with_its_traceback_and_the_next_call_works(own_world: World) -> None:
    with pytest.raises(KeyError, match="broken on purpose") as caught:
        own_world.run(2, fail_on_one)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "rank 1 of 2" in str(caught.value.__cause__) and "fail_on_one" in str(caught.value.__cause__)
    assert own_world.run(2, sum_of_ranks, 0)[0][2] == 1.0


def test_a_hanging_or_dead_worker_fails_in_time_and_the_next_call_works(own_world: World) -> None:
    start = time.monotonic()
    own_world.run(2, sum_of_ranks, 0)
    with pytest.raises(WorkerError, match=r"hang_on_one: no answer in time from rank\(s\) \[.*1\] of 2"):
        own_world.run(2, hang_on_one, timeout_s=0.5)
    with pytest.raises(WorkerError, match="rank 1 died"):
        own_world.run(2, die_on_one)
    assert own_world.run(2, sum_of_ranks, 0)[0][2] == 1.0
    assert time.monotonic() - start < 60  # not the hour that the worker would have slept


LEFT_BEHIND: list[str] = []


def what_was_left_behind(rank: int, group: dist.ProcessGroup) -> list[str]:
    return LEFT_BEHIND


def test_a_pool_that_replaces_a_broken_one_inherits_nothing_of_the_tests_before(
    own_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_world.start()
    monkeypatch.setattr(f"{__name__}.LEFT_BEHIND", ["such as the parent's process groups"])
    assert own_world.run(2, what_was_left_behind) == [[], []]
    with pytest.raises(WorkerError, match="rank 1 died"):
        own_world.run(2, die_on_one)
    assert own_world.run(2, what_was_left_behind) == [[], []]


def test_impossible_sizes_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"1\.\.4 ranks, asked for 5"):
        world.run(5, sum_of_ranks, 0)
