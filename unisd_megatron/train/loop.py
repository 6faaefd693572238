"""A training run from the first step to the exported folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from unisd_megatron.batch import STUDENT
from unisd_megatron.config import Run
from unisd_megatron.errors import CheckFailed
from unisd_megatron.evaluate.run import Question, accuracy, answer, ask, each_sample
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.rollout.engine import Sampling, sequence_seed
from unisd_megatron.rollout.replay import require_recordings, rollout_file
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.train import checkpoint, course, folder
from unisd_megatron.train.build import Prepared, assemble, prepare
from unisd_megatron.train.drift import DRIFT
from unisd_megatron.train.metrics import EVALUATIONS, Journal, answers_file, drop_later_answers, rewrite_rows, write_rows
from unisd_megatron.train.step import Parts, Report, train_step
from unisd_megatron.train.stopping import Stopping
from unisd_megatron.train.watching import WandbCurves
from unisd_megatron.validation import validate
from unisd_megatron.weights import stream
from unisd_megatron.weights.hf import save_folder


def train(run: Run) -> str | None:
    """Carries out a run, or as much of it as there is time for. Called on every rank, as torchrun starts them.

    Returns what is to be said at the end if this start did not train to the last step: it was asked to stop, or there was
    nothing left to do. Raises a `RequestError` before any process group exists where the request is wrong, `CheckFailed`
    where the run must not go on. Nothing is written before the request has been checked.
    """
    with Stopping(run.schedule.exit_duration_in_mins) as stopping:
        return _carry_out(run, stopping)


def _carry_out(run: Run, stopping: Stopping) -> str | None:
    world_size = start.world_size_from_environment()
    validate(run, world_size)
    platform = platforms.choose(run.accelerator, run.layout, world_size)
    prepared = prepare(run, world_size)
    beginning = folder.begin(run, prepared)
    output, resume, first = beginning.output, beginning.resume, beginning.first
    if beginning.finished:
        return f"{output}: finished after {first} steps; nothing to do"
    held_out = _held_out(run, prepared) if run.schedule.eval_steps else None
    if run.rollout.rollout == "replay":
        require_recordings(Path(run.rollout.replay_path or ""), range(first, prepared.max_steps))
    minutes = run.schedule.distributed_timeout_minutes
    with course.told(output) as where, start.world(platform, run.layout, run.schedule.seed, minutes) as grid:
        beginning.agree(grid.world)
        parts = assemble(run, prepared, platform, grid)
        engine = parts.rollouts.engine
        with contextlib.nullcontext() if engine is None else contextlib.closing(engine):
            if resume is not None:
                checkpoint.restore(resume, parts.learner)
            dist.barrier()
            journal = _open_journal(run, prepared, output, first, platform.lines, resume) if grid.world.rank == 0 else None
            if journal is not None and isinstance(engine, ServerEngine):
                for note in engine.notes:
                    journal.say(note)
                engine.tell = journal.say
            try:
                steps = where.steps(range(first, prepared.max_steps))
                stopped = _steps(parts, prepared, steps, output, journal, held_out, stopping)
            finally:
                if journal is not None:
                    journal.close()
            if stopped is not None:
                return stopped
            if run.schedule.export_hf:
                _export(parts, prepared, output)
            if grid.world.rank == 0:
                folder.write_finished(run, prepared, output)
    return None


def _open_journal(run: Run, prepared: Prepared, output: Path, first: int, platform: list[str], resume: Path | None) -> Journal:
    """Creates the run's folder; from here on something is written. Rank 0 only."""
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.set_aside_later(output, first)
    rewrite_rows(output / EVALUATIONS, lambda row: row["step"] < first)
    drop_later_answers(output, first)
    folder.write_run_file(run, prepared.identity, output, _versions(platform))
    board = Path(run.schedule.tensorboard_dir) if run.schedule.tensorboard_dir else None
    watcher = WandbCurves(run, output) if run.schedule.wandb_project else None
    journal = Journal(output, first, prepared.max_steps, board, watcher)
    for line in [*platform, *prepared.notes, *([f"resumed from {resume}, step {first}"] if resume else [])]:
        journal.say(line)
    return journal


def _steps(
    parts: Parts,
    prepared: Prepared,
    steps: Iterator[int],
    output: Path,
    journal: Journal | None,
    held_out: HeldOut | None,
    stopping: Stopping,
) -> str | None:
    """All of the steps, or up to the one at whose end the ranks agree to stop: what is to be said then."""
    schedule, last = parts.run.schedule, prepared.max_steps
    saver = checkpoint.Saver(parts.learner, parts.run, prepared.identity)
    try:
        for step in steps:
            saver.finish(wait=False)
            if held_out is not None and step % schedule.eval_steps == 0:
                _evaluate(parts, prepared, step, output, journal, held_out)
            report = train_step(parts, step)
            if journal is not None:
                journal.record(step, report.metrics, report.histograms)
                if DRIFT in report.metrics:
                    journal.say(f"step {step}: KL(teacher || teacher in FP8) is {report.metrics[DRIFT]:.3g} nats per token")
            if schedule.save_rollouts and journal is not None:
                _record_rollouts(parts, report, step, output)
            reason = stopping.reason(parts.learner.grid.world) if step + 1 < last else None
            if reason or step + 1 == last or (schedule.save_steps and (step + 1) % schedule.save_steps == 0):
                saver.save(step + 1)
            if reason:
                saver.finish(wait=True)
                return (
                    f"stopped after step {step + 1} of {last} ({reason}), with a checkpoint; "
                    f"--resume_from_checkpoint auto goes on from {output}"
                )
        if held_out is not None:
            _evaluate(parts, prepared, last, output, journal, held_out)
    except CheckFailed:  # every rank raises it alike, so all can complete the checkpoint that is on its way
        saver.finish(wait=True)
        raise
    saver.finish(wait=True)
    return None


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
    engine, sync = parts.rollouts.engine, parts.rollouts.sync
    assert engine is not None and sync is not None
    sync.refresh(steps_done)
    longest = parts.run.rollout.max_completion_length
    answers = answer(
        each_sample(held_out.questions),
        engine,
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
        journal.score(steps_done, score, len(held_out.questions))


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
            "counts": sample.counts,
        }
        for i, sample in enumerate(report.samples)
    ]
    write_rows(rollout_file(output / "rollouts", step), rows)


def _export(parts: Parts, prepared: Prepared, output: Path) -> None:
    """The student as a Hugging Face folder, `RUN/hf`. Collective."""
    grid = parts.learner.grid
    target = output / "hf"
    with parts.learner.student.in_full():
        mine = list(parts.learner.student.named_shards())
    tensors = stream.full_tensors(mine, prepared.source.mappings, grid)
    if grid.world.rank == 0:
        if target.exists():
            shutil.rmtree(target)  # of an earlier end of this same run
        save_folder(target, prepared.source.path, tensors, dtype=parts.learner.student.model.config.params_dtype)
    else:
        for _ in tensors:
            pass
    dist.barrier()


def _versions(platform: list[str]) -> dict[str, str]:
    names = ("unisd_megatron", "torch", "megatron-core", "transformers", "safetensors")
    return {"platform": "; ".join(platform)} | {name: importlib.metadata.version(name) for name in names}
