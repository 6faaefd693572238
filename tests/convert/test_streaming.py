"""Conversions hold a tensor, not a model; what several ranks would need all of is read by one process and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from unisd_megatron.cli import main
from unisd_megatron.config import Layout
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import write_tiny
from world import World


def test_a_conversion_holds_tensors_and_not_the_model(tmp_path: Path) -> None:
    """Both ways, and a verification layer by layer, in one fresh process; against its own peak after a tiny model."""
    program = Path(__file__).with_name("random_model.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "1024", "2816", "12", "16000", "bfloat16"],
        capture_output=True,
        text=True,
        timeout=240,
        # Without the allocator settings of `make`, which keep what is freed.
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout.splitlines()[-1])
    assert used["model"] > 300e6
    assert used["conversion"] <= 3 * used["largest"] < used["model"] / 3
    assert used["verify"] <= 0.7 * used["model"]  # a layer or the embedding in fp32, beside what it is made from


def weights_on_ranks(rank: int, group: object, folder: str, layout: Layout) -> list[str]:
    """Names of the tensors that are not those of the Hugging Face folder beside the checkpoint, loaded under a layout."""
    platform = platforms.choose()
    source, expected = open_source(folder, layout), HfFolder(Path(folder).with_name("hf"))
    with start.world(platform, layout, seed=1) as grid:
        model = load_stage(source, layout, platform, grid)
        found = dict(stream.full_tensors(model.named_shards(), source.mappings, grid))
        assert found.keys() == set(expected.names())
        return [name for name, tensor in found.items() if not torch.equal(tensor, expected.tensor(name))]


def test_what_one_process_wrote_loads_at_any_layout(world: World, tmp_path: Path) -> None:
    for family in ("qwen2", "llama"):
        folder = tmp_path / family
        write_tiny(family, folder / "hf", seed=5)
        assert main(["convert", "import", "--model_name", f"{folder}/hf", "--output_dir", f"{folder}/megatron"]) == 0
        for layout in (Layout(2, 2), Layout(4, 1), Layout(1, 4), Layout(1, 2, virtual_pipeline_model_parallel_size=2)):
            size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
            assert world.run(size, weights_on_ranks, f"{folder}/megatron", layout) == [[]] * size
