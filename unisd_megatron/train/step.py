"""One training step: questions -> the student's completions -> what the teacher says -> loss -> gradients -> weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, MicroBatch, Piece, Sample, auxiliary
from unisd_megatron.config import Layout, Run
from unisd_megatron.errors import CheckFailed
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Grid
from unisd_megatron.losses.collectives import replicated_use, sum_over
from unisd_megatron.losses.readout import Readout, compare, sampled_log_probs
from unisd_megatron.mcore.memory import peak_bytes
from unisd_megatron.mechanisms import feature_distance
from unisd_megatron.mechanisms.objective import Heard, TokenStats
from unisd_megatron.mechanisms.tally import Tally
from unisd_megatron.train.balance import divide
from unisd_megatron.train.collate import Work, cost, form_of, lay_out, scatter
from unisd_megatron.train.drift import add_drift
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.rollouts import Rollouts


@dataclass
class Parts:
    """What a training step works with."""

    run: Run
    learner: Learner
    rollouts: Rollouts
    drift_due: bool = False  # what the teacher's FP8 costs is still to be measured, by the next step


@dataclass(frozen=True)
class Report:
    """What came out of a step, the same on every rank. `samples` are those of the whole batch."""

    metrics: dict[str, float]
    histograms: dict[str, list[int]]
    samples: list[Sample]


def train_step(parts: Parts, step: int) -> Report:
    """Optimizer step `step` (from 0). Collective over all ranks.

    Raises `CheckFailed`, on every rank and before the weights move, if a loss term is not finite or the engine's
    log-probs are further from Megatron's than the run allows.
    """
    clock = _Clock()
    learner, layout = parts.learner, parts.run.layout
    samples = parts.rollouts.of_step(step)
    clock.lap("seconds/rollout")
    work = share_out(samples, learner, layout, mask_truncated=parts.run.rollout.mask_truncated_completions)
    tally = compute_gradients(learner, work, clock, drift=parts.drift_due)
    parts.drift_due = False
    if learner.grid.context.rank == 0:
        _count(work, learner, tally)
    merged = gather_tally(tally, learner.grid)
    _check(merged, parts, step)
    metrics = merged.read() | parts.rollouts.metrics
    metrics |= _of_samples(parts.run, samples, step)
    # Only the last stage saw the divergences; every rank needs the ceiling for the checkpoint.
    learner.objective.ceiling = metrics.get("clip/next_ceiling", learner.objective.ceiling)
    metrics["grad_norm"] = learner.student.gradient_norm()
    if not math.isfinite(metrics["grad_norm"]):
        raise CheckFailed(f"step {step}: the gradient norm is {metrics['grad_norm']}; the last checkpoint is untouched")
    metrics["learning_rate"] = learner.student.step(step)
    if (teacher := learner.teacher) is not None:
        with learner.student.in_full() if teacher.is_due(step + 1) else contextlib.nullcontext():
            metrics["teacher/moved"] = float(teacher.follow(learner.student, step + 1))
            if metrics["teacher/moved"]:
                metrics["teacher/distance"] = teacher.distance(learner.student)
    clock.lap("seconds/optimizer")
    return Report(metrics | clock.laps | _speed(metrics, clock), merged.histograms, samples)


def share_out(samples: Sequence[Sample], learner: Learner, layout: Layout, *, mask_truncated: bool) -> Work:
    """This replica's part of the global batch, balanced over replicas and rows by tokens; the same on all its ranks."""
    grid, views = learner.grid, list(learner.objective.settings.teacher_views)
    form = form_of(learner, layout, views, mask_truncated=mask_truncated)
    count = len(samples) // (layout.micro_batch_size * grid.data.size)
    costs, widths = ([cost(sample, names) for sample in samples] for names in ([STUDENT, *views], [STUDENT]))
    mine = divide(costs, widths, grid.data.size, count, packing=layout.packing)[grid.data.rank]
    return lay_out([[samples[i] for i in group] for group in mine], form)


