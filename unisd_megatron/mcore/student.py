"""The student: a model with gradients, its optimizer and its learning-rate curve."""

from __future__ import annotations

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
from unisd_megatron.mcore.model import Stage


class Student:
    """The model being trained; one pipeline stage of it on each rank.

    Attributes: model: the stage, unwrapped; optimizer: Megatron's. Gradients live in DDP's buffers (`main_grad`, fp32).
    """

    def __init__(self, model: Stage, layout: Layout, optimization: Optimization, max_steps: int, grid: Grid) -> None:
        make_torch_adam_reshardable()
        self.model = model
        self.grid = grid
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=layout.use_distributed_optimizer,
            check_for_nan_in_grad=False,  # the run checks the loss terms and the gradient norm, and says where
        )
        self._ddp = [
            DistributedDataParallel(model.config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(model.chunks)
        ]
        self.optimizer = get_megatron_optimizer(optimizer_config(layout, optimization), self._ddp)
        self._scheduler = _scheduler(self.optimizer, optimization, max_steps)
        model.config.grad_scale_func = self.optimizer.scale_loss
        # The loss arrives normalised over the global batch: reduce gradients, divide by nothing.
        model.config.finalize_model_grads_func = lambda chunks, num_tokens=None, **how: finalize_model_grads(
            chunks, None, **how
        )

    def learn(self, views: Sequence[View], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Gradients of the sum of `loss(i, rows)` over micro-batches and replicas. Collective over all ranks."""
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule.learn(self._ddp, views, loss, self.grid)

    def step(self, number: int) -> float:
        """Applies the gradients as optimizer step `number` (from 0); returns its learning rate. Collective over all ranks."""
        self._scheduler.num_steps = number + 1
        self._scheduler.step(0)
        rate = self._scheduler.get_lr(self.optimizer.param_groups[0])
        self.optimizer.step()
        return float(rate)

    def gradient_norm(self) -> float:
        """The global norm before clipping, over all parameters of all ranks. Collective over all ranks."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's reduced gradients by canonical name, fp32 (without the distributed optimizer)."""
        for name, parameter in self.model.named_shards():
            yield name, parameter.main_grad


def optimizer_config(layout: Layout, optimization: Optimization) -> OptimizerConfig:
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
