"""Micro-batches: balanced over replicas, packed without waste, and read where the completion is."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, Completion, Prompts, Sample, View
from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Axis
from unisd_megatron.train import collate
from unisd_megatron.train.balance import divide
from unisd_megatron.train.collate import Form, Work, cost, lay_out

VIEWS = [TEACHER, NEGATIVE]
EVERY = [STUDENT, *VIEWS]
FORM = Form(VIEWS, packing=True, multiple=1, mask_truncated=True, equal_lengths=False, device=torch.device("cpu"))


def ragged(count: int, seed: int = 0) -> list[Sample]:
    """Samples of very different lengths, as reasoning completions are; every fifth was cut."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 1000) for _ in range(rng.randint(low, high)))

    samples = []
    for i in range(count):
        completion = ids(1, 20 if i % 3 else 300)
        ending = "length" if i % 5 == 4 else "stop"
        prompts = Prompts(str(i), {STUDENT: ids(5, 40), TEACHER: ids(50, 120), NEGATIVE: ids(50, 220)})
        samples.append(Sample(prompts, Completion(completion, (0.0,) * len(completion), ending)))
    return samples


def measured(samples: list[Sample]) -> tuple[list[int], list[int]]:
    return [cost(sample, EVERY) for sample in samples], [cost(sample, [STUDENT]) for sample in samples]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("replicas", "count"), [(1, 1), (1, 4), (2, 4), (4, 2), (4, 8)])
def test_every_sequence_is_run_once_and_no_micro_batch_is_empty(replicas: int, count: int, packing: bool) -> None:
    divided = divide(*measured(ragged(64)), replicas, count, packing=packing)
    assert sorted(i for replica in divided for group in replica for i in group) == list(range(64))
    assert [len(replica) for replica in divided] == [count] * replicas
    assert all(group for replica in divided for group in replica)


def test_enormous_sequences_leave_no_micro_batch_empty() -> None:
    divided = divide([10_000, 1, 1, 1, 1, 1, 1, 1], [1] * 8, 2, 4, packing=True)
    assert [[len(group) for group in replica] for replica in divided] == [[1] * 4] * 2


def test_replicas_and_rows_have_equal_work() -> None:
    """Within 1 %, where dealing sequences out in turn leaves the slowest replica several per cent behind."""
    samples = ragged(256)
    costs, widths = measured(samples)
    divided = divide(costs, widths, 4, 16, packing=True)
    loads = [sum(costs[i] for group in replica for i in group) for replica in divided]
    assert max(loads) <= 1.01 * sum(costs) / 4
    work = lay_out([[samples[i] for i in group] for group in divided[0]], FORM)
    assert len(work.readings) == 16 * len(VIEWS)
    for rows in ([b.view for b in work.batches], [r.view for r in work.readings]):
        lengths = [view.tokens.shape[1] for view in rows]
        assert max(lengths) <= 1.08 * sum(lengths) / len(lengths)


def test_a_teacher_row_of_another_sequence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = collate._packed_reading

    def astray(entries: Any, groups: Any, kept: Any, wanted: Any, form: Form) -> Any:
        return honest(entries, [list(reversed(group)) for group in groups], kept, wanted, form)

    monkeypatch.setattr(collate, "_packed_reading", astray)
    same_length = [Sample(s.prompts, Completion((i + 1, i + 2), (0.0, 0.0), "stop")) for i, s in enumerate(ragged(4))]
    with pytest.raises(CheckFailed, match="other tokens than the student's"):
        lay_out([same_length], FORM)


def read_back(work: Work, context: Axis) -> None:
    """What each reading hands out is, for every view and micro-batch, what this rank wants, in its order and once."""
    seen = {(i, name): [None] * batch.token_ids.numel() for i, batch in enumerate(work.batches) for name in VIEWS}
    for reading in work.readings:
        view = reading.view
        if context.size == 1:
            row, position = view.predictors.unbind(1)
            said = view.tokens[row, position + 1].tolist()
        else:  # the tokens that this rank's rows predict are not all on this rank: follow the places instead
            said = list(range(view.dealt.share.numel()))
        for piece in reading.pieces:
            wanted = work.batches[piece.batch].token_ids[piece.there].tolist()
            if context.size == 1:
                assert said[piece.here] == wanted
            seen[piece.batch, piece.name][piece.there] = said[piece.here]
    assert all(None not in found for found in seen.values())


@pytest.mark.parametrize(
    ("packing", "equal", "multiple", "context"),
    [(True, False, 1, 1), (True, True, 4, 1), (False, False, 4, 1), (True, True, 2, 2)],
)
def test_predictors_point_before_the_tokens_they_predict(packing: bool, equal: bool, multiple: int, context: int) -> None:
    samples = ragged(12)
    for rank in range(context):
        axis = Axis(rank, context)
        form = replace(FORM, packing=packing, equal_lengths=equal, multiple=multiple, context=axis)
        work = lay_out([samples[:5], samples[5:]], form)
        read_back(work, axis)
        rows = [batch.view for batch in work.batches] + [reading.view for reading in work.readings]
        assert all(view.tokens.shape[1] % multiple == 0 for view in rows)
        assert len({view.tokens.shape[1] for view in rows[:2]}) == 1 or not equal
        assert len({view.tokens.shape[1] for view in rows[2:]}) == 1 or not equal
        for batch in work.batches:
            by_id = {sample.prompts.id: sample for sample in samples}
            kept = [by_id[i] for i in batch.ids if by_id[i].completion.finish_reason == "stop"]
            tokens = [token for sample in kept for token in sample.completion.token_ids]
            assert batch.token_ids.tolist() == tokens[len(tokens) * rank // context : len(tokens) * (rank + 1) // context]


def test_packing_removes_the_padding() -> None:
    samples = ragged(64)

    def waste(**how: Any) -> float:
        form = replace(FORM, **how)
        groups = divide(*measured(samples), 1, 8, packing=form.packing)[0]
        return lay_out([[samples[i] for i in group] for group in groups], form).padding_fraction(EVERY)

    assert waste(multiple=8) < 0.02
    assert waste(equal_lengths=True) < 0.05  # under the interleaved schedule
    assert waste(context=Axis(0, 4)) < 0.03
    assert waste(packing=False) > 0.1


def test_rows_that_do_not_hold_the_completion_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = collate._packed

    def late(*args: Any) -> View:
        view = honest(*args)
        return replace(view, tokens=view.tokens.roll(1, dims=1))

    monkeypatch.setattr(collate, "_packed", late)
    with pytest.raises(CheckFailed, match="do not predict the completion's tokens"):
        lay_out([ragged(4)], FORM)
