"""Running a model whose weights are on disk: each part's parameters are in memory only while that part computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Fill = Callable[[str, Tensor], Tensor]


@contextmanager
def parameters_nowhere() -> Iterator[None]:
    """Modules made inside have their parameters on the `meta` device, and their buffers (RoPE frequencies) for real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stream_parameters(part: nn.Module, prefix: str, fill: Fill) -> None:
    """From now on `part` gets its parameters when it is called, and gives them back when it is done.

    Args: fill: the tensor of a parameter, from its name behind `prefix` and its shape and dtype (on the `meta` device).
    """
    part.register_forward_pre_hook(partial(_take, prefix, fill))
    part.register_forward_hook(_give_back)


@torch.no_grad()
def _take(prefix: str, fill: Fill, part: nn.Module, _: Any) -> None:
    for place, module in part.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                tensor = fill(".".join(word for word in (prefix, place, name) if word), parameter)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _give_back(part: nn.Module, _: Any, __: Any) -> None:
    for module in part.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def listen(part: nn.Module, hear: Callable[[Tensor], None]) -> None:
    """Calls `hear` with the hidden states that a layer returns, first of a tuple or alone."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hear(output[0] if isinstance(output, tuple) else output)

    part.register_forward_hook(hook)
