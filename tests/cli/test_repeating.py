"""`--config run.json` repeats a run, and gives nothing of its mode to a run of another mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unisd_megatron.cli.parser import given_settings, parse
from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.modes import MODES
from unisd_megatron.resolve import resolve
from unisd_megatron.train.folder import write_run_file
from unisd_megatron.validation import validate

NEEDS = ["--dataset", "addition", "--model_name", "model", "--output_dir", "new"]


def resolved(*words: str) -> Run:
    run = resolve(*given_settings(parse(["train", *words])))
    validate(run, 1)
    return run


def context_flags(mode: str) -> list[str]:
    if MODES[mode].agreement is None:
        return []
    return ["--num-auxiliary-contexts", "2", "--fewshot_method", "random"]


def effective(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.flat().items() if name != "output_dir"}


RUNNABLE = [mode for mode in MODES if not mode.endswith(("_retrieval", "_induction"))]


@pytest.mark.parametrize("before", RUNNABLE)
def test_a_run_file_repeats_its_run_and_lends_nothing_to_another_mode(tmp_path: Path, before: str) -> None:
    first = resolved(*NEEDS, "--mode", before, *context_flags(before), "--learning_rate", "1e-3")
    write_run_file(first, {}, tmp_path, {})
    file = str(tmp_path / "run.json")
    assert effective(resolved("--config", file, "--output_dir", "new")) == effective(first)
    assert json.loads(Path(file).read_text())["origins"]["learning_rate"] == "flag"
    without = [mode for mode in RUNNABLE if MODES[mode].agreement is None] if MODES[before].agreement is None else [before]
    for after in without:
        changed = resolved("--config", file, "--mode", after, "--output_dir", "new")
        plain = resolved(*NEEDS, "--mode", after, *context_flags(after), "--learning_rate", "1e-3")
        assert effective(changed) == effective(plain)


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("contrastive", ["--contrastive_weight", "0"]),
        ("match_joint", ["--final_layer_distill_weight", "0"]),
        ("match_repr", ["--final_layer_distill_weight", "0"]),
        ("agreement_tok_random", ["--gamma_agreement", "0"]),
        ("ema", ["--teacher", "frozen"]),
    ],
)
def test_a_mode_without_its_own_mechanism_is_refused(mode: str, flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="without its mechanism"):
        resolved(*NEEDS, "--mode", mode, *context_flags(mode), *flags)


@pytest.mark.parametrize("flag", ["--alpha", "--token_clip"])
def test_settings_of_the_divergence_are_idle_without_one(flag: str) -> None:
    with pytest.raises(ConfigError, match="does nothing"):
        resolved(*NEEDS, "--mode", "match_repr", flag, "0.5")
