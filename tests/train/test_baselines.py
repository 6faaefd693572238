"""Where the baselines' completions come from, that they are the same after a restart, and what each mode refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runs import QUICK, TINY, curve, run
from test_resume import broken_before_the_last
from unisd_megatron.batch import STUDENT, Prompts
from unisd_megatron.data.tasks.addition import Addition
from unisd_megatron.data.tokens import encode_references, end_of_answer
from unisd_megatron.errors import ConfigError, DataError
from unisd_megatron.mechanisms.objective import loss_settings
from unisd_megatron.resolve import resolve
from unisd_megatron.train.build import prepare
from unisd_megatron.validation import validate
from unisd_megatron.weights.tiny import EOS, EOS_ID, byte_tokenizer
from world import World

SHORT = {"micro_batch_size": 4, "max_completion_length": 40}


def recorded(output: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def references() -> dict[str, list[int]]:
    task = Addition()
    records = task.load("train", None)[: QUICK["num_train_examples"]]
    return {one.id: [*byte_tokenizer().encode(task.reference(one)), EOS_ID] for one in records}


def test_sft_reads_references_and_generates_nothing(world: World, tmp_path: Path) -> None:
    metrics = run(world, 2, tmp_path / "run", mode="sft", tensor_model_parallel_size=2, max_steps=3, **SHORT)
    assert metrics[2]["loss"] < metrics[0]["loss"]
    rows, expected = recorded(tmp_path / "run", 0), references()
    assert all(row["completion"] == expected[row["id"]] and row["log_probs"] == [] for row in rows)
    assert not {name for name in metrics[0] if name.startswith(("rollout/", "divergence", "teacher"))}


def test_gkd_mixes_by_seed_step_and_place(world: World, tmp_path: Path) -> None:
    """Which sequences are sampled does not depend on the layout; references have no log-probs, the others agree."""
    one, two = (
        run(world, size, tmp_path / str(size), mode="gkd", max_steps=4, tensor_model_parallel_size=size, **SHORT)
        for size in (1, 2)
    )
    shares = [row["rollout/on_policy_share"] for row in one]
    assert 0.2 < sum(shares) / 4 < 0.8 and shares == [row["rollout/on_policy_share"] for row in two]
    assert max(row["rollout/logp_gap"] for row in one) < 1e-3
    rows, expected = recorded(tmp_path / "1", 0), references()
    for row in rows:
        assert row["log_probs"] or row["completion"] == expected[row["id"]]
    assert [bool(row["log_probs"]) for row in rows] == [bool(row["log_probs"]) for row in recorded(tmp_path / "2", 0)]
    with pytest.raises(DataError, match="is a reference, which nothing sampled"):
        again = {"rollout": "replay", "replay_path": str(tmp_path / "1" / "rollouts")}
        run(world, 1, tmp_path / "replayed", mode="vanilla", temperature=1.0, max_steps=4, **again, **SHORT)


def test_gkd_on_references_alone_needs_no_engine(world: World, tmp_path: Path) -> None:
    metrics = run(world, 1, tmp_path / "run", mode="gkd", on_policy_share=0.0, max_steps=1, **SHORT)
    assert metrics[0]["rollout/on_policy_share"] == 0.0 and "rollout/logp_gap" not in metrics[0]


@pytest.mark.parametrize("mode", ["gkd", "ssd"])
def test_a_resumed_run_is_the_unbroken_run(world: World, tmp_path: Path, mode: str) -> None:
    """With held-out evaluations, for which ssd's engine holds other weights than those that it samples with."""
    flags = {"mode": mode, "save_steps": 2, "max_steps": 4, "eval_steps": 2, "eval_examples": 4, **SHORT}
    expected = run(world, 1, tmp_path / "run", **flags)
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    assert curve(run(world, 1, output, **flags, resume_from_checkpoint="latest")) == curve(expected)
    assert [recorded(output, step) for step in range(4)] == [recorded(tmp_path / "run", step) for step in range(4)]


def test_ssd_samples_from_the_starting_model_throughout(world: World, tmp_path: Path) -> None:
    """A learning rate that wrecks the student changes no sample."""
    for name, rate in (("calm", 1e-9), ("wild", 1e-1)):
        flags = {"mode": "ssd", "learning_rate": rate, "sample_filter": "none", "lr_scheduler_type": "constant", **SHORT}
        run(world, 1, tmp_path / name, **flags, max_steps=3, warmup_ratio=0.0, export_hf=True)
    assert [recorded(tmp_path / "calm", s) for s in range(3)] == [recorded(tmp_path / "wild", s) for s in range(3)]
    assert all(row["version"] == 0 for row in recorded(tmp_path / "wild", 2))
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("calm", "wild")]
    assert any(not torch.allclose(weights[0][name], weights[1][name], atol=1e-2) for name in weights[0])


def test_ssd_trains_on_right_answers_alone_where_asked(world: World, tmp_path: Path) -> None:
    """The tiny model is never right: everything is dropped, and nothing moves."""
    metrics = run(world, 1, tmp_path / "run", mode="ssd", sample_filter="correct", max_steps=2, **SHORT)
    assert [row["completions/kept_fraction"] for row in metrics] == [0.0, 0.0]
    assert [row["loss"] for row in metrics] == [0.0, 0.0] and metrics[1]["grad_norm"] == 0.0