def compute_gradients(learner: Learner, work: Work, clock: _Clock | None = None, *, drift: bool = False) -> Tally:
    """Teacher passes, then the student's forward and backward; gradients are in the student's buffers. Collective.

    Args: drift: measure how far the teacher is from itself in its weights' dtype (`drift.py`), by one more pass of it.
    Returns this rank's tally; it is complete on the last pipeline stage and empty elsewhere.
    """
    clock, batches = clock or _Clock(), work.batches
    hidden, heard = listen_to_teacher(learner, work)
    tally = Tally()
    if drift:
        add_drift(tally, learner, work, hidden)
    clock.lap("seconds/teacher")
    shares = learner.objective.prepare(heard) if learner.grid.is_last_stage else []
    divergences: list[Tensor] = []

    def loss(i: int, rows: Tensor) -> Tensor:
        stats = _compare(learner, batches[i], rows, hidden[i] if hidden else None, tally)
        if stats.divergence is not None:
            divergences.append(stats.divergence.detach())
        return learner.objective.share_of_loss(stats, shares[i], tally)

    learner.student.learn([batch.view for batch in batches], loss)
    if learner.grid.is_last_stage:
        learner.objective.follow_quantile(divergences, [batch.mine for batch in batches])
        if learner.objective.ceiling is not None:
            tally.maxima["clip/next_ceiling"] = learner.objective.ceiling
    clock.lap("seconds/student")
    return tally


def listen_to_teacher(learner: Learner, work: Work) -> tuple[list[Tensor], list[Heard]]:
    """All views of all micro-batches in one forward-only schedule.

    Returns, on the last stage: final hidden states of the primary view at the kept tokens, `[n, h]` per micro-batch, and
    the sampled-token log-probs of the other views. Nothing of the size of the vocabulary is kept.
    """
    teacher, views = learner.teacher, learner.objective.settings.teacher_views
    if teacher is None:
        return [], [Heard(batch.mask, batch.mine) for batch in work.batches]

    def listen(i: int, rows: Tensor) -> list[tuple[Piece, Tensor]]:
        out: list[tuple[Piece, Tensor]] = []
        for name in views:
            pieces = [piece for piece in work.readings[i].pieces if piece.name == name]
            if pieces:
                said = torch.cat([rows[piece.here] for piece in pieces])
                if name != TEACHER:
                    token_ids = torch.cat([work.batches[piece.batch].token_ids[piece.there] for piece in pieces])
                    said = _log_probs(learner, Readout(said, teacher.head_weight()), token_ids, views[name])
                out += zip(pieces, said.split([piece.here.stop - piece.here.start for piece in pieces]), strict=True)
        return out

    said = teacher.score([reading.view for reading in work.readings], listen)
    if not learner.grid.is_last_stage:
        return [], []
    by_batch: list[dict[str, Tensor]] = [{} for _ in work.batches]
    for piece, values in itertools.chain.from_iterable(said):
        length = work.batches[piece.batch].token_ids.numel()
        whole = by_batch[piece.batch].setdefault(piece.name, values.new_full((length, *values.shape[1:]), torch.nan))
        whole[piece.there] = values
    empty = torch.zeros(0, learner.student.model.config.hidden_size, device=learner.grid.device)
    empty = empty.to(learner.student.model.config.params_dtype)
    heard = [_heard(one, batch, learner) for one, batch in zip(by_batch, work.batches, strict=True)]
    return [one.get(TEACHER, empty) for one in by_batch], heard


def _log_probs(learner: Learner, model: Readout, token_ids: Tensor, temperature: float) -> Tensor:
    return sampled_log_probs(
        model,
        token_ids=token_ids,
        temperature=temperature,
        vocab_size=learner.arch.vocab_size,
        group=learner.grid.tensor.group,
        path=learner.objective.settings.path,
    )


def _heard(said: dict[str, Tensor], batch: MicroBatch, learner: Learner) -> Heard:
    """A micro-batch without a token of mine has nothing said about it: zeros everywhere."""
    names = list(learner.objective.settings.teacher_views)
    nothing = batch.engine_log_probs.new_zeros(0)
    placed = {name: scatter(said.get(name, nothing), batch.mine) for name in names if name != TEACHER}
    auxiliaries = [placed[auxiliary(k)] for k in range(len(names)) if auxiliary(k) in placed]
    return Heard(
        mask=batch.mask,
        mine=batch.mine,
        # The weights of a sequence need all of it: context-parallel ranks add up their shares, zero elsewhere.
        auxiliary=sum_over(torch.stack(auxiliaries), learner.grid.context.group) if auxiliaries else None,
        negative=placed.get(NEGATIVE),
    )


