"""Where the numbers of a run go: one JSON line per step, TensorBoard, and one progress bar. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS_FILE, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class Journal:
    """Writes the metrics of each step; `first_step` is where a resumed run continues (later lines are dropped)."""

    def __init__(self, folder: Path, first_step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        rewrite_rows(self._path, lambda row: row["step"] < first_step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", desc="train", dynamic_ncols=True)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Adds one step; the line is on disk when this returns."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._bar.update()
        self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:.0f} tokens/s")

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._stream.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The recorded steps of a run, in order; a line cut short by a kill is left out."""
    return _read_rows(folder / METRICS_FILE)


def rewrite_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows of a JSONL file that are not to be kept, and whatever a kill cut short."""
    if path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in _read_rows(path) if keep(row)), encoding="utf-8")
        partial.replace(path)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
