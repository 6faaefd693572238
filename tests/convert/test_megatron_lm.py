"""Checkpoints that Megatron-LM wrote itself: its key names, its folders, its padding, whatever else lies in them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from unisd_megatron.cli import main
from unisd_megatron.config import Layout
from unisd_megatron.convert.source import open_source
from unisd_megatron.families.mapping import Vocabulary
from unisd_megatron.mcore import layers, start
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore.model import build
from unisd_megatron.mcore.skeleton import checkpoint_metadata
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import write_tiny
from world import World

FORMS = {"stacked": {}, "apart": {"non_homogeneous_layers": True}, "singletons": {"singleton_local_shards": True}}
LOCAL_SPEC = layers._local_spec
PADDED = 512  # Megatron-LM pads to a multiple of 128 x TP; ours would be 384


def local_spec_with_the_keys_of_transformer_engine(*words: Any) -> Any:
    """Its spec of a layer with experts leaves the norm before them its own name (gpt_layer_specs.py)."""
    spec = LOCAL_SPEC(*words)
    assert "pre_mlp_layernorm." in spec.submodules.sharded_state_dict_keys_map
    spec.submodules.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return spec


def save_as_megatron_lm(rank: int, group: Any, folder: str, root: Path, layout: Layout, form: dict[str, bool]) -> None:
    """ROOT/iter_0000007 as Megatron-LM writes it: a model without prefix, arguments, random states, optimizer tensors.

    With experts, under the keys that Transformer Engine's modules have.
    """
    source = open_source(folder)
    arch = dataclasses.replace(source.arch, vocab_size=PADDED)
    mappings = [dataclasses.replace(m, padded=PADDED) if isinstance(m, Vocabulary) else m for m in source.mappings]
    platform = platforms.choose()
    with pytest.MonkeyPatch.context() as patch, start.world(platform, layout, seed=1) as grid:
        if arch.experts is not None:
            patch.setattr(layers, "_local_spec", local_spec_with_the_keys_of_transformer_engine)
        (model,) = build(arch, layout, platform, grid).chunks
        stream.load(model.named_shards(), mappings, HfFolder(folder), grid.tensor)
        state = {
            "args": argparse.Namespace(num_layers=arch.num_layers),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": model.sharded_state_dict(prefix="", metadata=checkpoint_metadata(**form)),
            "rng_state": ShardedObject("rng_state", [{"np": b"x"}], (1,), (0,), replica_id=rank),
        }
        if rank == 0:
            (root / "iter_0000007").mkdir(parents=True)
            (root / "latest_checkpointed_iteration.txt").write_text("7")
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(root / "iter_0000007"))


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf-FAMILY` and `lm-FAMILY-FORM` of three families, tied and not, with experts, and of every form."""
    folder = tmp_path_factory.mktemp("lm")
    for family, layout in (("qwen2", Layout(2, 2)), ("llama", Layout(2, 1)), ("qwen3_moe", Layout(1, 2))):
        write_tiny(family, folder / f"hf-{family}", seed=2)
        for name, form in FORMS.items():
            size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
            world.run(size, save_as_megatron_lm, str(folder / f"hf-{family}"), folder / f"lm-{family}-{name}", layout, form)
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def equal(one: Path, other: Path) -> bool:
    ours, theirs = HfFolder(one), HfFolder(other)
    return set(ours.names()) == set(theirs.names()) and all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours.names())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
def test_it_is_exported_and_imported(saved: Path, tmp_path: Path, family: str, form: str) -> None:
    root, hf = saved / f"lm-{family}-{form}", saved / f"hf-{family}"
    assert run("convert", "export", "--model_name", root, "--config_from", hf, "--output_dir", tmp_path / "out") == 0
    assert equal(tmp_path / "out", hf)
    step = root / "iter_0000007"
    assert run("convert", "import", "--model_name", step, "--config_from", hf, "--output_dir", tmp_path / "ours") == 0
    assert run("convert", "export", "--model_name", tmp_path / "ours", "--output_dir", tmp_path / "again") == 0
    assert equal(tmp_path / "again", hf)


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_none_of_its_pickles_is_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved / "lm-llama-stacked", tmp_path / "lm")
    bomb = pickle.dumps(Bomb(tmp_path / "went off"))
    step = tmp_path / "lm/iter_0000007"
    export = ["convert", "export", "--model_name", step, "--config_from", saved / "hf-llama", "--output_dir"]
    (step / "common.pt").write_bytes(bomb)
    assert run(*export, tmp_path / "out") == 0
    (step / ".metadata").write_bytes(bomb)
    capsys.readouterr()
    assert run(*export, tmp_path / "refused") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ".metadata" in line and "pathlib" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "out"]


def wrong(config: dict[str, Any]) -> Any:
    def change(saved: Path, tmp: Path) -> list[object]:
        shutil.copytree(saved / "hf-llama", tmp / "config")
        path = tmp / "config/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return [saved / "lm-llama-stacked", "--config_from", tmp / "config"]

    return change


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "no config": (lambda saved, tmp: [saved / "lm-llama-stacked"], ["iter_0000007", "Megatron-LM", "--config_from"]),
    "more layers": (wrong({"num_hidden_layers": 5}), ["decoder.layers", "(4, ", "(5, "]),
    "another width": (wrong({"intermediate_size": 256}), ["linear_fc1", "256"]),
    "another model": (
        lambda saved, tmp: [saved / "lm-qwen2-stacked", "--config_from", saved / "hf-llama"],
        ["lm-qwen2-stacked/iter_0000007", "config.json"],
    ),
    "a head that the config ties": (wrong({"tie_word_embeddings": True}), ["output_layer.weight", "not one of the model"]),
    "more entries than rows": (wrong({"vocab_size": 600}), ["embedding.word_embeddings", "512", "600"]),
    "another architecture": (wrong({"model_type": "mamba"}), ["config/config.json", "'mamba'", "llama"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, words = REFUSED[name]
    asked = make(saved, tmp_path)
    capsys.readouterr()
    assert run("convert", "export", "--output_dir", tmp_path / "out", "--model_name", *asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert [word for word in words if word not in line] == [], line
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_its_tracker_names_and_the_older_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm/latest_checkpointed_iteration.txt").write_text("12\n")
    assert run("convert", "export", "--model_name", tmp_path / "lm", "--output_dir", tmp_path / "out") == 2
    assert "iter_0000012: missing" in capsys.readouterr().err
    (tmp_path / "lm/iter_0000012/mp_rank_00").mkdir(parents=True)
    assert run("convert", "export", "--model_name", tmp_path / "lm", "--output_dir", tmp_path / "out") == 2
    assert "torch_dist" in capsys.readouterr().err
