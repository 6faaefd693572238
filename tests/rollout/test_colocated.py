"""Real vLLM in the ranks of a TP=2 x PP=2 trainer: what it samples with is what Megatron trains, or the run stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import colocated_checks as checks
from distributions import log_probs_of
from unisd_megatron.train.metrics import read_metrics
from unisd_megatron.weights.hf import save_folder
from unisd_megatron.weights.tiny import EOS_ID, PAD_ID, write_tiny

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(900)
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes; its qwen2 wants hidden size / heads
    "max_position_embeddings": 512,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}


def write_models(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, kind in (("qwen2", Qwen2Config), ("llama", LlamaConfig)):
        for tied in (True, False):
            model = AutoModelForCausalLM.from_config(kind(**SHAPE, tie_word_embeddings=tied))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
            model.save_pretrained(folder / f"{name}-{'tied' if tied else 'untied'}")
    write_tiny("qwen3_moe", folder / "qwen3_moe", seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colocated")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """One launch of everything."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", checks.__file__, str(folder)]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=800,  # 80 s on two idle cores
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


def test_log_probs_are_megatrons_after_the_first_sync_and_the_tenth(found: dict[str, Any]) -> None:
    assert len(found["gaps"]) == 4
    for case, gaps in found["gaps"].items():
        assert len(gaps) == checks.SYNCS
        assert max(gaps) <= 1e-5, (case, gaps)
        assert max(gaps) > 0, case  # the engine computes in an order of its own; equality would mean nobody looked


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one row corrupted", "its weights or caches are stale"),
        ("cache not reset", "tokens of a prompt in its cache right after it was told to drop it"),
        ("tied head stale", "nothing came for the engine's"),
        ("tied head stale, first sync", "nothing came for the engine's"),
        ("a step behind", "rollout engine 0 computes with other weights than the student's (model.layers.0."),
        ("no k_proj", "self_attn.qkv_proj 16576 of 24768 elements came"),
        ("one rank fails", "no memory"),
        ("healthy again", "accepted"),
    ],
)
def test_a_broken_sync_stops_the_run(found: dict[str, Any], fault: str, words: str) -> None:
    assert words in found["faults"][fault]


def test_an_expert_that_does_not_come_is_missed(found: dict[str, Any]) -> None:
    assert found["experts"] == "accepted"
    assert "mlp.experts" in found["no up_proj of an expert"] and "elements came" in found["no up_proj of an expert"]


def test_completions_are_draws_from_the_sampling_distribution(found: dict[str, Any], folder: Path) -> None:
    """The weights that Megatron streamed, the log-probs that vLLM reported, and the definition of every sampling setting."""
    save_folder(folder / "hf", folder / "qwen2-tied", torch.load(folder / "weights.pt", weights_only=True).items())
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    assert found["alone"] == [found["completions"][0][0][0], len(found["gaps"]["qwen2-tied"]) + 4]  # the syncs of `faults`
    for sampling, said in zip((checks.WARM, checks.SHAPED), found["completions"], strict=True):
        assert len(said) == len(checks.requests())
        for request, (ids, log_probs, reason) in zip(checks.requests(), said, strict=True):
            assert (reason == "stop") == (ids[-1] == EOS_ID) and len(log_probs) == len(ids)
            assert log_probs == pytest.approx(log_probs_of(model, request.prompt, ids, sampling), abs=2e-5)


def test_experts_dealt_out_over_ranks_arrive_too(tmp_path: Path) -> None:
    """A run with expert parallelism: the first sync proves every tensor, each sync the log-probs."""
    write_tiny("qwen3_moe", tmp_path / "moe", seed=0)
    flags = {
        "model_name": tmp_path / "moe",
        "output_dir": tmp_path / "run",
        "mode": "vanilla",
        "dataset": "addition",
        "num_train_examples": 16,
        "global_batch_size": 8,
        "max_prompt_length": 128,
        "max_completion_length": 16,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "expert_model_parallel_size": 2,
        "vllm_kv_cache_gib": 0.1,
    }
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "unisd_megatron", "train", "--use_vllm"]
    done = subprocess.run(
        [sys.executable, *words, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,  # 25 s on two idle cores
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 3
    assert all(0 < row["rollout/sync_gap"] <= 1e-5 and 0 < row["rollout/logp_gap"] <= 1e-5 for row in metrics)
