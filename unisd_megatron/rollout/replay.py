"""Completions recorded by an earlier run: for debugging, comparing layouts, and offline distillation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from unisd_megatron.batch import Completion
from unisd_megatron.errors import DataError
from unisd_megatron.rollout.engine import Request, Sampling, Weights


def rollout_file(folder: Path, step: int) -> Path:
    """Where the completions of an optimizer step (from 0) are recorded."""
    return folder / f"step_{step:06d}.jsonl"


def require_recordings(folder: Path, steps: Iterable[int]) -> None:
    """Raises `DataError` for the first step of a run that was not recorded."""
    for step in steps:
        if not rollout_file(folder, step).is_file():
            raise DataError(f"{folder}: no completions recorded for step {step}")


class ReplayEngine:
    """Answers each request with the recorded completion of the same step and seed; weights are ignored."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of recorded rollouts")
        self._folder = folder
        self._step = 0

    def refresh(self, weights: Weights, step: int) -> None:
        """Moves to a step."""
        self._step = step

    def members(self) -> list[str]:
        """None: there are no weights."""
        return []

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """See `members`."""
        return {}

    def parts(self, wanted: dict[str, list[int]]) -> dict[str, list[tuple[str, int]]]:
        """See `members`."""
        return {}

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.probe`."""
        return [self.generate(requests, sampling)]

    def rest(self) -> None:
        """Holds next to nothing."""

    def close(self) -> None:
        """Holds nothing outside this process."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Raises `DataError` if the recording lacks a request or was made from another prompt."""
        path = rollout_file(self._folder, self._step)
        if not path.is_file():
            raise DataError(f"{path}: no recording of step {self._step}")
        try:
            recorded = {row["seed"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a recording of completions ({error})") from error
        out = []
        for request in requests:
            row = recorded.get(request.seed)
            if row is None or tuple(row["prompt"]) != request.prompt:
                raise DataError(f"{path}: no completion for {request.example_id}; was it recorded with the same seed and data?")
            if len(row["log_probs"]) != len(row["completion"]):
                raise DataError(f"{path}: the completion for {request.example_id} is a reference, which nothing sampled")
            said = Completion(tuple(row["completion"]), tuple(row["log_probs"]), row["finish_reason"], row.get("version", 0))
            out.append(said)
        return out
