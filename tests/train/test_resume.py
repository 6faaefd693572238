"""A resumed run is the same run: bit for bit on the same layout, to rounding on another; nothing incomplete is picked up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runs import STAR, curve, run
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.resolve import resolve
from unisd_megatron.train import checkpoint
from unisd_megatron.weights.tiny import write_tiny
from world import World

LAYOUT = {"pipeline_model_parallel_size": 2}
KEEP = {"save_steps": 3, "save_total_limit": 0, "token_clip_quantile": 0.9}


@pytest.fixture(scope="module")
def unbroken(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    run(world, 2, output, **STAR, **LAYOUT, **KEEP, max_steps=6)
    return output


def broken_before_the_last(finished: Path, output: Path) -> Path:
    """The folder of a run that was killed while it wrote its last checkpoint, and a line of its metrics."""
    shutil.copytree(finished, output)
    last = checkpoint.complete(output)[-1]
    last.rename(last.with_name(last.name + ".partial"))
    with (output / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "loss": 0.1')
    return output


def test_same_layout_bit_for_bit(world: World, unbroken: Path, tmp_path: Path) -> None:
    output = broken_before_the_last(unbroken, tmp_path / "run")
    metrics = run(world, 2, output, **STAR, **LAYOUT, **KEEP, max_steps=6, resume_from_checkpoint="latest")
    assert [row["step"] for row in metrics] == list(range(6))
    expected = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert curve(metrics, "clip/next_ceiling", "entropy") == curve(expected, "clip/next_ceiling", "entropy")


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2}),
        (
            4,
            {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        ),
    ],
)
def test_another_layout(world: World, unbroken: Path, tmp_path: Path, size: int, layout: dict[str, Any]) -> None:
    output = broken_before_the_last(unbroken, tmp_path / "run")
    replay = {"rollout": "replay", "replay_path": str(unbroken / "rollouts")}
    metrics = run(world, size, output, **STAR, **layout, **KEEP, **replay, max_steps=6, resume_from_checkpoint="latest")
    expected = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    for found, wanted in zip(curve(metrics), curve(expected), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_distributed_optimizer_resumes_under_another_data_parallel_size(world: World, tmp_path: Path) -> None:
    sharded = {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2}
    run(world, 4, tmp_path / "run", **STAR, **sharded, **KEEP, max_steps=6)
    expected = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    replay = {"rollout": "replay", "replay_path": str(tmp_path / "run" / "rollouts")}
    for size in (4, 2):
        output = broken_before_the_last(tmp_path / "run", tmp_path / f"resumed{size}")
        metrics = run(world, size, output, **STAR, **sharded, **KEEP, **replay, max_steps=6, resume_from_checkpoint="latest")
        for found, wanted in zip(curve(metrics), curve(expected), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4), size


@pytest.mark.parametrize("sharded", [True, False])
def test_experts_dealt_out_anew(world: World, tmp_path: Path, sharded: bool) -> None:
    """Bit for bit over as many ranks as before, to rounding over others and back: student, teacher and optimizer alike."""
    write_tiny("qwen3_moe", tmp_path / "moe", seed=0)
    flags = {**STAR, **KEEP, "save_steps": 1, "model_name": str(tmp_path / "moe"), "use_distributed_optimizer": sharded}
    dealt: dict[str, Any] = {"expert_model_parallel_size": 2}
    both = {**dealt, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    run(world, 2, tmp_path / "run0", **flags, **dealt, max_steps=4)
    expected = [json.loads(line) for line in (tmp_path / "run0" / "metrics.jsonl").read_text().splitlines()]
    replay = {"rollout": "replay", "replay_path": str(tmp_path / "run0" / "rollouts")}
    # From a checkpoint of two ranks with half of the experts each; of the same; of one with all of them.
    for number, (size, layout, step) in enumerate([(2, dealt, 2), (1, {}, 2), (4, both, 3)]):
        output = tmp_path / f"run{number + 1}"
        shutil.copytree(tmp_path / f"run{2 if number == 2 else 0}", output)
        checkpoint_of_step = str(output / "checkpoints" / f"step_{step:06d}")
        metrics = run(world, size, output, **flags, **layout, **replay, max_steps=4, resume_from_checkpoint=checkpoint_of_step)
        for found, wanted in zip(curve(metrics), curve(expected), strict=True):
            assert found == (wanted if number == 0 else pytest.approx(wanted, rel=1e-4)), (size, layout)


def test_half_written_and_foreign_checkpoints_are_refused(world: World, unbroken: Path, tmp_path: Path) -> None:
    output = broken_before_the_last(unbroken, tmp_path / "run")
    partial = output / "checkpoints" / "step_000006.partial"
    with pytest.raises(CheckpointError, match="half-written"):
        checkpoint.find(output, str(partial))
    (output / "checkpoints" / "step_000003" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="state.json is missing"):
        checkpoint.find(output, "latest")
    with pytest.raises(ConfigError, match="--seed 42; this run has 7"):
        run(world, 1, unbroken, **STAR, **KEEP, max_steps=6, seed=7, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="not empty"):
        run(world, 1, unbroken, **STAR, **KEEP, max_steps=6)


def test_old_checkpoints_go_and_the_newest_stays(world: World, tmp_path: Path) -> None:
    run(world, 1, tmp_path / "run", mode="vanilla", save_steps=1, save_total_limit=2, max_steps=4)
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["step_000003", "step_000004"]


def test_an_older_checkpoint_starts_a_new_course(world: World, unbroken: Path, tmp_path: Path) -> None:
    """Later checkpoints of the abandoned course are set aside, and the newest of the new one is never pruned."""
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    older = output / "checkpoints" / "step_000003"
    flags = {**STAR, **KEEP, "save_total_limit": 1, "save_steps": 1, "max_steps": 6, "resume_from_checkpoint": str(older)}
    run(world, 1, output, **flags)
    assert [path.name for path in checkpoint.complete(output)] == ["step_000006"]
    assert (output / "checkpoints" / "step_000006.superseded").is_dir()


def test_a_checkpoint_does_not_resume_into_a_folder_of_something_else(world: World, unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "hf").mkdir(parents=True)
    path = str(unbroken / "checkpoints" / "step_000003")
    with pytest.raises(CheckpointError, match="not of its run"):
        run(world, 1, tmp_path / "other", **STAR, **KEEP, max_steps=6, resume_from_checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_train_examples": 32}, "num_train_examples"), ({"use_distributed_optimizer": True}, "use_distributed_optimizer")],
)
def test_another_run_is_not_resumed(world: World, unbroken: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(world, 1, unbroken, **STAR, **KEEP, **change, max_steps=6, resume_from_checkpoint="latest")


def test_a_checkpoint_that_was_moved_is_the_same_and_another_in_its_place_is_not(world: World, tmp_path: Path) -> None:
    """A frozen teacher reads it again."""
    for name, seed in {"model": 0, "other": 1}.items():
        write_tiny("qwen2", tmp_path / name, seed=seed)
    flags = {"mode": "vanilla", "save_steps": 1, "max_steps": 2}
    expected = run(world, 1, tmp_path / "run", **flags, model_name=str(tmp_path / "model"))
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    with pytest.raises(ConfigError, match="was written with model .* the checkpoint that it began from"):
        run(world, 1, output, **flags, model_name=str(tmp_path / "other"), resume_from_checkpoint="latest")
    (tmp_path / "model").rename(tmp_path / "moved")
    metrics = run(world, 1, output, **flags, model_name=str(tmp_path / "moved"), resume_from_checkpoint="latest")
    assert curve(metrics) == curve(expected)


def test_respelt_paths_of_what_is_read_are_no_matter() -> None:
    """Their contents stand in the identity: digests of the weights and of all prompts, which the embeddings chose."""
    stated = {"mode": "agreement_seq_retrieval", "num_auxiliary_contexts": 2, "data_path": "here/data.jsonl"}
    run_ = resolve(stated | {"model_name": "here/model", "retrieval_model": "here/embedder"}, {})
    elsewhere = {"model_name": "/there/model", "retrieval_model": "/there/embedder", "data_path": "/there/data.jsonl"}
    state = {"settings": run_.flat() | elsewhere, "identity": {"data": "d", "model": "m"}}
    checkpoint.check_same_run(state, run_, {"data": "d", "model": "m"}, Path("step_000001"))
    with pytest.raises(ConfigError, match="data d; this run has e"):
        checkpoint.check_same_run(state, run_, {"data": "e", "model": "m"}, Path("step_000001"))


def test_released_semantics_are_resumed_on_as_many_processes(world: World, tmp_path: Path) -> None:
    flags = {"mode": "vanilla", "semantics": "released", "save_steps": 1, "max_steps": 2}
    run(world, 1, tmp_path / "run", **flags)
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    with pytest.raises(ConfigError, match="was written with processes 1; this run has 2; start as many"):
        run(world, 2, output, **flags, resume_from_checkpoint="latest")
    assert len(run(world, 1, output, **flags, resume_from_checkpoint="latest")) == 2


def test_other_data_under_the_same_name_is_not_resumed(world: World, tmp_path: Path) -> None:
    rows = [json.dumps({"a": a, "b": 7}) + "\n" for a in range(100)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    flags = {"mode": "vanilla", "data_path": str(tmp_path / "data.jsonl"), "max_steps": 1}
    run(world, 1, tmp_path / "run", **flags)
    (tmp_path / "data.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(ConfigError, match="was written with data"):
        run(world, 1, tmp_path / "run", **flags, resume_from_checkpoint="latest")


def test_evaluations_after_the_checkpoint_are_made_anew(world: World, tmp_path: Path) -> None:
    flags = {"mode": "vanilla", "eval_steps": 1, "eval_examples": 4, "save_steps": 1, "save_total_limit": 0, "max_steps": 2}
    run(world, 1, tmp_path / "run", **flags)
    output = broken_before_the_last(tmp_path / "run", tmp_path / "resumed")
    run(world, 1, output, **flags, resume_from_checkpoint="latest")
    rows = (output / "evaluations.jsonl").read_text()
    assert [json.loads(line)["step"] for line in rows.splitlines()] == [0, 1, 2]
    assert rows == (tmp_path / "run" / "evaluations.jsonl").read_text()
