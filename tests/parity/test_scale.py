"""Large layouts add up, rank by rank; and the check refuses what does not."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed
from unisd_megatron.families import FAMILIES
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import shards
from unisd_megatron.mcore.holding import Box, Holding, build_rank
from unisd_megatron.parity import agreement
from unisd_megatron.parity.coverage import check_boxes
from unisd_megatron.parity.scale import Line, Model, check_all, model_of
from unisd_megatron.plan import PUBLISHED
from unisd_megatron.weights.buckets import WeightStream

ROOT = Path(__file__).parents[2]
COMMON = "--use-distributed-optimizer"
COMMANDS = {
    "Llama-3.1-405B-Instruct": "--gpus 512 --tp 8 --pp 16 --sequence-parallel --account-for-embedding-in-pipeline-split "
    "--account-for-loss-in-pipeline-split",
    "Llama-3.1-70B-Instruct": "--gpus 64 --tp 8 --pp 4 --cp 2 --sequence-parallel",
    "Qwen3-30B-A3B": "--gpus 8 --pp 2 --ep 4",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_rank_of_a_published_model_in_little_memory(name: str) -> None:
    words = ["parity", "scale", "--model-name", name, COMMON, *COMMANDS[name].split()]
    process = subprocess.Popen(
        [sys.executable, "-m", "unisd_megatron", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    table = said.split("each element once in")[1].splitlines()[1:]
    assert len(table) == 10
    assert [f"{PUBLISHED[name]:,}" in line for line in table] == [True] * 9 + [False]  # the last counts bytes
    # The largest of its three processes; ru_maxrss is in KiB.
    assert 3 * used.ru_maxrss < 8 * 2**20


# Small worlds with everything in them: name -> family, ranks, layout.
WORLDS = {
    "tied, pp2 vpp2 tp2 dp2": ("qwen2", 8, Layout(2, 2, 2, sequence_parallel=True, use_distributed_optimizer=True, bf16=True)),
    "experts, tp2 ep2 dp4": (
        "qwen3_moe",
        8,
        Layout(2, expert_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True, bf16=True),
    ),
    "whole optimizer in fp32, cp2 pp2": ("llama", 8, Layout(1, 2, context_parallel_size=2)),
    "whole optimizer, pp2 dp2": ("llama", 4, Layout(1, 2, bf16=True)),
}


def built(name: str) -> tuple[Model, list[Holding]]:
    family, size, layout = WORLDS[name]
    arch = FAMILIES[family].arch({**FAMILIES[family].tiny_config(), "vocab_size": 300})
    platform = platforms.choose()
    return model_of(arch, layout), [build_rank(arch, layout, platform, world_size=size, rank=rank) for rank in range(size)]


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, tuple[Model, list[Holding]]]]:
    gc.freeze()  # Megatron collects garbage for each optimizer
    yield {name: built(name) for name in WORLDS}
    gc.unfreeze()


def elements(model: Model, holdings: list[Holding]) -> list[Line]:
    return list(check_all(model, holdings))


@pytest.mark.parametrize("name", WORLDS)
def test_small_worlds_add_up(worlds: dict[str, tuple[Model, list[Holding]]], name: str) -> None:
    model, holdings = worlds[name]
    assert {line.elements for line in elements(model, holdings)} == {model.elements, None}


def moved(box: Box) -> Box:
    axis = max(range(len(box.shape)), key=lambda i: box.whole[i] // box.shape[i] if box.shape[i] > 1 else 0)
    return dataclasses.replace(box, offset=tuple(at + (i == axis) for i, at in enumerate(box.offset)))


def shift_a_shard(one: Holding) -> Holding:
    place = next(i for i, box in enumerate(one.cuts) if "linear_proj" in box.name)
    return dataclasses.replace(one, cuts=[moved(box) if i == place else box for i, box in enumerate(one.cuts)])


def shift_what_is_written(one: Holding) -> Holding:
    place = next(i for i, box in enumerate(one.written["teacher"]) if "linear_proj" in box.name)
    boxes = [moved(box) if i == place else box for i, box in enumerate(one.written["teacher"])]
    return dataclasses.replace(one, written=one.written | {"teacher": boxes})


def write_nothing_of_a_moment(one: Holding) -> Holding:
    kind = "optimizer.state.exp_avg"
    return dataclasses.replace(one, written=one.written | {kind: one.written[kind][1:]})


def overlap(one: Holding) -> Holding:
    # Rank 2 has data-parallel number 1 or more: what it has begins where another's ends, within a parameter.
    place = next(i for i, (_, start, _) in enumerate(one.ema) if start > 0)
    name, start, stop = one.ema[place]
    return dataclasses.replace(one, ema=[*one.ema[:place], (name, start - 1, stop), *one.ema[place + 1 :]])


def forget_optimizer_state(one: Holding) -> Holding:
    return dataclasses.replace(one, optimizer=one.optimizer[1:])


def lose_a_weight(one: Holding) -> Holding:
    return dataclasses.replace(one, shards=dict(list(one.shards.items())[1:]))


def plan_a_byte_more(one: Holding) -> Holding:
    return dataclasses.replace(one, bytes=one.bytes | {"gradients": one.bytes["gradients"] - 1})


def say_something_else(one: Holding) -> Holding:
    return dataclasses.replace(one, said=[*one.said, "more"])


REFUSED: dict[Callable[[Holding], Holding], str] = {
    shift_a_shard: r"parameters: .*linear_proj.weight of rank 2: (holds other rows|.*outside)",
    shift_what_is_written: r"checkpoint: teacher.*linear_proj.weight: .*(written by rank|outside|cut otherwise)",
    write_nothing_of_a_moment: r"checkpoint: .*exp_avg.* are written by no rank",
    overlap: r"EMA masters: .* elements \d+ to \d+ are on rank \d and on rank \d",
    forget_optimizer_state: r"optimizer state: .*elements \d+ to \d+ are on no rank",
    lose_a_weight: r"parameters: part \d of .* is on ranks none of replica",
    plan_a_byte_more: r"planner: gradients of rank 2 are \d+ bytes; built, \d+",
    say_something_else: r"2 different answers",
}


@pytest.mark.parametrize("sabotage", REFUSED, ids=lambda one: one.__name__)
def test_what_does_not_add_up_is_named(
    worlds: dict[str, tuple[Model, list[Holding]]], sabotage: Callable[[Holding], Holding]
) -> None:
    model, holdings = worlds["tied, pp2 vpp2 tp2 dp2"]
    # Only the first replica writes.
    rank = 1 if sabotage in (shift_what_is_written, write_nothing_of_a_moment) else 2
    assert holdings[2].rank["data_context"] == 1
    wrong = [sabotage(one) if number == rank else one for number, one in enumerate(holdings)]
    with pytest.raises(CheckFailed, match=REFUSED[sabotage]):
        elements(model, wrong)


def test_a_bucket_that_is_dropped_or_sent_by_the_wrong_rank_is_refused(
    worlds: dict[str, tuple[Model, list[Holding]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropping(WeightStream):
        def __len__(self) -> int:
            return super().__len__() - 1

    class Elsewhere(WeightStream):
        def expert(self, number: int) -> int | None:
            return None

    model, holdings = worlds["experts, tp2 ep2 dp4"]
    monkeypatch.setattr(agreement, "WeightStream", Dropping)
    with pytest.raises(CheckFailed, match=r"weight sync: .* more tensors are in no bucket"):
        elements(model, holdings)
    monkeypatch.setattr(agreement, "WeightStream", Elsewhere)
    with pytest.raises(CheckFailed, match=r"weight sync: rank \d should send .*experts.* and does not have it"):
        elements(model, holdings)


def test_a_cut_of_the_masters_that_is_wrong_in_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shards._overlap
    monkeypatch.setattr(shards, "_overlap", lambda flat, start, stop: honest(flat, start + (start > 0), stop))
    with pytest.raises(CheckFailed, match="EMA masters: .* are on no rank"):
        elements(*built("whole optimizer, pp2 dp2"))


def test_boxes_that_overlap_and_leave_a_gap_of_the_same_size_are_refused() -> None:
    with pytest.raises(CheckFailed, match="written by rank 0 and by rank 1"):
        check_boxes([((0, 0), (2, 3), 0), ((1, 0), (2, 3), 1)], (4, 3), "x")
    with pytest.raises(CheckFailed, match="3 of 12 elements are written by no rank"):
        check_boxes([((0, 0), (2, 3), 0), ((3, 0), (1, 3), 1)], (4, 3), "x")
