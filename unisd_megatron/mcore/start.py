"""Process groups in, `Grid` out. The only reader of Megatron's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from unisd_megatron.config import Layout
from unisd_megatron.errors import LostContact
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.mcore import contact
from unisd_megatron.mcore.platform import Platform

TIMEOUT_MINUTES = 10.0  # Megatron-LM's
ARRIVAL = datetime.timedelta(minutes=30)  # before there are groups, a host may still be downloading the model


def world_size_from_environment() -> int:
    """Processes of this world: of the running process group, else those that torchrun started; 1 without it."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def world(platform: Platform, layout: Layout, seed: int, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Grid]:
    """The process groups of the layout and this process's `Grid`, taken down at the end. Collective over all ranks.

    A process group that is running already is used, and left running, with its own timeout.
    Raises `LostContact` where a rank is gone, or was waited for longer than `timeout_minutes`.
    """
    ours = leave = not dist.is_initialized()
    try:
        with contact.explained():
            if ours:
                if platform.backend == "nccl":
                    torch.cuda.set_device(platform.device)
                _join(platform, datetime.timedelta(minutes=timeout_minutes))
            yield make_grid(platform, layout, seed, timeout_minutes)
    except LostContact:
        leave = False  # it would wait for those that are gone
        raise
    finally:
        if leave:
            _leave()


def _join(platform: Platform, timeout: datetime.timedelta) -> None:
    """The default process group, once every rank is there."""
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=ARRIVAL))
        store.set(f"unisd arrived {rank}", "")
        store.wait([f"unisd arrived {one}" for one in range(size)], ARRIVAL)
        store.set_timeout(timeout)
    else:
        store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(_backends(platform), store=store, rank=rank, world_size=size, timeout=timeout)


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()  # else a process forked from this one would take its groups for alive
    if dist.is_initialized():  # a colocated vLLM takes it down with itself
        dist.destroy_process_group()


def _backends(platform: Platform) -> str:
    # gloo carries the small Python objects (token ids, metrics) beside NCCL.
    return "cpu:gloo,cuda:nccl" if platform.backend == "nccl" else "gloo"


def _replica_group(layout: Layout, timeout_minutes: float) -> dist.ProcessGroup:
    """The ranks that share a batch. Megatron's model-parallel group leaves context-parallel ranks out."""
    from megatron.core import parallel_state

    if layout.context_parallel_size == 1:
        return parallel_state.get_model_parallel_group()
    ranks = parallel_state.RankGenerator(
        tp=layout.tensor_model_parallel_size,
        ep=1,
        dp=parallel_state.get_data_parallel_world_size(),
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        order="tp-cp-ep-dp-pp",  # of `initialize_model_parallel`
    )
    members = ranks.get_ranks("tp-cp-pp")
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=datetime.timedelta(minutes=timeout_minutes))
    return group


def make_grid(platform: Platform, layout: Layout, seed: int, timeout_minutes: float = TIMEOUT_MINUTES) -> Grid:
    """(Re)initialises Megatron's groups in the running world."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as megatron_random

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    megatron_random.initialize_rng_tracker(force_reset=True)
    megatron_random.model_parallel_cuda_manual_seed(seed)

    def axis(group: dist.ProcessGroup) -> Axis:
        size = dist.get_world_size(group)
        return Axis(dist.get_rank(group), size, group if size > 1 else None)

    return Grid(
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=axis(parallel_state.get_pipeline_model_parallel_group()),
        context=axis(parallel_state.get_context_parallel_group()),
        data=axis(parallel_state.get_data_parallel_group()),
        data_context=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert=axis(parallel_state.get_expert_model_parallel_group()),
        expert_data=axis(parallel_state.get_expert_data_parallel_group()),
        replica=axis(_replica_group(layout, timeout_minutes)),
        world=Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD if dist.get_world_size() > 1 else None),
        device=platform.device,
        sequence_parallel=layout.sequence_parallel,
    )
