"""A sweep of real runs on the demo's model: killed, resumed, finished, and then left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT, kill_tree, wait_until

pytest.importorskip("snakemake")

GRID = """
settings: {dataset: addition, model_name: examples/demo/model, global_batch_size: 8, micro_batch_size: 8,
  num_train_examples: 64, max_completion_length: 40, max_prompt_length: 128, max_steps: 12, learning_rate: 3.0e-4,
  save_steps: 3}
entries: [{mode: clip, token_clip: 1.0}]
seeds: [3]
evaluate: {addition: {max_completion_length: 40, max_examples: 20}}
"""


@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_and_a_finished_one_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    words = ["experiments", "run", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "sweep"), "--jobs", "2"]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "unisd_megatron", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    first = start()
    wait_until(lambda: any((tmp_path / "sweep").glob("runs/*/seed3/train/checkpoints/step_000003")), 300)
    kill_tree(first)
    said, _ = (second := start()).communicate(timeout=300)
    assert second.returncode == 0, said
    (home,) = (tmp_path / "sweep").glob("runs/clip-addition-*/seed3")
    steps = [json.loads(line)["step"] for line in (home / "train/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(12)) and "--resume_from_checkpoint latest" in (home / "train.log").read_text()
    table = [line for line in said.splitlines() if line.startswith(("base", "clip"))]
    assert len(table) == 2
    subprocess.run(["rm", "-r", str(home / "train")], check=True)
    again, _ = (third := start()).communicate(timeout=100)
    assert third.returncode == 0 and "0 to run" in again and not (home / "train").exists()
    assert [line for line in again.splitlines() if line.startswith(("base", "clip"))] == table
