"""Answers of a checkpoint, from the command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from unisd_megatron.config import Layout
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import Record, Task
from unisd_megatron.evaluate.run import answer
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.rollout.engine import Sampling
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.buckets import WeightStream
from unisd_megatron.weights.hf import eos_ids


def answers_of(request: argparse.Namespace, task: Task, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Generates with the `transformers` engine and scores; data parallel over the processes that torchrun started."""
    source = open_source(request.model_name)
    tokenizer = load_tokenizer(source)
    layout = Layout(global_batch_size=start.world_size_from_environment())
    platform = platforms.choose()
    with start.world(platform, layout, request.seed) as grid:
        engine = TransformersEngine(source.path, grid, torch.float32 if platform.device.type == "cpu" else torch.bfloat16)
        if source.is_megatron:
            model = load_stage(source, layout, platform, grid)
            engine.refresh(WeightStream(model.named_shards, source.mappings, grid), 0)
        sampling = Sampling(request.temperature, 1.0, 0, request.max_completion_length, eos_ids(source.path))
        answers = answer(task, records, tokenizer, engine, sampling, seed=request.seed)
    return [dataclasses.asdict(one) for one in answers]
