"""Pipeline stages on which the embedding or the loss takes the place of a layer: losses, gradients, checkpoints, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd_megatron.cli import main
from unisd_megatron.config import Layout
from unisd_megatron.convert.checkpoints import import_folder
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import FAMILIES
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.parity.layout import TOLERANCE, Rig, cases, gradient_error, total_norm
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import write_tiny
from world import World

pytestmark = pytest.mark.usefixtures("no_queue_for_later_workers")

BOTH = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
# Name -> ranks, layers of the model, layout, layers of each stage.
UNEVEN = {
    "pp4": (4, 6, Layout(1, 4, global_batch_size=8, **BOTH), [1, 2, 2, 1]),
    "pp2 vpp2 dp2": (4, 6, Layout(1, 2, 2, global_batch_size=8, **BOTH), [3, 3]),
    "tp2 pp2 sp, embedding alone": (
        4,
        5,
        Layout(2, 2, account_for_embedding_in_pipeline_split=True, sequence_parallel=True, global_batch_size=8),
        [2, 3],
    ),
    "pp2, loss alone": (2, 5, Layout(1, 2, account_for_loss_in_pipeline_split=True, global_batch_size=8), [3, 2]),
}


def deepen(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Gives the tiny model another number of layers."""
    config = FAMILIES["qwen2"].tiny_config()
    monkeypatch.setattr(FAMILIES["qwen2"], "tiny_config", lambda: {**config, "num_hidden_layers": layers})


def errors(rank: int, group: Any, layout: Layout, layers: int) -> tuple[int, float]:
    """Layers on this rank; on rank 0 the worst relative error of loss, gradients and their norm."""
    platform = platforms.choose()
    with pytest.MonkeyPatch.context() as monkeypatch, start.world(platform, layout, 1) as grid:
        deepen(monkeypatch, layers)
        rig = Rig(layout, platform, grid, "qwen2")
        count = sum(name.endswith("input_layernorm.weight") for name, _ in rig.student.model.named_shards())
        settings = dict(cases("fused"))["unisd_star, JSD 0.5, clip 0.2"]
        loss, gradients, norm = rig.gradients(settings, rig.samples)
        if rank != 0:
            return count, 0.0
        expected_loss, expected = rig.expected(settings)
        worst = abs(loss / expected_loss - 1), gradient_error(gradients, expected), abs(norm / total_norm(expected) - 1)
        return count, float(max(worst))


@pytest.mark.parametrize("name", UNEVEN)
def test_loss_and_gradients_equal_one_process(world: World, name: str) -> None:
    size, layers, layout, on_stage = UNEVEN[name]
    found = world.run(size, errors, layout, layers, timeout_s=120)
    # Ranks of a stage follow one another in Megatron's order: tensor, data, pipeline.
    assert [count for count, _ in found[:: size // len(on_stage)]] == on_stage
    assert max(error for _, error in found) <= TOLERANCE


def import_on_ranks(rank: int, group: Any, folder: str, target: Path, layout: Layout) -> None:
    import_folder(folder, target, layout)


def wrong_weights(rank: int, group: Any, checkpoint: str, hf: str, layout: Layout) -> list[str]:
    """Tensors of a checkpoint, loaded under a layout, that are not those of a Hugging Face folder."""
    platform = platforms.choose()
    source, expected = open_source(checkpoint, layout), HfFolder(Path(hf))
    with start.world(platform, layout, seed=1) as grid:
        model = load_stage(source, layout, platform, grid)
        found = dict(stream.full_tensors(model.named_shards(), source.mappings, grid))
    return [name for name in expected.names() if not torch.equal(found[name], expected.tensor(name))]


def test_checkpoints_come_from_uneven_stages_and_go_to_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepen(monkeypatch, 6)
    hf, megatron, back = (str(tmp_path / name) for name in ("hf", "megatron", "back"))
    write_tiny("qwen2", Path(hf), seed=5)
    world.run(4, import_on_ranks, hf, Path(megatron), UNEVEN["pp4"][2], timeout_s=120)
    for layout in (UNEVEN["pp4"][2], UNEVEN["pp2 vpp2 dp2"][2], Layout(2, 2)):
        assert world.run(4, wrong_weights, megatron, hf, layout, timeout_s=120) == [[]] * 4
    assert main(["convert", "export", "--model_name", megatron, "--output_dir", back]) == 0
    exported, expected = HfFolder(Path(back)), HfFolder(Path(hf))
    assert set(exported.names()) == set(expected.names())
    assert all(torch.equal(exported.tensor(name), expected.tensor(name)) for name in expected.names())


def test_what_cannot_be_laid_out_is_refused() -> None:
    arch = replace(FAMILIES["qwen2"].arch({**FAMILIES["qwen2"].tiny_config(), "vocab_size": 300}), num_layers=6)
    with pytest.raises(ConfigError, match="4 does not divide the 6 layers of X; use 1, 2, 3, 6; --account-for-embedding.*fit"):
        arch.check_layout(1, 4, "X")
    with pytest.raises(ConfigError, match="3 does not divide the 6 layers and 2 more places .*; use 1, 2, 4"):
        arch.check_layout(1, 3, "X", ends=2)
    arch.check_layout(1, 4, "X", ends=2)
    with pytest.raises(ConfigError):  # the first of six stages would have the embedding and no layer
        replace(arch, num_layers=4).check_layout(1, 6, "X", ends=2)
    for end in ("embedding", "loss"):
        name = f"account_for_{end}_in_pipeline_split"
        with pytest.raises(ConfigError, match=f"--account-for-{end}-in-pipeline-split .* needs --pipeline"):
            Layout(**{name: True}).validate(1)
