"""The weights in a training checkpoint are those the run exports, whoever reads them, at whatever layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runs import run
from unisd_megatron.cli import main
from unisd_megatron.config import Layout
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder
from world import World


def different_on_ranks(rank: int, group: Any, checkpoint: Path, folder: Path, layout: Layout) -> list[str]:
    """Names of the tensors of a checkpoint, loaded under a layout, that are not those of the folder."""
    platform = platforms.choose()
    source, expected = open_source(str(checkpoint), layout), HfFolder(folder)
    with start.world(platform, layout, seed=1) as grid:
        model = load_stage(source, layout, platform, grid)
        found = dict(stream.full_tensors(model.named_shards(), source.mappings, grid))
        assert found.keys() == set(expected.names())
        return [name for name, tensor in found.items() if not torch.equal(tensor, expected.tensor(name))]


def test_a_training_checkpoint_is_exported_and_loads_at_another_layout(world: World, tmp_path: Path) -> None:
    flags = {"mode": "ema", "max_steps": 1, "save_steps": 1, "export_hf": True}
    run(world, 2, tmp_path / "run", **flags, tensor_model_parallel_size=2)
    (step,) = (path for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir())
    hf = tmp_path / "run/hf"
    assert main(["convert", "export", "--model_name", str(step), "--output_dir", str(tmp_path / "back")]) == 0
    ours, theirs = HfFolder(tmp_path / "back"), HfFolder(hf)
    assert ours.names() == theirs.names()
    assert [name for name in ours.names() if not torch.equal(ours.tensor(name), theirs.tensor(name))] == []
    assert world.run(4, different_on_ranks, step, hf, Layout(2, 2)) == [[]] * 4
