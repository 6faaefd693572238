"""Token lists of a step -> micro-batches of tensors. The only place that knows how a view is laid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unisd_megatron.batch import STUDENT, Dealt, MicroBatch, Piece, Reading, Sample, View
from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Axis
from unisd_megatron.mcore import userbuffers
from unisd_megatron.train.balance import lightest
from unisd_megatron.train.learner import Learner


@dataclass(frozen=True)
class Form:
    """How micro-batches are laid out. multiple: a rank's part of a row is a multiple of it (sequence parallelism, FP8)."""

    views: Sequence[str]  # of the teacher
    packing: bool
    multiple: int
    mask_truncated: bool  # completions that were cut count for nothing
    equal_lengths: bool  # rows of all micro-batches are as long as the longest (interleaved schedule)
    device: torch.device
    context: Axis = Axis()  # ranks that share each packed row
    skip: int = 0  # first completion tokens that count for nothing
    granularity: int = 0  # the teacher's rows are as long as the student's, a multiple of this (buffers of one size)
    least: int = 0  # and at least so long


def cost(sample: Sample, views: Sequence[str]) -> int:
    """Tokens that are computed for a sample, over all views."""
    return sum(len(sample.prompts.views[name]) + len(sample.completion.token_ids) for name in views)


@dataclass(frozen=True)
class Work:
    """A replica's part of a step: its samples, the student's micro-batches of them, and what the teacher reads."""

    samples: list[Sample]
    batches: list[MicroBatch]
    readings: list[Reading]

    def padding_fraction(self, views: Sequence[str]) -> float:
        """The part of the computed tokens, over all views, that belong to no sequence."""
        rows = [batch.view for batch in self.batches] + [reading.view for reading in self.readings]
        computed = sum(view.tokens.numel() if view.segments is None else int(view.segments[-1]) for view in rows)
        return 1 - sum(cost(sample, views) for sample in self.samples) / computed


def form_of(learner: Learner, layout: Layout, views: Sequence[str], *, mask_truncated: bool) -> Form:
    """How a run's rows are laid out, for its student and for these views of the teacher."""
    grid, student = learner.grid, learner.student
    shards = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    multiple, skip = shards * student.row_multiple, learner.objective.settings.skipped_tokens
    form = Form(views, layout.packing, multiple, mask_truncated, interleaved, grid.device, grid.context, skip)
    if not student.model.config.tp_comm_overlap:
        return form
    return replace(form, granularity=userbuffers.GRANULARITY, least=userbuffers.row_length())


