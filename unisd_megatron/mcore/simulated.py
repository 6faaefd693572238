"""One rank of a large world in a process of its own: its real groups, model, optimizer and teacher, on no device.

Process groups are torch's `fake` ones, in which nothing moves: nothing may be read here from a collective. Tensors are on the
`meta` device, whatever device is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from unisd_megatron.config import Layout
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.start import make_grid

_IDLE = frozenset({"lerp_", "mul_", "addcmul_", "addcdiv_"})
"""Adam's arithmetic in place, which on the `meta` device changes nothing and takes two thirds of the time."""


class Nowhere(TorchFunctionMode):
    """Every tensor that is made is on the `meta` device, Megatron's buffers in host memory among them; but for given values."""

    def __init__(self) -> None:
        super().__init__()
        # Adam reads the values of its counters.
        self._factories = {factory for factory in _device_constructors() if factory.__name__ != "tensor"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._factories:
            kwargs["device"] = torch.device("meta")
            kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cpu or getattr(func, "__name__", "") in _IDLE and args[0].is_meta:
            return args[0]
        found = func(*args, **kwargs)
        if type(found) is not str:
            return found
        # Megatron's optimizers know a device's parameters by the names of their types; without CUDA `mcore/cpu.py` adds it.
        return found.replace("torch.cuda.meta.", "torch.").replace("torch.meta.", "torch.cuda.")


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A rank. said: what it gave to collectives whose answer was supposed to be the same from every rank; to be compared."""

    grid: Grid
    said: list[str]


@contextlib.contextmanager
def rank_of(world_size: int, rank: int, layout: Layout, platform: Platform) -> Iterator[Simulated]:
    """This process as one rank of a world of `world_size`: Megatron's groups and the `Grid` that a run would have."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    said: list[str] = []
    try:
        with _alone(said):
            yield Simulated(make_grid(platform, layout, seed=1), said)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _alone(said: list[str]) -> Iterator[None]:
    """Every process group is a fake one, where Megatron asks for gloo too, and objects gathered are this rank's own."""
    new_group, gather = dist.new_group, dist.all_gather_object

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    def everyone_alike(gathered: list[Any], own: Any, *args: Any, **kwargs: Any) -> None:
        said.append(repr(sorted(map(repr, own))))  # Megatron makes one list of all, without repetitions
        gathered[:] = [own] * len(gathered)

    dist.new_group, dist.all_gather_object = fake_group, everyone_alike
    try:
        yield
    finally:
        dist.new_group, dist.all_gather_object = new_group, gather