def _compare(learner: Learner, batch: MicroBatch, rows: Tensor, teacher_rows: Tensor | None, tally: Tally) -> TokenStats:
    settings, group = learner.objective.settings, learner.grid.tensor.group
    student = Readout(rows, learner.student.model.head_weight())
    if learner.teacher is None or teacher_rows is None:
        said_alone = _log_probs(learner, student, batch.token_ids, settings.temperature)
        return TokenStats(student_log_probs=scatter(said_alone, batch.mine))
    said = compare(
        student,
        Readout(teacher_rows, learner.teacher.head_weight()),
        token_ids=batch.token_ids,
        alpha=settings.alpha,
        temperature=settings.temperature,
        vocab_size=learner.arch.vocab_size,
        group=group,
        path=settings.path,
        entry_clip=settings.entry_clip,
    )
    above = said.student_log_probs.detach() - batch.engine_log_probs
    tally.add_mean("rollout/logp_gap", above.abs(), batch.sampled)
    tally.add_max("rollout/logp_gap_max", above.abs(), batch.sampled)
    importance = None
    if settings.importance_cap is not None:
        ratio = torch.where(batch.sampled, above.exp(), 1.0)  # nobody sampled a reference: there is nothing to correct
        importance = ratio.clamp(max=settings.importance_cap)
        tally.add_mean("rollout/importance", importance, batch.sampled)
        tally.add_mean("rollout/importance_truncated_fraction", (importance < ratio).float(), batch.sampled)
    feature = feature_distance(replicated_use(rows, group), teacher_rows) if settings.matching_weight else None
    return TokenStats(
        divergence=scatter(said.divergence, batch.mine),
        student_log_probs=scatter(said.student_log_probs, batch.mine),
        teacher_log_probs=scatter(said.teacher_log_probs, batch.mine),
        entropy=scatter(said.entropy.detach(), batch.mine),
        feature=None if feature is None else scatter(feature, batch.mine),
        importance=None if importance is None else scatter(importance, batch.mine),
    )


def gather_tally(tally: Tally, grid: Grid) -> Tally:
    """The step's numbers over all sequences, on every rank; faults carry the rank that saw them. Collective."""
    speaks = grid.is_last_stage and grid.tensor.rank == 0
    tally.faults = [f"{term} (rank {grid.world.rank})" for term in tally.faults]
    told = tally if speaks else Tally()
    told.maxima["memory/peak_bytes"] = float(peak_bytes(grid.device))  # of the rank that needs most
    return Tally.merge(all_gather_json(told.plain(), grid.world))


def _check(tally: Tally, parts: Parts, step: int) -> None:
    run = parts.run
    if tally.faults:
        raise CheckFailed(f"step {step}: not finite: {', '.join(tally.faults)}; the last checkpoint is untouched")
    metrics = tally.read()
    gap = metrics.get("rollout/logp_gap", 0.0)
    # Not so: what was recorded or sampled by other weights, and log-probs renormalised over what top-p and such leave.
    comparable = run.rollout.rollout != "replay" and not run.rollout.max_rollout_lag and parts.rollouts.sampling.is_plain
    if comparable and not gap <= run.logp_gap_limit:
        raise CheckFailed(
            f"step {step}: the rollout engine's log-probs differ from Megatron's by {gap:.3g} nats on average, more than "
            f"--max_logp_gap {run.logp_gap_limit:g}; its weights are stale or wrong"
        )


def _count(work: Work, learner: Learner, tally: Tally) -> None:
    if not tally.means:
        return  # not a rank whose tally speaks
    lengths = torch.tensor([float(len(sample.completion.token_ids)) for sample in work.samples])
    cut = torch.tensor([float(sample.completion.finish_reason == "length") for sample in work.samples])
    tally.add_mean("completions/length", lengths)
    tally.add_max("completions/length_max", lengths)
    tally.add_mean("completions/truncated_fraction", cut)
    tally.add_sum("completions/tokens", lengths.sum())
    tally.add_mean(
        "padding_fraction", torch.tensor([work.padding_fraction([STUDENT, *learner.objective.settings.teacher_views])])
    )


def _of_samples(run: Run, samples: Sequence[Sample], step: int) -> dict[str, float]:
    """How old the weights were that sampled, and where completions come from and go to in modes in which that varies."""
    versions = [sample.completion.version for sample in samples if sample.completion.sampled]
    found = {"rollout/lag": float(step - min(versions))} if versions else {}
    if run.method.completions == "mixed":
        found["rollout/on_policy_share"] = len(versions) / len(samples)
    if run.method.completions == "starting":
        found["completions/kept_fraction"] = sum(sample.counts for sample in samples) / len(samples)
    return found


def _speed(metrics: dict[str, float], clock: _Clock) -> dict[str, float]:
    total = sum(clock.laps.values())
    return {"seconds/step": total, "tokens_per_second": metrics.get("completions/tokens", 0.0) / total}


class _Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
