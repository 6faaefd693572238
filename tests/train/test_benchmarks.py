"""Training on the real benchmark files: GSM8K and MBPP, TP=2 x PP=2, resumed in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_resume import broken_before_the_last
from world import World

from runs import STAR, curve, data_file, run
from unisd_megatron.weights.tiny import write_tiny

LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 1}


@pytest.mark.parametrize(("dataset", "file"), [("gsm8k", "gsm8k_train.jsonl"), ("mbpp", "mbpp.jsonl")])
def test_unisd_star_is_finite_and_resumes(world: World, tmp_path: Path, dataset: str, file: str) -> None:
    path = data_file(file)
    write_tiny("qwen2", tmp_path / "tiny", seed=0)
    flags = {
        **STAR,
        **LAYOUT,
        "num_train_examples": 200,
        "dataset": dataset,
        "data_path": path,
        "model_name": str(tmp_path / "tiny"),
        "max_prompt_length": 1300,
        "max_completion_length": 12,
        "global_batch_size": 2,
        "save_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
    }
    expected = run(world, 4, tmp_path / "run", **flags)
    assert len(expected) == 4  # a loss or gradient that is not finite would have stopped the run
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    assert curve(run(world, 4, output, **flags, resume_from_checkpoint="latest")) == curve(expected)
