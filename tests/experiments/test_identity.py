"""What makes a run the one that it is: everything that shapes its numbers, and nothing that does not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from unisd_megatron.config import GROUPS, all_settings, setting_type
from unisd_megatron.errors import ConfigError
from unisd_megatron.experiments import identity
from unisd_megatron.experiments.identity import Contents
from unisd_megatron.resolve import resolve

STATED = {"mode": "vanilla", "dataset": "addition", "model_name": "someone/model", "output_dir": "here"}
KEPT_APART = {"seed"}  # the folder's name has it beside the digest
BY_CONTENTS = {"data_path", "eval_data_path", "retrieval_model", "replay_path"}
ONLY_HOW = {
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "sequence_parallel", "micro_batch_size", "packing"),
    *("recompute_granularity", "output_dir", "save_steps", "save_total_limit", "async_save", "resume_from_checkpoint"),
    "use_distributed_optimizer",
    *("export_hf", "max_logp_gap", "cache_dir", "loss_path", "teacher_memory", "vllm_mode", "vllm_tensor_parallel_size"),
    *("vllm_gpu_memory_utilization", "vllm_kv_cache_gib", "vllm_enable_sleep_mode", "vllm_server_urls", "vllm_server_timeout"),
    *("tensorboard_dir", "wandb_project", "distributed_timeout_minutes", "exit_duration_in_mins"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "transformer_impl", "attention_backend"),
    *("gradient_accumulation_fusion", "tp_comm_overlap", "overlap_grad_reduce", "overlap_param_gather"),
}


def key(*, ranks: int = 1, **stated: Any) -> str:
    return identity.of_run(resolve({}, STATED | stated), ranks, Contents())


def changed(name: str, group: str, value: Any) -> str:
    """The digest of a run of which one setting is another, past all checks of what goes with what."""
    run = resolve({}, STATED)
    part = dataclasses.replace(getattr(run, group), **{name: value})
    return identity.of_run(dataclasses.replace(run, **{group: part}), 1, Contents())


def another(group: str, item: dataclasses.Field) -> Any:
    kind, choices, _ = setting_type(GROUPS[group], item.name)
    if choices is not None:
        return next(one for one in choices if one != resolve({}, STATED).flat()[item.name])
    if kind is bool:
        return not item.default
    return {int: 7, float: 0.123, str: "other"}[kind]


@pytest.mark.parametrize(("group", "item"), [pytest.param(g, i, id=i.name) for g, i in all_settings()])
def test_every_setting_counts_but_where_to_and_how_fast(group: str, item: dataclasses.Field) -> None:
    """A new setting counts until someone says that it does not."""
    if item.name in BY_CONTENTS | KEPT_APART | {"dataset"}:
        return
    assert (changed(item.name, group, another(group, item)) == key()) == (item.name in ONLY_HOW)


def test_mode_dataset_and_model_count() -> None:
    keys = {key(), key(mode="clip"), key(dataset="gsm8k"), key(model_name="someone/else")}
    assert len(keys) == 4


def test_released_semantics_counts_the_micro_batch() -> None:
    """Released semantics normalises over each micro-batch, so its size shapes the run."""
    released = {"semantics": "released", "global_batch_size": 16}
    assert key(**released, micro_batch_size=4) != key(**released, micro_batch_size=2)


def test_released_semantics_counts_the_ranks() -> None:
    """It normalises on each of them by itself; corrected semantics gives the same numbers on any number."""
    assert key(semantics="released") != key(semantics="released", ranks=4)
    assert key(semantics="released") == key(semantics="released", use_distributed_optimizer=True)
    assert key() == key(ranks=4)


def test_files_count_by_what_is_in_them(tmp_path: Path) -> None:
    one, copy, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    one.write_text('{"a": 1, "b": 2}\n'), copy.write_text('{"a": 1, "b": 2}\n'), other.write_text('{"a": 1, "b": 3}\n')
    assert key(data_path=str(one)) == key(data_path=str(copy)) != key(data_path=str(other))
    held_out = {"eval_steps": 1}
    assert key(**held_out, eval_data_path=str(one)) != key(**held_out, eval_data_path=str(other))


def test_recorded_completions_count_by_what_is_in_them(tmp_path: Path) -> None:
    for name, tokens in {"one": [1, 2], "copy": [1, 2], "other": [1, 3]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "step_000000.jsonl").write_text(f'{{"completion": {tokens}}}\n')
    one, copy, other = (key(rollout="replay", replay_path=str(tmp_path / name)) for name in ("one", "copy", "other"))
    assert one == copy != other
    with pytest.raises(ConfigError, match="absent: no recorded completions"):
        key(rollout="replay", replay_path=str(tmp_path / "absent"))


def test_checkpoints_count_by_what_is_in_them(tmp_path: Path) -> None:
    model, copy, other = models(tmp_path)
    assert key(model_name=model) == key(model_name=copy) != key(model_name=other)


def models(folder: Path) -> list[str]:
    """A checkpoint, a copy of it, and one that differs in a bit."""
    model = Path(__file__).parents[2] / "examples/demo/model"
    shutil.copytree(model, folder / "copy"), shutil.copytree(model, folder / "other")
    weights = next((folder / "other").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return [str(model), str(folder / "copy"), str(folder / "other")]


def of(**flags: Any) -> str:
    return identity.of_evaluation("addition", flags, Contents())


def test_what_an_evaluation_compares_with_counts_by_what_is_in_it(tmp_path: Path) -> None:
    model, copy, other = (of(retention=True, base_model_name=name) for name in models(tmp_path))
    assert model == copy != other
    for name, correct in {"a": "true", "b": "true", "c": "false"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers.jsonl").write_text(f'{{"correct": {correct}}}\n')
    one, same, another_ = (of(retention=True, base_model_name="m", base_answers=str(tmp_path / name)) for name in "abc")
    assert one == same != another_


def test_evaluations_count_apart() -> None:
    assert of(max_completion_length=40) == of(max_completion_length=40, batch_size=8) != of(max_completion_length=41)
