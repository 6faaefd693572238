"""`unisd plan` as a user meets it: models by name, layouts that fit, one line where none does; and no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unisd_megatron.cli import main
from unisd_megatron.config import Run
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import FAMILIES
from unisd_megatron.plan import GPUS, PUBLISHED, Assumed, Cluster, config_of, find_arch, flags, plan_run, propose, refuse
from unisd_megatron.plan.rollout import whole
from unisd_megatron.resolve import resolve

ASSUMED = Assumed()
SERVERS = {"use_vllm": True, "vllm_mode": "server"}


def run_of(**settings: Any) -> Run:
    return resolve({"model_name": "m", "bf16": True, "global_batch_size": 512, **settings}, {})


def cluster(gpus: int, gpu: str = "h100") -> Cluster:
    return Cluster(gpus, 8, GPUS[gpu])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_gives_the_published_count(name: str) -> None:
    _, arch = find_arch(name)
    padding = (arch.padded_vocab_size - arch.vocab_size) * arch.hidden_size * (1 if arch.tied else 2)
    counted = whole(arch) - padding
    if "vision_config" in config_of(name):  # the count of the hub has the image encoder too
        assert 0.9 * PUBLISHED[name] < counted < PUBLISHED[name]
    else:
        assert counted == PUBLISHED[name]


def test_a_name_is_found_whatever_its_case_organisation_and_ending(tmp_path: Path) -> None:
    _, arch = find_arch("Qwen2.5-7B-Instruct")
    for other in ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "someone/QWEN2.5-7B"):
        assert find_arch(other)[1] == arch
    assert find_arch("meta-llama/Meta-Llama-3.1-8B")[1] == find_arch("Llama-3.1-8B-Instruct")[1]
    (tmp_path / "config.json").write_text(json.dumps(config_of("Qwen2.5-7B-Instruct")))
    assert find_arch(str(tmp_path))[1] == find_arch(str(tmp_path / "config.json"))[1] == arch
    with pytest.raises(ConfigError, match=r"nearest: Qwen2\.5-7B"):
        find_arch("Qwen2.5-8B")


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("Qwen2.5-7B", 8), ("Qwen2.5-32B", 32), ("Llama-3.1-70B", 64), ("Llama-3.1-405B", 512), ("Qwen3-30B-A3B", 16)],
)
def test_what_is_proposed_fits_is_ranked_and_stands_as_it_is_stated(name: str, gpus: int) -> None:
    _, arch = find_arch(name)
    found = propose(run_of(), arch, cluster(gpus), ASSUMED)
    steps = [one.seconds.step for one in found]
    assert len(found) > 5 and all(a <= b + 1e-3 for a, b in zip(steps, steps[1:], strict=False))
    for one in found:
        assert one.memory.peak <= one.cluster.gpu.memory
        assert one.run.layout.tensor_model_parallel_size <= 8  # sums of tensor-parallel ranks stay inside a node
        assert one.run.layout.data_parallel_size(gpus) >= 1
    again = plan_run(found[0].run, arch, cluster(gpus), ASSUMED)
    assert again.numbers() == found[0].numbers()


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    stated = ["plan", "--model_name", "Llama-3.1-70B", "--gpus", "64", "--global_batch_size", "64", "--tp", "8"]
    assert main(stated) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and "a rank of pipeline stage 0 needs" in line and "a h100 has 79.6" in line
    near = line.split("nearest that fits: ")[1].split(" (")[0].split()
    assert "without" not in near
    assert main([*stated, *near]) == 0


def test_where_nothing_fits_the_fewest_gpus_are_said_and_do() -> None:
    _, arch = find_arch("Llama-3.1-70B")
    with pytest.raises(ConfigError, match="no layout fits 8 x h100; 32 are the fewest") as met:
        refuse(plan_run(run_of(tensor_model_parallel_size=8, **SERVERS), arch, cluster(8), ASSUMED))
    assert "\n" not in str(met.value)
    assert propose(run_of(), arch, cluster(32), ASSUMED)
    assert not propose(run_of(), arch, cluster(16), ASSUMED)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--gpu", "z9"], "unknown --gpu 'z9'"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "12"], "--gpus 12 is not a multiple of --gpus-per-node 8"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "0"], "no cluster"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--efficiency", "2"], "--efficiency is 2.0"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--mean-completion-length", "4096"], "between 1 and --max_completion"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--tp", "3"], "8 processes cannot hold"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--tp", "8", "--bs", "1"], "--bs"),
        (["--gpus", "8"], "--model_name is missing"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--max_completion_length", "0"], "--max_completion_length must be"),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--gpu", "a100-80", "--fp8-format", "hybrid"], "a100-80 has no FP8"),
        (
            ["--model_name", "Qwen3-30B-A3B", "--gpus", "8", "--teacher-fp8"],
            "--teacher-fp8 is Transformer Engine's, and the",
        ),
        (
            ["--model_name", "Gemma-3-27b-it", "--gpus", "8", "--attention-backend", "fused"],
            "local modules; drop it",
        ),
        (
            ["--model_name", "Qwen2.5-7B", "--gpus", "8", "--gpu", "b200", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
            "--fp8-recipe blockwise is made for Hopper (compute capability 9.0), not 10.0; use tensorwise",
        ),
        (["--model_name", "Qwen2.5-7B", "--gpus", "8", "--tp", "2", "--tp-comm-overlap"], "add --sequence-parallel"),
    ],
)
def test_a_wrong_request_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_settings_that_save_memory_do(capsys: pytest.CaptureFixture[str]) -> None:
    _, arch = find_arch("Qwen2.5-7B")
    plain = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "use_distributed_optimizer": True, **SERVERS}

    def peak(**change: Any) -> int:
        return plan_run(run_of(**{**plain, **change}), arch, cluster(32), ASSUMED).memory.peak

    for change in (
        {"recompute_granularity": "full"},
        {"teacher_memory": "swap"},
        {"teacher": "live", "mode": "vanilla"},
        {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        {"max_completion_length": 512},
    ):
        assert peak(**change) < peak(), change
    for change in ({"use_distributed_optimizer": False}, {"micro_batch_size": 4}, {"vllm_mode": "colocate"}):
        assert peak(**change) > peak(), change


def test_a_mode_without_a_teacher_or_samples_is_planned_without() -> None:
    _, arch = find_arch("Llama-3.1-8B")
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}

    def planned(mode: str, **more: Any) -> dict[str, Any]:
        return plan_run(run_of(mode=mode, **layout, **more), arch, cluster(8), ASSUMED).numbers()

    vanilla, sft, ssd = planned("vanilla"), planned("sft"), planned("ssd", sample_filter="stubs")
    for one in (sft, ssd):
        assert [(stage["teacher"], stage["ema"], stage["activations_heard"]) for stage in one["stages"]] == [(0, 0, 0)] * 2
        assert one["seconds"]["teacher"] == one["seconds"]["ema"] == 0 < one["seconds"]["student"]
        assert one["seconds"]["student"] < vanilla["seconds"]["student"]  # the head's logits of one model
    assert sft["seconds"]["rollout"] == sft["seconds"]["sync"] == sft["stages"][0]["engine_generating"] == 0
    assert ssd["seconds"]["rollout"] == vanilla["seconds"]["rollout"] > 0
    assert planned("sft", eval_steps=10)["stages"][0]["engine_generating"] > 0  # an evaluation generates
    half = planned("gkd", on_policy_share=0.5)["seconds"]["rollout"]
    assert 0 < half < planned("gkd", on_policy_share=1.0)["seconds"]["rollout"]


def test_shards_that_fp8_does_not_take_are_refused_as_in_training() -> None:
    _, arch = find_arch("Qwen2.5-7B")
    run = run_of(fp8_format="hybrid", tensor_model_parallel_size=2, **SERVERS)
    plan_run(run, arch, cluster(8), ASSUMED)
    odd = dataclasses.replace(arch, ffn_hidden_size=arch.ffn_hidden_size + 16)
    with pytest.raises(ConfigError, match=r"--fp8-format: .* a rank of m has feed-forward width 9480; lower it"):
        plan_run(run, odd, cluster(8), ASSUMED)


def test_fp8_copies_of_weights_are_counted() -> None:
    _, arch = find_arch("Qwen2.5-7B")  # 28 layers with 233,046,016 numbers in matrices each, over 4 ranks
    matrices = 28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) // 4
    assert matrices == 28 * 233_046_016 // 4

    def fp8(**more: Any) -> tuple[int, int]:
        layout = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "use_distributed_optimizer": True, **SERVERS}
        (stage,) = plan_run(run_of(**layout, **more), arch, cluster(8), ASSUMED).numbers()["stages"]
        return stage["fp8_copies"], stage["fp8_leaving"]

    assert fp8() == (0, 0)
    assert fp8(fp8_format="hybrid") == (2 * matrices, 0)
    assert fp8(fp8_format="hybrid", fp8_param_gather=True) == (0, 2 * matrices)
    assert fp8(teacher_fp8=True) == (matrices, 0)
    assert fp8(fp8_format="hybrid", teacher_fp8=True) == (3 * matrices, 0)
    assert fp8(fp8_format="hybrid", teacher_fp8=True, teacher_memory="swap") == (2 * matrices, 0)


def test_the_proposal_as_flags_is_the_proposal() -> None:
    _, arch = find_arch("Qwen2.5-32B")
    best = propose(run_of(), arch, cluster(32), ASSUMED)[0]
    stated: dict[str, Any] = {}
    words = flags(best).split()
    for i, word in enumerate(words):
        if word.startswith("--"):
            value: Any = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
            stated[word[2:].replace("-", "_")] = type(best.run.flat()[word[2:].replace("-", "_")])(value)
    assert run_of(**stated).layout == best.run.layout
    assert plan_run(run_of(**stated), arch, cluster(32), ASSUMED).memory.peak == best.memory.peak


def test_json_has_every_stage_and_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model_name",
        "Qwen2.5-7B",
        "--gpus",
        "8",
        "--json",
        "--tp",
        "2",
        "--pp",
        "2",
        "--use-vllm",
        "--vllm-mode",
        "server",
    ]
    assert main(["plan", *words, "--sequence-parallel", "--use-distributed-optimizer"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and len(said["stages"]) == 2
    parts = said["seconds"]
    assert parts["step"] == pytest.approx(sum(parts[n] for n in ("rollout", "sync", "teacher", "student", "optimizer", "ema")))


def test_the_command_loads_no_torch() -> None:
    words = ["plan", "--model_name", "Qwen2.5-7B", "--gpus", "8"]
    code = f"import sys; from unisd_megatron.cli import main; main({words}); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


HEAVY = ["torch", "numpy", "megatron", "transformers", "vllm"]


def test_every_family_is_counted_as_its_weight_map_counts() -> None:
    for name, family in FAMILIES.items():
        arch = family.arch({**family.tiny_config(), "vocab_size": 384})
        total = 0
        for mapping in family.mappings(arch):
            shape = mapping.shard_shape(1)
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
        assert whole(arch) == total, name
