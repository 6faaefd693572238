"""Files of a checkpoint that are broken in themselves are refused by name, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from test_requests import TRAIN, Desk, command
from unisd_megatron.weights.tiny import write_tiny


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.chdir(tmp_path)
    write_tiny("qwen2", tmp_path / "model", seed=0)
    return Desk(tmp_path, capfd)


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def index(content: Any) -> Callable[[Path], None]:
    return text("model.safetensors.index.json", json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "index is not JSON": (text("model.safetensors.index.json", "{"), ["model.safetensors.index.json", "not JSON"]),
    "index without a map": (index({}), ["no weight_map"]),
    "index names a tensor that its file lacks": (
        index({"weight_map": {"model.embed_tokens.weight": "model.safetensors", "other": "model.safetensors"}}),
        ["model.safetensors", "tensor other is missing"],
    ),
    "config is a list": (text("config.json", "[]"), ["config.json", "expected an object"]),
    "config without a dimension": (config(hidden_size=None), ["hidden_size is None"]),
    "config with a word for a dimension": (config(num_hidden_layers="four"), ["num_hidden_layers is 'four'"]),
    "config with no heads": (config(num_attention_heads=0), ["num_attention_heads is 0"]),
    "sliding window": (config(use_sliding_window=True), ["use_sliding_window is True", "without it"]),
    "another activation": (config(hidden_act="gelu"), ["hidden_act 'gelu'", "silu"]),
    "another RoPE": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["'yarn'"]),
    "generation config": (text("generation_config.json", "nothing"), ["generation_config.json", "not JSON"]),
    "generation config with a word for an end": (
        text("generation_config.json", '{"eos_token_id": "end"}'),
        ["generation_config.json", "eos_token_id is 'end'"],
    ),
    "tokenizer": (text("tokenizer.json", "{}"), ["tokenizer cannot be loaded"]),
    "too few positions": (config(max_position_embeddings=20), ["20 positions", "--max_prompt_length"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_model_folder_is_refused_by_name(broken: Desk, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(broken.folder / "model")
    broken.refused(command({}), *words)


def test_an_output_folder_under_a_file_is_refused(broken: Desk) -> None:
    broken.write("file", "")
    broken.refused(command({"--output_dir": "file/run"}), "file/run", "cannot be created")


def test_a_checkpoint_state_that_is_empty_is_refused(broken: Desk) -> None:
    broken.write("run/checkpoints/step_000001/state.json", "")
    broken.write("run/checkpoints/step_000001/shards/metadata.json", "{}")
    broken.refused(command({"--resume_from_checkpoint": "latest"}), "state.json", "not JSON")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--token_clip", "nan"),
        ("--temperature", "inf"),
        ("--max_logp_gap", "-1"),
        ("--weight_decay", "-1"),
        ("--adam_beta1", "2"),
        ("--adam_epsilon", "0"),
        ("--learning_rate", "inf"),
        ("--num_train_epochs", "inf"),
    ],
)
def test_a_number_out_of_range_is_refused(broken: Desk, flag: str, value: str) -> None:
    broken.refused(command({flag: value}), flag)


def test_the_rows_themselves_are_accepted(broken: Desk) -> None:
    """The requests above are refused for their damage and nothing else."""
    from unisd_megatron.cli.parser import given_settings, parse
    from unisd_megatron.resolve import resolve
    from unisd_megatron.train.build import prepare

    assert TRAIN["--mode"] == "vanilla"
    assert prepare(resolve(*given_settings(parse(command({})))), 1).max_steps == 1