def lay_out(groups: Sequence[Sequence[Sample]], form: Form) -> Work:
    """The tensors of groups of samples. Raises `CheckFailed` if a view does not hold the completion where it is read."""
    batches = [_micro_batch(group, form) for group in groups]
    heard = _packed_readings(groups, batches, form) if form.packing else _padded_readings(groups, batches, form)
    if form.granularity:
        longest = max(view.tokens.shape[1] for view in [*(b.view for b in batches), *(r.view for r in heard)])
        step = math.lcm(form.granularity, form.multiple, 2 * form.context.size)
        width = -(-max(longest, form.least) // step) * step
        batches = [replace(batch, view=_lengthened(batch.view, width, form)) for batch in batches]
        heard = [replace(reading, view=_lengthened(reading.view, width, form)) for reading in heard]
    elif form.equal_lengths:  # the student's rows go through one schedule, the teacher's through another
        width = max(batch.view.tokens.shape[1] for batch in batches)
        batches = [replace(batch, view=_lengthened(batch.view, width, form)) for batch in batches]
        width = max((reading.view.tokens.shape[1] for reading in heard), default=0)
        heard = [replace(reading, view=_lengthened(reading.view, width, form)) for reading in heard]
    return Work([sample for group in groups for sample in group], batches, heard)


def _padded_readings(groups: Sequence[Sequence[Sample]], batches: Sequence[MicroBatch], form: Form) -> list[Reading]:
    """A row of the teacher's for each row of the student's, one view at a time."""
    return [
        Reading(_view(group, [name] * len(group), form), [Piece(i, name, whole, whole)])
        for i, (group, batch) in enumerate(zip(groups, batches, strict=True))
        for name in form.views
        for whole in [slice(0, batch.token_ids.numel())]
    ]


def _packed_readings(groups: Sequence[Sequence[Sample]], batches: Sequence[MicroBatch], form: Form) -> list[Reading]:
    """As many rows as views x micro-batches, all of the same length as nearly as sequences allow, whatever they hold."""
    entries = [(i, j, name) for i, group in enumerate(groups) for j in range(len(group)) for name in form.views]
    lengths = [cost(groups[i][j], [name]) for i, j, name in entries]
    dealt = lightest(range(len(entries)), lengths, len(groups) * len(form.views), len(entries))
    kept = [batch.mask.sum(1).tolist() for batch in batches]
    wanted = [batch.token_ids.tolist() for batch in batches]
    return [_packed_reading([entries[e] for e in mine], groups, kept, wanted, form) for mine in dealt]


def _packed_reading(
    entries: Sequence[tuple[int, int, str]],
    groups: Sequence[Sequence[Sample]],
    kept: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    form: Form,
) -> Reading:
    """A row of `(micro-batch, sequence, view)` entries. kept: kept tokens of each sequence; wanted: token ids that are mine."""
    view = _view([groups[i][j] for i, j, _ in entries], [name for *_, name in entries], form)
    pieces, places, begin, rows = [], [], 0, 0
    for i, j, name in entries:
        first = sum(kept[i][:j])
        mine = _even_share(sum(kept[i]), form.context)
        low, high = max(first, mine.start), min(first + kept[i][j], mine.stop)
        if low < high:
            places.append(torch.arange(begin + low - first, begin + high - first))
            there = slice(low - mine.start, high - mine.start)
            token_ids = groups[i][j].completion.token_ids[form.skip :]
            if tuple(wanted[i][there]) != token_ids[low - first : high - first]:
                raise CheckFailed(f"the teacher's {name} view would be compared with other tokens than the student's")
            pieces.append(Piece(i, name, slice(rows, rows + high - low), there))
            rows += high - low
        begin += kept[i][j]
    if view.dealt is not None:
        share = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        view = replace(view, dealt=replace(view.dealt, share=share.to(form.device)))
    return Reading(view, pieces)


def _lengthened(view: View, length: int, form: Form) -> View:
    """The view with its rows padded on the right to `length` tokens on this rank, a packed one by a segment more."""
    missing = length - view.tokens.shape[1]
    if missing == 0:
        return view
    tokens = torch.nn.functional.pad(view.tokens, (0, missing))
    if view.segments is None:
        return replace(view, tokens=tokens)
    segments = torch.cat([view.segments, view.segments.new_tensor([length * form.context.size])])
    return replace(view, tokens=tokens, segments=segments, longest=max(view.longest, missing * form.context.size))


def _micro_batch(samples: Sequence[Sample], form: Form) -> MicroBatch:
    completions, mask = [sample.completion.token_ids for sample in samples], _mask(samples, form)
    completion = _padded(completions, 1)
    log_probs, sampled = torch.zeros(completion.shape), torch.zeros(completion.shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        sampled[row] = sample.completion.sampled
        log_probs[row, : len(sample.completion.log_probs)] = torch.tensor(sample.completion.log_probs)
    share = _even_share(int(mask.sum()), form.context)
    mine = torch.zeros_like(mask)
    mine[tuple(mask.nonzero()[share].t())] = True
    return MicroBatch(
        ids=[sample.prompts.id for sample in samples],
        completion=completion.to(form.device),
        mask=mask.to(form.device),
        mine=mine.to(form.device),
        token_ids=completion[mine].to(form.device),
        engine_log_probs=log_probs[mine].to(form.device),
        sampled=sampled[mine].to(form.device),
        view=_view(samples, [STUDENT] * len(samples), form),
    )


def _mask(samples: Sequence[Sample], form: Form) -> Tensor:
    """Which completion positions count, `[B, T]`."""
    counts = torch.tensor([len(sample.completion.token_ids) for sample in samples])
    kept = torch.tensor([s.counts and not (form.mask_truncated and s.completion.finish_reason == "length") for s in samples])
    steps = torch.arange(int(counts.max()))
    return (steps >= form.skip) & (steps < counts[:, None]) & kept[:, None]


def _even_share(total: int, context: Axis) -> slice:
    return slice(total * context.rank // context.size, total * (context.rank + 1) // context.size)


def _view(samples: Sequence[Sample], names: Sequence[str], form: Form) -> View:
    """Each sample behind the prompt that is named for it."""
    prompts = [sample.prompts.views[name] for sample, name in zip(samples, names, strict=True)]
    completions, mask = [sample.completion.token_ids for sample in samples], _mask(samples, form)
    sequences = [(*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)]
    rows, steps = mask.nonzero(as_tuple=True)
    # The output at a position predicts the next token: completion token t of a row is predicted at prompt length - 1 + t.
    positions = torch.tensor([len(prompt) for prompt in prompts])[rows] - 1 + steps
    if form.packing:
        view = _packed(sequences, rows, positions, form)
    else:
        view = View(_padded(sequences, form.multiple), torch.stack([rows, positions], dim=1))
    _check_completion(view, completions, mask)
    if form.context.size > 1:
        view = _part_of(view, form.context)
    dealt = None if view.dealt is None else replace(view.dealt, owned=view.dealt.owned.to(form.device))
    segments = None if view.segments is None else view.segments.to(form.device)
    return replace(
        view,
        tokens=view.tokens.to(form.device),
        predictors=view.predictors.to(form.device),
        segments=segments,
        dealt=dealt,
    )


def _packed(sequences: Sequence[Sequence[int]], rows: Tensor, positions: Tensor, form: Form) -> View:
    """The sequences one after the other in one row; under context parallel each is padded to a multiple of 2 cp."""
    chunk = 2 * form.context.size if form.context.size > 1 else 1
    lengths = [-(-len(sequence) // chunk) * chunk for sequence in sequences]
    begins = torch.tensor([0, *itertools.accumulate(lengths)][:-1])
    total = sum(lengths)
    width = math.lcm(chunk, form.multiple * form.context.size)
    if total % width:
        lengths.append(-total % width)
    tokens = torch.zeros(1, sum(lengths), dtype=torch.int64)
    for begin, sequence in zip(begins.tolist(), sequences, strict=True):
        tokens[0, begin : begin + len(sequence)] = torch.tensor(sequence)
    segments = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    places = torch.stack([torch.zeros_like(rows), begins[rows] + positions], dim=1)
    return View(tokens, places, segments, max(lengths))


def _part_of(view: View, context: Axis) -> View:
    """This rank's part of a packed row: of each segment's 2 cp chunks the rank-th, and the rank-th from the end."""
    assert view.segments is not None
    segments = [int(end) for end in view.segments]
    kept: list[Tensor] = []
    for begin, end in itertools.pairwise(segments):
        chunks = torch.arange(begin, end).chunk(2 * context.size)
        kept += [chunks[context.rank], chunks[2 * context.size - 1 - context.rank]]
    places = torch.cat(kept)
    here = torch.full((segments[-1],), -1)
    here[places] = torch.arange(len(places))
    local = here[view.predictors[:, 1]]
    owned = (local >= 0).nonzero().flatten()
    total = view.predictors.shape[0]
    return replace(
        view,
        tokens=view.tokens[:, places],
        predictors=torch.stack([torch.zeros_like(owned), local[owned]], dim=1),
        dealt=Dealt(owned, total, _even_share(total, context)),
    )


def _check_completion(view: View, completions: Sequence[Sequence[int]], mask: Tensor) -> None:
    """Every view must read the same completion: what follows each predictor is the token that it predicts."""
    row, position = view.predictors.unbind(1)
    if not torch.equal(view.tokens[row, position + 1], _padded(completions, 1)[mask]):
        raise CheckFailed("a view's rows do not predict the completion's tokens; student and teacher would be compared astray")


def _padded(sequences: Sequence[Sequence[int]], multiple: int) -> Tensor:
    longest = max(len(sequence) for sequence in sequences)
    width = -(-longest // multiple) * multiple
    out = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.tensor(sequence)
    return out


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """The N kept values as `[B, T]`, 0 where the mask is false. Differentiable."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(mask, values)
