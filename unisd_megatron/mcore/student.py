"""The student: a model with gradients, its optimizer and its learning-rate curve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.config import Layout, Optimization
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import schedule
from unisd_megatron.mcore.distributed_adam import make_torch_adam_reshardable
from unisd_megatron.mcore.exact import exact_weights
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.precision import is_quantized


class Student:
    """The model being trained; one pipeline stage of it on each rank.

    Attributes: model: the stage, unwrapped; optimizer: Megatron's. Gradients live in DDP's buffers (`main_grad`, fp32);
    row_multiple: of tokens in a row of it and of its teacher, on each rank.
    Args: platform: what is overlapped and kept in FP8; None: nothing.
    """

    def __init__(
        self,
        model: Stage,
        layout: Layout,
        optimization: Optimization,
        max_steps: int,
        grid: Grid,
        platform: Platform | None = None,
    ) -> None:
        make_torch_adam_reshardable()
        self.model = model
        self.grid = grid
        self.row_multiple = 1 if platform is None else platform.row_multiple
        self._in_full: dict[str, Tensor] = {}
        self._gathers = platform is not None and platform.overlap_param_gather
        self._reduces_early = platform is not None and platform.overlap_grad_reduce
        self._on_their_way = False
        ddp_config = distributed_config(layout, platform)
        self._ddp = [
            DistributedDataParallel(model.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(model.chunks)
        ]
        if self._gathers:
            for ddp in self._ddp:
                # Its hooks would gather layer by layer as the forward pass gets there; weights are read by others before, and
                # the head by none that has a hook. All are gathered after the step and awaited by the first who reads.
                ddp.disable_forward_pre_hook(param_sync=False)
            model.settle = self._settle
        if ddp_config.overlap_grad_reduce:
            pauses = [ddp.no_sync for ddp in self._ddp]
            model.config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
        self.optimizer = get_megatron_optimizer(optimizer_config(layout, optimization, platform), self._ddp)
        self._scheduler = _scheduler(self.optimizer, optimization, max_steps)
        model.config.grad_scale_func = self.optimizer.scale_loss
        # The loss arrives normalised over the global batch: reduce gradients, divide by nothing.
        model.config.finalize_model_grads_func = lambda chunks, num_tokens=None, **how: finalize_model_grads(
            chunks, None, **how
        )

    def learn(self, views: Sequence[View], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Gradients of the sum of `loss(i, rows)` over micro-batches and replicas. Collective over all ranks."""
        self.model.settle()
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule.learn(self._ddp, views, self._reaching_the_head(loss, len(views) - 1), self.grid)

    def _reaching_the_head(self, loss: Callable[[int, Tensor], Tensor], last: int) -> Callable[[int, Tensor], Tensor]:
        """Megatron reduces a bucket once all of its parameters have a gradient of the last micro-batch, and fails where one
        never has; features alone (`match_repr`) do not reach the head."""
        if not self._reduces_early:
            return loss

        def reaching(i: int, rows: Tensor) -> Tensor:
            value = loss(i, rows)
            return _Reaching.apply(value, self.model.head_weight()) if i == last else value

        return reaching

    def step(self, number: int) -> float:
        """Applies the gradients as optimizer step `number` (from 0); returns its learning rate. Collective over all ranks."""
        self._scheduler.num_steps = number + 1
        self._scheduler.step(0)
        rate = self._scheduler.get_lr(self.optimizer.param_groups[0])
        self.optimizer.step()
        if self._gathers:
            for ddp in self._ddp:
                ddp.start_param_sync()
            self._on_their_way = True
        return float(rate)

    def _settle(self) -> None:
        """Waits for the weights that `step` has sent for. Not collective: every rank has begun to gather."""
        if self._on_their_way:
            self._on_their_way = False
            for ddp in self._ddp:
                for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    @contextlib.contextmanager
    def in_full(self) -> Iterator[None]:
        """While open, `named_shards` has exact values of weights that are kept in FP8. Collective over data-parallel ranks.

        Costs 2 bytes for each such weight of the stage, and nothing where no weight is kept so.
        """
        parameters = list(self.model.named_shards())
        if any(is_quantized(parameter) for _, parameter in parameters):
            exact = exact_weights(self.optimizer, [parameter for _, parameter in parameters if is_quantized(parameter)])
            self._in_full = {name: exact[parameter] for name, parameter in parameters if parameter in exact}
        try:
            yield
        finally:
            self._in_full = {}

    def named_shards(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's weights as they leave the student, by canonical name: parameters, or the fp32 main parameters rounded to
        bf16 where those are kept in FP8. Inside of `in_full` then.
        """
        for name, parameter in self.model.named_shards():
            if is_quantized(parameter) and name not in self._in_full:
                raise RuntimeError(f"{name} is kept in FP8: its exact value is there inside of `Student.in_full` only")
            yield name, self._in_full.get(name, parameter)

    def gradient_norm(self) -> float:
        """The global norm before clipping, over all parameters of all ranks. Collective over all ranks."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's reduced gradients by canonical name, fp32 (without the distributed optimizer)."""
        for name, parameter in self.model.named_shards():
            yield name, parameter.main_grad


class _Reaching(torch.autograd.Function):
    """A scalar as it is; in the backward pass `weight` gets a gradient of zeros, beside what else it gets."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return gradients[0], weight.new_zeros(()).expand_as(weight)


def distributed_config(layout: Layout, platform: Platform | None = None) -> DistributedDataParallelConfig:
    """How gradients and weights cross data-parallel ranks."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=platform is not None and platform.overlap_grad_reduce,
        overlap_param_gather=platform is not None and platform.overlap_param_gather,
        fp8_param_gather=platform is not None and platform.fp8_param_gather,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the run checks the loss terms and the gradient norm, and says where
    )


def optimizer_config(layout: Layout, optimization: Optimization, platform: Platform | None = None) -> OptimizerConfig:
    """AdamW as Megatron's optimizer configuration."""
    return OptimizerConfig(
        optimizer="adam",
        lr=optimization.learning_rate,
        min_lr=0.0,
        weight_decay=optimization.weight_decay,
        adam_beta1=optimization.adam_beta1,
        adam_beta2=optimization.adam_beta2,
        adam_eps=optimization.adam_epsilon,
        clip_grad=optimization.max_grad_norm,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_param_gather=platform is not None and platform.overlap_param_gather,
        fp8_recipe=None if platform is None or platform.fp8_format is None else platform.fp8_recipe,
    )


def _scheduler(optimizer: Any, optimization: Optimization, max_steps: int) -> OptimizerParamScheduler:
    # Step n (from 0) trains at the curve's value at n + 1, so that the first step of a warm-up moves; the curve
    # reaches zero one step after the last.
    total = max_steps + 1
    warmup = min(round(optimization.warmup_ratio * max_steps), max_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimization.learning_rate,
        min_lr=0.0,
        lr_warmup_steps=warmup,
        lr_decay_steps=total,
        lr_decay_style=optimization.lr_scheduler_type,
        start_wd=optimization.weight_decay,
        end_wd=optimization.weight_decay,
        wd_incr_steps=total,
        wd_incr_style="constant",
    )
