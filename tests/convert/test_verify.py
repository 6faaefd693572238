"""`verify` accepts what is the same in every family, and says where what is not begins."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from unisd_megatron.cli import main
from unisd_megatron.convert.source import open_source
from unisd_megatron.convert.verify import Reading, TensorDifference, Verification, compare
from unisd_megatron.families import FAMILIES
from unisd_megatron.weights import internlm3
from unisd_megatron.weights.tiny import write_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 folder of every family."""
    root = tmp_path_factory.mktemp("verify")
    internlm3.register()
    for family in FAMILIES:
        write_tiny(family, root / family, seed=4)
        AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.bfloat16).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_imported_exported_and_verified(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """bf16 weights: read in fp32 and in bf16, beyond the window of the local layers and the scaled context."""
    folder, megatron, back = folders[family], tmp_path / "megatron", tmp_path / "back"
    assert run("convert", "import", "--model_name", folder, "--output_dir", megatron) == 0
    assert run("convert", "export", "--model_name", megatron, "--output_dir", back) == 0
    ours, theirs = load_file(back / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])] == []
    capsys.readouterr()
    status = run("verify", "--model_name", folder, "--against", megatron, "--max_prompt_length", "300")
    out = capsys.readouterr().out
    assert status == 0, out
    assert f"{len(theirs)} of {len(theirs)} tensors equal bit for bit" in out
    assert "logits in float32" in out and "logits in bfloat16" in out


def changed(folder: Path, target: Path, name: str, change: float) -> str:
    shutil.copytree(folder, target)
    held = load_file(target / "model.safetensors")
    held[name].view(-1)[:8] += change
    save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_where_a_difference_begins(folders: dict[str, Path], tmp_path: Path, layer: int) -> None:
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    other = changed(folders["llama"], tmp_path / "other", name, 0.5)
    tensors, *readings = Verification(str(folders["llama"]), Path(other)).run(1e-4)
    assert isinstance(tensors, list)
    assert [one.name for one in tensors if one.entries] == [name]
    assert len(readings) == 2
    exact = readings[0]
    assert isinstance(exact, Reading)
    assert not exact.holds and exact.begins == layer
    assert max(exact.layers[: layer + 1]) < 1e-5 < min(exact.layers[layer + 1 :])


def test_nan_is_a_difference(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(folders["qwen2"], tmp_path / "other", "model.norm.weight", math.nan)
    assert run("verify", "--model_name", folders["qwen2"], "--against", other) == 1
    out = capsys.readouterr().out
    assert "inf  model.norm.weight (8 of" in out and "largest difference nan" in out and "NOT verified" in out


def test_the_tolerance_is_what_is_asked_for(folders: dict[str, Path]) -> None:
    same = ["verify", "--model_name", folders["llama"], "--against", folders["llama"]]
    assert run(*same, "--tolerance", "0") == 1
    assert run(*same, "--tolerance", "1e-4") == 0


@pytest.mark.parametrize("length", ["0", "5000"])
def test_prompts_beyond_the_model_are_refused(folders: dict[str, Path], length: str) -> None:
    assert run("verify", "--model_name", folders["llama"], "--against", folders["llama"], "--max_prompt_length", length) == 2


def test_bits_are_compared_and_not_values() -> None:
    one, other = torch.tensor([0.0, math.nan, 1.0]), torch.tensor([-0.0, math.nan, 1.0])
    assert compare("x", one, one.clone()) == TensorDifference("x", 0, 0.0, 3)
    assert compare("x", one, other) == TensorDifference("x", 1, 0.0, 3)
    assert compare("x", one.half(), one[:2].half()) == TensorDifference("x", 3, math.inf, 3)
    half, dtypes = torch.tensor([0.1, 2.0]).half(), "float16 and float32"
    assert compare("x", half, half.float()) == TensorDifference("x", 0, 0.0, 2, dtypes)
    assert compare("x", half, half.float() + 1) == TensorDifference("x", 2, 1.0, 2, dtypes)


def test_the_same_values_in_another_dtype_are_not_verified(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders["llama"], tmp_path / "other")
    held = load_file(tmp_path / "other/model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].float()
    save_file(held, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    assert run("verify", "--model_name", folders["llama"], "--against", tmp_path / "other") == 1
    out = capsys.readouterr().out
    assert "same values  model.norm.weight (bfloat16 and float32)" in out and "NOT verified" in out
    assert f"{len(held) - 1} of {len(held)} tensors equal bit for bit" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.embed_tokens.weight", "begins at the embedding"), ("lm_head.weight", "at the final norm or the head")],
)
def test_a_difference_outside_the_layers_is_named(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    shutil.copytree(folders["llama"], tmp_path / "other")
    held = load_file(tmp_path / "other/model.safetensors")
    held[name] += 0.05
    save_file(held, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    assert run("verify", "--model_name", folders["llama"], "--against", tmp_path / "other") == 1
    assert capsys.readouterr().out.count(said) == 2  # in float32 and in bfloat16


def test_a_tensor_that_follows_from_the_config_does_not_count(folders: dict[str, Path], tmp_path: Path) -> None:
    """A frequency in fp32, as older checkpoints hold it, does not make a bf16 folder an fp32 one."""
    shutil.copytree(folders["llama"], tmp_path / "old")
    held = load_file(tmp_path / "old/model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(held, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    assert open_source(str(tmp_path / "old")).dtype is torch.bfloat16
    assert run("convert", "import", "--model_name", tmp_path / "old", "--output_dir", tmp_path / "new") == 0
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == "bfloat16"


def test_chat_templates_beside_the_default_one_come_along(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = templates = {"default": "D{{ messages }}", "tool_use": "T{{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    assert run("convert", "import", "--model_name", tmp_path / "model", "--output_dir", tmp_path / "new") == 0
    assert run("convert", "export", "--model_name", tmp_path / "new", "--output_dir", tmp_path / "back") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == templates
