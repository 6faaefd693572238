"""Who counts as proven while servers come and go, and what a probe that is off means. An engine of numbers stands in for some
servers that join between two calls, which real ones cannot be made to do; syncs with real vLLM are in test_colocated.py and
test_vllm_servers_training.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisd_megatron.errors import CheckFailed
from unisd_megatron.grid import Axis
from unisd_megatron.train.sync import PROOFS, Sync


class Engine:
    """Server A takes every update. Server B is there from the refresh `joins` on and keeps what it has, if it is `stale`."""

    def __init__(self, joins: int, *, stale: bool = True, flaps: bool = False, empty: bool = False) -> None:
        self.refreshed, self._joins, self._stale, self._flaps, self._empty = 0, joins, stale, flaps, empty
        self._label = ""

    def refresh(self, weights: Any, step: int) -> None:
        self.refreshed += 1
        self._label = weights.label

    def members(self) -> list[str]:
        generation = self.refreshed if self._flaps else self._joins
        return ["A #1"] + [f"B #{generation}"] * (self.refreshed >= self._joins)

    def fingerprints(self) -> dict[str, dict[str, str]]:
        if self._empty:
            return {name: {} for name in self.members()}
        return {name: {"w": "stale" if name[0] == "B" and self._stale else "w" + self._label} for name in self.members()}


def sync_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Sync:
    sync = Sync.__new__(Sync)
    sync._engine, sync._weights, sync._proven, sync._step = engine, SimpleNamespace(label=""), set(), None  # type: ignore
    student = SimpleNamespace(in_full=nullcontext)
    sync._learner = SimpleNamespace(grid=SimpleNamespace(world=Axis()), student=student)  # type: ignore[assignment]
    monkeypatch.setattr(sync, "_probe", lambda step: None)
    monkeypatch.setattr(sync, "_compare", lambda step: None)
    return sync


@pytest.mark.parametrize("joins", [1, 2, 3])
def test_a_server_that_joins_during_the_proof_is_proven_too(monkeypatch: pytest.MonkeyPatch, joins: int) -> None:
    with pytest.raises(CheckFailed, match=r"w of B #\d .*kept its old value"):
        sync_of(Engine(joins), monkeypatch).refresh(0)
    sound = Engine(joins, stale=False)
    sync = sync_of(sound, monkeypatch)
    sync.refresh(0)
    assert sync._proven == {"A #1", f"B #{joins}"}
    assert sound.refreshed == (3 if joins == 1 else 5)
    sync.refresh(1)
    assert sound.refreshed == (4 if joins == 1 else 6)  # once is enough


def test_a_server_that_comes_and_goes_does_not_keep_the_proof_going_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(2, stale=False, flaps=True)
    with pytest.raises(CheckFailed, match=rf"B #\d+ came or went during each of {PROOFS} proofs"):
        sync_of(engine, monkeypatch).refresh(0)
    assert engine.refreshed == 1 + 2 * PROOFS


def test_a_proof_that_compares_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckFailed, match="every tensor of A #1 .*stayed unseen"):
        sync_of(Engine(9, empty=True), monkeypatch).refresh(0)


def test_one_stale_probe_of_eight_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean over all probes stays below the limit."""
    sync = sync_of(Engine(9), monkeypatch)
    sync._seed, sync._limit, sync._sampling = 0, 0.1, None  # type: ignore[assignment]
    sync._probes = [SimpleNamespace(id=f"q{i}", views={"student": (i,)}) for i in range(8)]  # type: ignore[misc]
    gaps = torch.tensor([[0.16, 16.0, 0.02]] * 8, dtype=torch.float64)
    monkeypatch.setattr(sync, "_gaps", lambda said: gaps)
    monkeypatch.setattr(sync._engine, "probe", lambda requests, sampling: [[], []], raising=False)
    Sync._probe(sync, 4)
    assert sync.metrics == {"rollout/sync_gap": pytest.approx(0.01), "rollout/sync_gap_max": 0.02}
    gaps[5] = torch.tensor([16 * 0.3, 16.0, 0.5])
    with pytest.raises(CheckFailed, match="rollout engine 0 after prompt q5 differ from Megatron's by 0.3 nats"):
        Sync._probe(sync, 4)
    gaps[5, 0] = float("nan")
    with pytest.raises(CheckFailed, match="nan"):
        Sync._probe(sync, 4)
