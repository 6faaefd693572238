"""Where the numbers of a run go: one JSON line per step, TensorBoard, and one progress bar. Rank 0 only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


class Journal:
    """Writes the metrics of each step; `first_step` is where a resumed run continues (later lines are dropped)."""

    def __init__(self, folder: Path, first_step: int, max_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if row["step"] < first_step] if self._path.is_file() else []
        _write_lines(self._path, kept)
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
    rows = []
    for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if math.isfinite(row.get("step", math.nan)):
            rows.append(row)
    return rows


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