def test_sdft_leaves_the_first_tokens_out_and_its_teacher_follows_every_step(world: World, tmp_path: Path) -> None:
    metrics = run(world, 1, tmp_path / "run", mode="sdft", max_steps=2, **SHORT)
    assert [row["teacher/moved"] for row in metrics] == [1.0, 1.0]
    assert metrics[0]["rollout/importance"] == pytest.approx(1.0, abs=1e-4)
    everything = run(world, 1, tmp_path / "all", mode="sdft", num_loss_tokens_to_skip=0, max_steps=1, **SHORT)
    assert metrics[0]["loss"] != everything[0]["loss"]


def test_replay_repeats_the_runs_that_sample(world: World, tmp_path: Path) -> None:
    for mode in ("gkd", "ssd"):
        first = run(world, 1, tmp_path / mode, mode=mode, max_steps=2, **SHORT)
        again = {"rollout": "replay", "replay_path": str(tmp_path / mode / "rollouts")}
        assert curve(run(world, 1, tmp_path / f"{mode}-again", mode=mode, max_steps=2, **again, **SHORT)) == curve(first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mode": "sft", "use_vllm": True}, "--use_vllm does nothing in --mode sft"),
        ({"mode": "sft", "rollout": "replay", "replay_path": "x"}, "--rollout does nothing in --mode sft"),
        ({"mode": "sft", "temperature": 0.5}, "--temperature does nothing in --mode sft"),
        ({"mode": "sft", "teacher": "ema"}, "--teacher does nothing in --mode sft"),
        ({"mode": "sft", "entry_clip": 0.1}, "--entry_clip does nothing in --mode sft"),
        ({"mode": "ssd", "teacher_memory": "swap"}, "--teacher_memory does nothing in --mode ssd"),
        ({"mode": "ssd", "importance_sampling_cap": 2.0}, "--importance_sampling_cap does nothing in --mode ssd"),
        ({"mode": "ssd", "contrastive_weight": 0.1}, "--contrastive_weight does nothing in --mode ssd"),
        ({"mode": "vanilla", "on_policy_share": 0.5}, "--on_policy_share does nothing in --mode vanilla"),
        ({"mode": "gkd", "sample_filter": "correct"}, "--sample_filter does nothing in --mode gkd"),
        ({"mode": "gkd", "on_policy_share": 1.5}, "--on_policy_share is 1.5; it lies between 0 and 1"),
        ({"mode": "opsd", "entry_clip": -0.1}, "--entry_clip is -0.1; a ceiling must be positive"),
        ({"mode": "opsd", "semantics": "released"}, "--semantics released"),
        ({"mode": "sdft", "num_loss_tokens_to_skip": -1}, "--num_loss_tokens_to_skip must not be negative"),
    ],
)
def test_what_a_baseline_has_no_use_for_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(resolve({**QUICK, "output_dir": "o", **flags}, {}), 1)


def test_a_temperature_acts_wherever_there_is_a_divergence() -> None:
    """It divides the logits of the loss, whoever wrote the completions."""
    asked = resolve({**QUICK, "output_dir": "o", "mode": "gkd", "on_policy_share": 0.0, "temperature": 2.0}, {})
    validate(asked, 1)
    assert loss_settings(asked).temperature == 2.0


def test_an_evaluation_gives_sft_an_engine() -> None:
    validate(resolve({**QUICK, "output_dir": "o", "mode": "sft", "use_vllm": True, "eval_steps": 5}, {}), 1)


def test_references_end_as_answers_do_and_are_never_cut() -> None:
    tokenizer = byte_tokenizer()
    prompts = [Prompts("a", {STUDENT: (5, 6)}), Prompts("b", {STUDENT: (5,)})]
    kept, dropped = encode_references(tokenizer, prompts, {"a": "12", "b": "12345"}, [0, EOS_ID], 4)
    assert dropped == 1 and [one.id for one in kept] == ["a"]
    assert kept[0].reference == (*tokenizer.encode("12"), EOS_ID)
    with pytest.raises(DataError, match="longer than --max_completion_length 2"):
        encode_references(tokenizer, prompts, {"a": "12", "b": "12345"}, [EOS_ID], 2)


def test_the_template_says_what_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    turn = tokenizer.encode("~", add_special_tokens=False)[0]
    assert end_of_answer(tokenizer, [turn, EOS_ID]) == EOS_ID
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}~\n{% endfor %}" + EOS
    assert end_of_answer(tokenizer, [turn, EOS_ID]) == turn
    assert end_of_answer(tokenizer, [turn]) == turn


def test_the_data_of_a_run_include_its_references(tmp_path: Path) -> None:
    """A checkpoint is not resumed with other references."""
    if not TINY.exists():
        pytest.skip("written by the first run of the session")
    flags = {**QUICK, "output_dir": str(tmp_path / "o"), "mode": "sft", "max_steps": 1, "max_completion_length": 40}
    one = prepare(resolve(flags, {}), 1).identity
    changed = tmp_path / "model"
    shutil.copytree(TINY, changed)
    path = changed / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": 7}))
    assert prepare(resolve({**flags, "model_name": str(changed)}, {}), 1).identity["data"] != one["data"]
