"""From a validated request to the parts of a run: what can be checked before process groups, then what needs them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unisd_megatron.batch import STUDENT, Prompts
from unisd_megatron.config import Run
from unisd_megatron.convert.source import Source, load_stage, open_source
from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import TASKS, Sampler, Task, build_examples
from unisd_megatron.data.tokens import encode_examples
from unisd_megatron.errors import ConfigError
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import Objective, loss_settings
from unisd_megatron.rollout.engine import RolloutEngine, Sampling
from unisd_megatron.rollout.replay import ReplayEngine
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.train.step import Learner, Parts
from unisd_megatron.validation import validate
from unisd_megatron.weights.hf import eos_ids


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a process group exists."""

    source: Source
    tokenizer: Any
    eos_ids: tuple[int, ...]
    task: Task
    prompts: list[Prompts]
    max_steps: int
    notes: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run itself beside its settings, as checkpoints record it."""
        digest = hashlib.sha256(repr([(one.id, sorted(one.views.items())) for one in self.prompts]).encode()).hexdigest()
        return {"data": digest[:16], "max_steps": self.max_steps}


def prepare(run: Run, world_size: int) -> Prepared:
    """Reads and checks the request: settings, model folder, layout against model, tokenizer, data. No process group.

    Raises a `RequestError` for whatever is wrong.
    """
    validate(run, world_size)
    source = open_source(run.model_name, run.layout)
    tokenizer = load_tokenizer(source)
    task = TASKS[run.data.dataset]() if run.data.dataset in TASKS else None
    if task is None:
        raise ConfigError(f"unknown --dataset {run.data.dataset!r}; use one of {', '.join(TASKS)}")
    records = task.load("train", run.data.data_path)[: run.data.num_train_examples]
    if run.schedule.eval_steps:  # held-out questions that are missing, or a task that cannot be scored, are refused now
        task.is_correct(task.load("test", run.schedule.eval_data_path)[0], "")
    views = loss_settings(run).views if run.agreement is not None else 0
    examples, without_negative = build_examples(
        task,
        records,
        auxiliary=views,
        donors_per_context=run.data.demo_k,
        negatives=run.needs_negative,
        seed=run.schedule.seed,
    )
    prompts, too_long = encode_examples(tokenizer, examples, run.data.max_prompt_length)
    _check_length(prompts, run, source)
    notes = [f"{len(prompts)} examples of {task.name}; dropped: {too_long} too long, {without_negative} without a negative"]
    if run.agreement is not None and views == 1:
        notes.append("warning: with one auxiliary context nothing can disagree; all agreement weights are 1")
    if teacher_kind(run) != run.teacher.teacher:
        notes.append("released semantics: the EMA teacher stays where it started")
    max_steps = run.schedule.max_steps or max(
        1, round(run.schedule.num_train_epochs * len(prompts) / run.layout.global_batch_size)
    )
    return Prepared(source, tokenizer, eos_ids(source.path), task, prompts, max_steps, notes)


def _check_length(prompts: list[Prompts], run: Run, source: Source) -> None:
    longest = max(len(ids) for one in prompts for ids in one.views.values())
    if longest + run.rollout.max_completion_length > source.arch.max_position:
        raise ConfigError(
            f"prompts of up to {longest} tokens and completions of up to {run.rollout.max_completion_length} exceed the "
            f"{source.arch.max_position} positions of {run.model_name}; lower --max_prompt_length or --max_completion_length"
        )


def assemble(run: Run, prepared: Prepared, platform: Platform, grid: Grid) -> Parts:
    """Models, optimizer, engine and sampler on this rank. Collective over all ranks."""

    def stage() -> Stage:
        return load_stage(prepared.source, run.layout, platform, grid)

    model = stage()
    kind, memory = teacher_kind(run), run.teacher.teacher_memory
    teacher = Teacher(
        stage() if kind != "live" and memory == "beside" else model,
        kind,
        grid,
        beta=run.teacher.ref_model_mixup_beta or 0.0,
        every=run.teacher.ref_model_sync_steps or 0,
        memory=memory,
    )
    student = Student(model, run.layout, run.optimization, prepared.max_steps, grid)
    learner = Learner(student, teacher, Objective(loss_settings(run), grid.data, grid.data_context), prepared.source.arch, grid)
    lengths = [len(one.views[STUDENT]) for one in prepared.prompts]
    return Parts(
        run=run,
        learner=learner,
        engine=_engine(run, prepared, grid),
        sampling=Sampling(
            run.rollout.temperature, run.rollout.top_p, run.rollout.top_k, run.rollout.max_completion_length, prepared.eos_ids
        ),
        sampler=Sampler(lengths, run.layout.global_batch_size, run.schedule.seed),
        prompts=prepared.prompts,
        mappings=prepared.source.mappings,
    )


def teacher_kind(run: Run) -> Literal["frozen", "ema", "live"]:
    """The teacher a run trains with. Under released semantics the EMA teacher never moves, as in the authors' LoRA runs."""
    assert run.teacher.teacher is not None
    released = run.objective.semantics == "released"
    return "frozen" if released and run.teacher.teacher == "ema" else run.teacher.teacher


def _engine(run: Run, prepared: Prepared, grid: Grid) -> RolloutEngine:
    if run.rollout.rollout == "replay":
        assert run.rollout.replay_path is not None
        return ReplayEngine(Path(run.rollout.replay_path))
    return TransformersEngine(prepared.source.path, grid, torch.bfloat16 if run.layout.bf16 else torch.float32)


def write_run_file(run: Run, folder: Path, notes: dict[str, str]) -> None:
    """`run.json`: settings by flag name, the origin of each, versions. `--config run.json` repeats the run."""
    content = {"settings": run.flat(), "origins": dict(run.origins), "versions": notes}
    partial = folder / "run.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(folder / "run.json")
