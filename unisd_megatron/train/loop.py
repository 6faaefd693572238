"""A training run from the first step to the exported folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from unisd_megatron.batch import STUDENT
from unisd_megatron.config import Run
from unisd_megatron.errors import CheckFailed, CheckpointError
from unisd_megatron.evaluate.run import Question, accuracy, answer, ask, each_sample
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.rollout.engine import Sampling, sequence_seed
from unisd_megatron.rollout.replay import require_recordings, rollout_file
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.train import checkpoint, course
from unisd_megatron.train.build import Prepared, assemble, prepare, write_run_file
from unisd_megatron.train.metrics import EVALUATIONS, Journal, answers_file, drop_later_answers, rewrite_rows, write_rows
from unisd_megatron.train.step import Parts, Report, train_step
from unisd_megatron.train.watching import WandbCurves
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import require_new_folder, save_folder


def train(run: Run) -> None:
    """Carries out a run. Called on every rank, as torchrun starts them.

    Raises a `RequestError` before any process group exists where the request is wrong, `CheckFailed` where the run must
    not go on. Nothing is written before the request has been checked.
    """
    platform = platforms.choose()
    world_size = start.world_size_from_environment()
    prepared = prepare(run, world_size)
    output, resume = _check_output(run, prepared)
    held_out = _held_out(run, prepared) if run.schedule.eval_steps else None
    first = int(checkpoint.read_state(resume)["steps_done"]) if resume is not None else 0
    if run.rollout.rollout == "replay":
        require_recordings(Path(run.rollout.replay_path or ""), range(first, prepared.max_steps))
    minutes = run.schedule.distributed_timeout_minutes
    with course.told(output) as where, start.world(platform, run.layout, run.schedule.seed, minutes) as grid:
        parts = assemble(run, prepared, platform, grid)
        with contextlib.closing(parts.rollouts.engine):
            if resume is not None:
                checkpoint.restore(resume, parts.learner)
            dist.barrier()
            journal = _open_journal(run, prepared, output, first, platform.reason, resume) if grid.world.rank == 0 else None
            if journal is not None and isinstance(parts.rollouts.engine, ServerEngine):
                for note in parts.rollouts.engine.notes:
                    journal.say(note)
                parts.rollouts.engine.tell = journal.say
            try:
                _steps(parts, prepared, where.steps(range(first, prepared.max_steps)), output, journal, held_out)
            finally:
                if journal is not None:
                    journal.close()
            if run.schedule.export_hf:
                _export(parts, prepared, output)


def _open_journal(run: Run, prepared: Prepared, output: Path, first: int, platform: str, resume: Path | None) -> Journal:
    """Creates the run's folder; from here on something is written. Rank 0 only."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.set_aside_later(output, first)
    rewrite_rows(output / EVALUATIONS, lambda row: row["step"] < first)
    drop_later_answers(output, first)
    write_run_file(run, output, _versions(platform))
    board = Path(run.schedule.tensorboard_dir) if run.schedule.tensorboard_dir else None
    watcher = WandbCurves(run, output) if run.schedule.wandb_project else None
    journal = Journal(output, first, prepared.max_steps, board, watcher)
    for line in [platform, *prepared.notes, *([f"resumed from {resume}, step {first}"] if resume else [])]:
        journal.say(line)
    return journal


