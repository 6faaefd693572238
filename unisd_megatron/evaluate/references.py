"""The reference solutions scored like answers: what a task's own scoring makes of what it calls right. Loads no model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unisd_megatron.data import Record, Task
from unisd_megatron.evaluate import report
from unisd_megatron.evaluate.results import ANSWERS, Ledger, Row, digest, locked, records_digest
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.evaluate.summary import summarize
from unisd_megatron.grid import Axis


def evaluate(
    task: Task, records: Sequence[Record], output_dir: Path | None, *, unsafe: bool = False, workers: int | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """The numbers of `result.json`, and the rows; both are written to `output_dir`. With a progress bar. One process.

    Raises a `RequestError` before anything is written where the request is wrong.
    """
    texts = [(record, task.reference(record)) for record in records]
    semantics = "released" if task.released else "corrected"
    judge = Judge(task, records[0], unsafe=unsafe, workers=workers)
    key = {
        "dataset": task.name,
        "data": records_digest(records),
        "references": digest(text for _, text in texts),
        "semantics": semantics,
        "judging": judge.identity,
    }
    with locked(output_dir):
        ledger = Ledger(output_dir, ANSWERS, key)
        _fill(ledger, task, texts, judge)
        version = {"unisd_megatron": importlib.metadata.version("unisd_megatron")}
        about = {"sandbox": judge.confinement, "digests": {"data": key["data"]}, "settings": {"semantics": semantics}}
        result = {"dataset": task.name, "model": "references", **summarize(ledger.rows), **about, "versions": version}
        if output_dir is not None:
            report.write(output_dir, result)
    return result, ledger.rows


def _fill(ledger: Ledger, task: Task, texts: Sequence[tuple[Record, str]], judge: Judge) -> None:
    if len(ledger.rows) < len(texts):
        ledger.keep(0)
        with tqdm(total=len(texts), desc="references", dynamic_ncols=True) as bar:
            verdicts = judge.verdicts(texts, Axis(), lambda judged: bar.update(judged - bar.n))
        ledger.append(
            [
                {
                    "id": record.id,
                    "sample": 0,
                    "group": task.group(record),
                    "prompt": task.question(record),
                    "completion": text,
                    "tokens": 0,
                    "finished": True,
                    "correct": verdict.correct,
                    "failure": verdict.failure,
                    "metrics": dict(verdict.metrics),
                }
                for (record, text), verdict in zip(texts, verdicts, strict=True)
            ]
        )
