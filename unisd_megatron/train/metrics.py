"""Where the numbers of a run go: one JSON line per step, TensorBoard, and one progress bar. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

METRICS_FILE, EVALUATIONS, ANSWERS = "metrics.jsonl", "evaluations.jsonl", "answers"
HELD_OUT = "held_out/accuracy"
"""The curve of held-out evaluations: at the steps done, where a step's own numbers stand at the steps done before it."""


class Journal:
    """Writes the metrics of each step; `first_step` is where a resumed run continues (later lines are dropped).

    Args: board: folder of TensorBoard's files, if not in this one; watcher: who else is told.
    """

    def __init__(
        self, folder: Path, first_step: int, max_steps: int, board: Path | None = None, watcher: Watcher | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        rewrite_rows(self._path, lambda row: row["step"] < first_step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(board or folder / "tensorboard"), purge_step=first_step)
        self._watcher = watcher
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", desc="train", dynamic_ncols=True)

    def record(self, step: int, metrics: dict[str, float], histograms: dict[str, list[int]]) -> None:
        """Adds one step; the line is on disk when this returns."""
        self._stream.write(json.dumps({"step": step, **metrics, **histograms}) + "\n")
        self._stream.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._watcher is not None:
            self._watcher.log(step, metrics)
        self._bar.update()
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s")

    def score(self, steps_done: int, accuracy: float, examples: int) -> None:
        """Adds a held-out evaluation, a share of right answers; the line is on disk when this returns."""
        self.say(f"step {steps_done}: held-out accuracy {100 * accuracy:.1f} % of {examples}")
        with (self._path.parent / EVALUATIONS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": steps_done, "accuracy": accuracy, "examples": examples}) + "\n")
        self._board.add_scalar(HELD_OUT, accuracy, steps_done)
        if self._watcher is not None:
            self._watcher.log(steps_done, {HELD_OUT: accuracy})

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        if self._watcher is not None:
            self._watcher.close()
        self._stream.close()


class Watcher(Protocol):
    """Who else is told the numbers of each step."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def answers_file(folder: Path, steps_done: int) -> Path:
    """Where a run keeps the answers of the held-out evaluation after so many steps."""
    return folder / ANSWERS / f"step_{steps_done:06d}.jsonl"


def drop_later_answers(folder: Path, first_step: int) -> None:
    """Removes what a run that is resumed at `first_step` will answer anew, or not at all."""
    for path in (folder / ANSWERS).glob("step_*.jsonl"):
        if path.stem[5:].isdigit() and int(path.stem[5:]) >= first_step:
            path.unlink()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSONL file that is complete or not there."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The recorded steps of a run, in order; a line cut short by a kill is left out."""
    return _read_rows(folder / METRICS_FILE)


def rewrite_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows of a JSONL file that are not to be kept, and whatever a kill cut short."""
    if path.is_file():
        write_rows(path, [row for row in _read_rows(path) if keep(row)])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
