"""Makes megatron-core run on gloo without CUDA: "cuda means cpu". For laptops and tests.

The one set of monkeypatches of the project. `install()` does nothing where CUDA is available, so production code paths
never see it. Measured on megatron-core 0.16.1; each patch names the megatron-core code that needs it, and can go
when that code asks a device instead of assuming CUDA.

Random streams: the CPU generator plays both roles, so dropout differs from a GPU run (models here use none).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = """
    empty zeros ones full tensor arange rand randn randint empty_like zeros_like ones_like full_like eye linspace
    as_tensor empty_strided rand_like
"""

_installed = False


def install() -> bool:
    """Installs the patches unless CUDA is available or they are in place already. True if they are in place."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _patch_devices()
        _patch_tensors()
        _patch_streams()
        _patch_random()
        _patch_experts()
        _installed = True
    return True


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


def _patch_devices() -> None:
    """`torch.cuda.current_device()` and `device="cuda"` in schedules, p2p, mappings, optimizer, rotary embedding."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None  # p2p_communication.py after batched p2p; async checkpoint writer

    def redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
                kwargs["device"] = cpu
                kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapper

    # `with torch.device(...)` (transformers builds models under "meta") recognises factories by identity, from a cached
    # table: without the originals in it, HF models come out with uninitialised buffers (RoPE frequencies), silently.
    _device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, redirected(getattr(torch, name)))


def _patch_tensors() -> None:
    """`.cuda()` in language_module.py and distrib_optimizer.py; `.type()` compared with "torch.cuda.…" in the optimizers."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[assignment]
    original = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[assignment, method-assign]


class _Inert:
    """A stream or an event of a machine that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def record_event(self, event: Any = None) -> _Inert:  # moe/token_dispatcher.py waits for what it returns
        return _Inert()


def _patch_streams() -> None:
    """Streams, events and nvtx ranges around communication and checkpoint copies."""

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    torch.cuda.Stream = _Inert  # type: ignore[misc, assignment]
    torch.cuda.Event = _Inert  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda device=None: _Inert()  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: _Inert()  # type: ignore[assignment, return-value]
    torch.cuda.stream = stream  # type: ignore[assignment]
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0


def _patch_experts() -> None:
    """moe/token_dispatcher.py leaves the sizes of an all-to-all as tensors where they are in host memory already; gloo gathers
    and scatters only parts of one size, and experts get as many tokens as there are.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _patch_random() -> None:
    """tensor_parallel/random.py forks CUDA generators per rank and replays them under recompute."""
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state  # type: ignore[assignment]
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment, return-value]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # The tracker warns whenever the CPU generator moves inside a fork; here that is what a fork is for.
    logging.getLogger(megatron_random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
