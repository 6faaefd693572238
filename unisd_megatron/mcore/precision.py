"""FP8: when a model computes in it, and weights that Transformer Engine keeps in it.

Megatron's block opens Transformer Engine's FP8 context around its layers when `config.fp8` is set; embedding, final norm and
head lie outside of the block and never see it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import fp8_utils
from torch import Tensor

if TYPE_CHECKING:
    from unisd_megatron.mcore.model import Stage

Precision = Callable[["Stage"], AbstractContextManager[Any]]
"""What a model computes in while the context is open."""


@contextlib.contextmanager
def _set(stage: Stage, fp8: str | None, recipe: str) -> Iterator[None]:
    config = stage.config  # one object, of all layers of all chunks
    before = config.fp8, config.fp8_recipe
    config.fp8, config.fp8_recipe = fp8, recipe
    try:
        yield
    finally:
        config.fp8, config.fp8_recipe = before


def as_built(stage: Stage) -> AbstractContextManager[None]:
    """The precision the model was built for."""
    return contextlib.nullcontext()


def in_weights_dtype(stage: Stage) -> AbstractContextManager[None]:
    """No FP8, whatever the model was built for."""
    return _set(stage, None, stage.config.fp8_recipe)


def in_fp8(recipe: str) -> Precision:
    """Matrix products of the layers in FP8, forward passes only: there e4m3 and hybrid are the same."""
    return functools.partial(_set, fp8="e4m3", recipe=recipe)


def is_quantized(tensor: Tensor) -> bool:
    """Whether Transformer Engine keeps the tensor in FP8."""
    return bool(fp8_utils.is_float8tensor(tensor))


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter from values of any dtype on any device. Every weight that is loaded goes through here.

    One kept in FP8 is quantised, and its exact value left with it: the optimizer's main parameters start from that, and not
    from random initial weights, which Transformer Engine keeps there, or from rounded ones.
    """
    parameter.copy_(value)
    if is_quantized(parameter) and hasattr(parameter, "get_high_precision_init_val"):
        exact = parameter.get_high_precision_init_val()
        if exact is not None:  # else the optimizer has been built and has its own
            exact.copy_(value)
