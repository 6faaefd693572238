"""Training on real records of GSM8K and MBPP: 20 steps of UniSD*, TP=2 x PP=2, killed and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import STAR, curve, run
from test_resume import broken_before_the_last
from unisd_megatron.weights.tiny import write_tiny
from world import World

FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 1}


@pytest.mark.parametrize("dataset", ["gsm8k", "mbpp"])
def test_unisd_star_is_finite_and_resumes(world: World, tmp_path: Path, dataset: str) -> None:
    write_tiny("qwen2", tmp_path / "tiny", seed=0)
    flags = {
        **STAR,
        **LAYOUT,
        "dataset": dataset,
        "data_path": str(FIXTURES / f"{dataset}_sample.jsonl"),
        "model_name": str(tmp_path / "tiny"),
        "max_prompt_length": 1300,
        "max_completion_length": 8,
        "global_batch_size": 2,
        "save_steps": 15,
        "max_steps": 20,
        "learning_rate": 1e-3,
    }
    expected = run(world, 4, tmp_path / "run", **flags)
    assert len(expected) == 20  # a loss or gradient that is not finite would have stopped the run
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    assert curve(run(world, 4, output, **flags, resume_from_checkpoint="latest")) == curve(expected)
