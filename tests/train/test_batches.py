"""Micro-batches: balanced over replicas, packed without waste, and read where the completion is."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from unisd_megatron.batch import STUDENT, TEACHER, Completion, Prompts, Sample, View
from unisd_megatron.errors import CheckFailed
from unisd_megatron.train import collate
from unisd_megatron.train.balance import divide
from unisd_megatron.train.collate import Form, cost, micro_batches, padding_fraction

VIEWS = [STUDENT, TEACHER]
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
        prompts = Prompts(str(i), {STUDENT: ids(5, 40), TEACHER: ids(50, 120)})
        samples.append(Sample(prompts, Completion(completion, (0.0,) * len(completion), ending)))
    return samples


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("replicas", "count"), [(1, 1), (1, 4), (2, 4), (4, 2), (4, 8)])
def test_every_sequence_is_run_once_and_no_micro_batch_is_empty(replicas: int, count: int, packing: bool) -> None:
    costs = [cost(sample, VIEWS) for sample in ragged(64)]
    divided = divide(costs, replicas, count, packing=packing)
    assert sorted(i for replica in divided for group in replica for i in group) == list(range(64))
    assert [len(replica) for replica in divided] == [count] * replicas
    assert all(group for replica in divided for group in replica)


def test_replicas_have_equal_work() -> None:
    """Within 1 %, where dealing the sequences out in turn leaves the slowest replica a third more than the mean."""
    costs = [cost(sample, VIEWS) for sample in ragged(256)]
    loads = [sum(costs[i] for group in replica for i in group) for replica in divide(costs, 4, 16, packing=True)]
    assert max(loads) <= 1.01 * sum(costs) / 4
    heaviest_micro_batch = max(sum(costs[i] for i in g) for replica in divide(costs, 4, 16, packing=True) for g in replica)
    assert heaviest_micro_batch <= 1.1 * sum(costs) / 64


@pytest.mark.parametrize(("packing", "equal_lengths", "multiple"), [(True, False, 1), (True, True, 4), (False, False, 4)])
def test_predictors_point_before_the_tokens_they_predict(packing: bool, equal_lengths: bool, multiple: int) -> None:
    samples = ragged(12)
    form = replace(FORM, packing=packing, equal_lengths=equal_lengths, multiple=multiple)
    for batch in micro_batches([samples[:5], samples[5:]], form):
        by_id = {sample.prompts.id: sample for sample in samples}
        kept = [by_id[i] for i in batch.ids if by_id[i].completion.finish_reason == "stop"]
        assert batch.token_ids.tolist() == [token for sample in kept for token in sample.completion.token_ids]
        for name, view in batch.views.items():
            row, position = view.predictors.unbind(1)
            assert torch.equal(view.tokens[row, position + 1], batch.token_ids)
            assert view.tokens.shape[1] % multiple == 0
            first = kept[0].completion.token_ids[0]
            assert (
                view.tokens[row[0], position[0]] == kept[0].prompts.views[name][-1]
                and view.tokens[row[0], position[0] + 1] == first
            )
            if packing:
                assert view.tokens.shape[0] == 1 and int(view.segments[-1]) == view.tokens.shape[1]
                lengths = view.segments.diff().tolist()
                assert lengths[: len(batch.ids)] == [
                    len(by_id[i].prompts.views[name]) + len(by_id[i].completion.token_ids) for i in batch.ids
                ]
                assert view.longest == max(lengths)


def test_packing_removes_the_padding() -> None:
    samples = ragged(64)
    costs = [cost(sample, VIEWS) for sample in samples]

    def waste(packing: bool, equal_lengths: bool = False) -> float:
        groups = [[samples[i] for i in group] for group in divide(costs, 1, 8, packing=packing)[0]]
        batches = micro_batches(groups, replace(FORM, packing=packing, equal_lengths=equal_lengths, multiple=8))
        return padding_fraction(batches, samples)

    assert waste(packing=True) < 0.02
    assert waste(packing=True) < waste(packing=False) / 5
    lengths = {
        b.views[STUDENT].tokens.shape[1] for b in micro_batches([samples[:9], samples[9:]], replace(FORM, equal_lengths=True))
    }
    assert len(lengths) == 1


def test_rows_that_do_not_hold_the_completion_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = collate._packed

    def late(*args: Any) -> View:
        view = honest(*args)
        return replace(view, tokens=view.tokens.roll(1, dims=1))

    monkeypatch.setattr(collate, "_packed", late)
    with pytest.raises(CheckFailed, match="do not predict the completion's tokens"):
        micro_batches([ragged(4)], FORM)