def _check_output(run: Run, prepared: Prepared) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to resume from; `CheckpointError` if the folder holds another run."""
    assert run.schedule.output_dir is not None
    output = Path(run.schedule.output_dir)
    if run.schedule.resume_from_checkpoint is None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(
                f"{output}: not empty; choose a new --output_dir, or continue that run with --resume_from_checkpoint latest"
            )
        if not output.exists():
            require_new_folder(output)
        return output, None
    path = checkpoint.find(output, run.schedule.resume_from_checkpoint)
    checkpoint.check_same_run(checkpoint.read_state(path), run, prepared.identity, path)
    elsewhere = path.resolve().parent.parent != output.resolve()
    if elsewhere and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: not empty, and the checkpoint {path} is not of its run; choose a new --output_dir")
    return output, path


def _steps(
    parts: Parts, prepared: Prepared, steps: Iterator[int], output: Path, journal: Journal | None, held_out: HeldOut | None
) -> None:
    schedule = parts.run.schedule
    saver = checkpoint.Saver(parts.learner, parts.run, prepared.identity)
    try:
        for step in steps:
            saver.finish(wait=False)
            if held_out is not None and step % schedule.eval_steps == 0:
                _evaluate(parts, prepared, step, output, journal, held_out)
            report = train_step(parts, step)
            if journal is not None:
                journal.record(step, report.metrics, report.histograms)
            if schedule.save_rollouts and journal is not None:
                _record_rollouts(parts, report, step, output)
            if step + 1 == prepared.max_steps or (schedule.save_steps and (step + 1) % schedule.save_steps == 0):
                saver.save(step + 1)
        if held_out is not None:
            _evaluate(parts, prepared, prepared.max_steps, output, journal, held_out)
    except CheckFailed:  # every rank raises it alike, so all can complete the checkpoint that is on its way
        saver.finish(wait=True)
        raise
    saver.finish(wait=True)


@dataclass(frozen=True)
class HeldOut:
    """The questions that the student is evaluated on, and who scores its answers."""

    questions: list[Question]
    judge: Judge


def _held_out(run: Run, prepared: Prepared) -> HeldOut:
    """Raises a `RequestError` where answers are programs and this machine cannot confine them."""
    records = prepared.task.load("test", run.schedule.eval_data_path)[: run.schedule.eval_examples]
    return HeldOut(ask(prepared.task, records, prepared.tokenizer), Judge(prepared.task, records[0]))


def _evaluate(
    parts: Parts, prepared: Prepared, steps_done: int, output: Path, journal: Journal | None, held_out: HeldOut
) -> None:
    """Greedy accuracy of the student on the task's held-out questions, appended to `evaluations.jsonl`; its answers beside."""
    parts.rollouts.sync.refresh(steps_done)
    longest = parts.run.rollout.max_completion_length
    answers = answer(
        each_sample(held_out.questions),
        parts.rollouts.engine,
        Sampling(0.0, 1.0, 0, longest, prepared.eos_ids),
        prepared.tokenizer,
        held_out.judge,
        parts.learner.grid.world,
        max_prompt_length=prepared.source.arch.max_position - longest,
    )
    score = accuracy(answers)
    if journal is not None:
        kept = ("id", "prompt", "completion", "finished", "correct", "failure")
        write_rows(answers_file(output, steps_done), [{name: getattr(one, name) for name in kept} for one in answers])
        journal.say(f"step {steps_done}: held-out accuracy {100 * score:.1f} % of {len(held_out.questions)}")
        with (output / EVALUATIONS).open("a", encoding="utf-8") as stream_:
            stream_.write(json.dumps({"step": steps_done, "accuracy": score, "examples": len(held_out.questions)}) + "\n")


def _record_rollouts(parts: Parts, report: Report, step: int, output: Path) -> None:
    """Writes the completions of a step, for `--rollout replay`. Rank 0 only."""
    rows = [
        {
            "id": sample.prompts.id,
            "seed": sequence_seed(parts.run.schedule.seed, step, i),
            "prompt": sample.prompts.views[STUDENT],
            "completion": sample.completion.token_ids,
            "log_probs": sample.completion.log_probs,
            "finish_reason": sample.completion.finish_reason,
            "version": sample.completion.version,
        }
        for i, sample in enumerate(report.samples)
    ]
    write_rows(rollout_file(output / "rollouts", step), rows)


def _export(parts: Parts, prepared: Prepared, output: Path) -> None:
    """The student as a Hugging Face folder, `RUN/hf`. Collective."""
    grid = parts.learner.grid
    target = output / "hf"
    tensors = stream.full_tensors(parts.learner.student.model.named_shards(), prepared.source.mappings, grid)
    if grid.world.rank == 0:
        if target.exists():
            shutil.rmtree(target)  # of an earlier end of this same run
        save_folder(target, prepared.source.path, tensors, dtype=parts.learner.student.model.config.params_dtype)
    else:
        for _ in tensors:
            pass
    dist.barrier()


def _versions(platform: str) -> dict[str, str]:
    names = ("unisd_megatron", "torch", "megatron-core", "transformers", "safetensors")
    return {"platform": platform} | {name: importlib.metadata.version(name) for name in names}
