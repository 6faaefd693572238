"""Folders as runs, evaluations and sweeps leave them, with numbers that the tests know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = '<script>document.title="taken"</script><img src="http://198.51.100.7/x.png" onerror="alert(1)"> & "$x$"'
AGREEMENT = {
    "agreement/weight_mean": 0.9,
    "agreement/weight_histogram": [1, 0, 3],
}


def metrics(steps: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; the loss of step i is 1 / (i + 1)."""
    return [
        {
            "step": i,
            "loss": 1 / (i + 1),
            "divergence/mean": 0.5 / (i + 1),
            "completions/tokens": 100.0,
            "seconds/rollout": 0.5,
            "seconds/step": 2.0,
            "tokens_per_second": 50.0,
            "memory/peak_bytes": 2.0**30 * 1.5,
            **more,
        }
        for i in range(steps)
    ]


def answer(name: str, correct: bool, completion: str = "so it is") -> dict[str, Any]:
    row = {"id": name, "sample": 0, "prompt": f"what is {name}?", "completion": completion, "correct": correct}
    return row | {"finished": True, "failure": None if correct else "wrong answer"}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    answers: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    wanted: int | None = None,
) -> Path:
    """A run with these metrics and held-out answers by step. Args: wanted: its steps; None: these, and it is finished."""
    folder.mkdir(parents=True)
    if wanted is None:
        (folder / "finished.json").write_text("{}")
    about = {
        "identity": {"data": "89ab", "max_steps": wanted or len(rows)},
        "settings": {"mode": "vanilla", "dataset": "addition", "model_name": "base", "seed": 3, "max_steps": 10},
        "origins": {"mode": "flag", "dataset": "file", "model_name": "flag", "seed": "default", "max_steps": "flag"},
        "versions": {"torch": "2"},
        "histograms": {"agreement/weight_histogram": [0.3, 0.6]},
    }
    (folder / "run.json").write_text(json.dumps(about))
    write_rows(folder / "metrics.jsonl", rows)
    scores = []
    for step, found in (answers or {}).items():
        write_rows(folder / "answers" / f"step_{step:06d}.jsonl", found)
        scores.append({"step": step, "accuracy": sum(one["correct"] for one in found) / len(found), "examples": len(found)})
    if scores:
        write_rows(folder / "evaluations.jsonl", scores)
    return folder


def evaluation(folder: Path, correct: Sequence[bool]) -> Path:
    """A finished `unisd evaluate` of questions q0, q1, ..."""
    write_rows(folder / "answers.jsonl", [answer(f"q{i}", one) for i, one in enumerate(correct)])
    share = sum(correct) / len(correct)
    result = {
        "answers": len(correct),
        "examples": len(correct),
        "accuracy": share,
        "interval": [0.1, 0.2],
        "dataset": "addition",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def sweep(folder: Path, cells: Sequence[tuple[str, int, Sequence[bool] | None]], base: Sequence[bool] | None = None) -> Path:
    """A sweep of runs (mode, seed, which answers are right); None: the training failed."""
    rows = []
    start = {} if base is None else {"base": {"addition": "base/evaluate"}}
    for mode, seed, correct in cells:
        home = f"runs/{mode}-addition-0123/seed{seed}"
        row = {"name": mode, "mode": mode, "dataset": "addition", "seed": seed, "settings": {}, "identity": "0123"}
        rows.append(row | start | {"train": f"{home}/train", "evaluations": {"addition": f"{home}/evaluate-addition-45"}})
        if correct is None:
            (folder / home).mkdir(parents=True)
            (folder / home / "train.failed.json").write_text('{"exit": 1}')
            (folder / home / "train.log").write_text("step 3\nunisd: step 4: not finite: <b>loss</b>\n")
            continue
        run(folder / home / "train", metrics(4))
        evaluation(folder / home / "evaluate-addition-45", correct)
    content: dict[str, Any] = {"name": "both", "runs": rows, "not_run": [{"mode": "ssd", "why": "no samples"}], "base": []}
    if base is not None:
        evaluation(folder / "base" / "evaluate", base)
        content["base"] = [{"model_name": "m", "dataset": "addition", "evaluation": "base/evaluate"}]
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """A page as a browser sees it: elements, tables by `data-table`, texts by another `data-` attribute, links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.marked: dict[tuple[str, str | None], str] = {}
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self._table: list[list[str]] | None = None
        self._mark: tuple[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        found = dict(given)
        self.tags.append(tag)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        self.links += [found["href"] or ""] if tag == "a" else []
        self.sources += [value or "" for name, value in given if name in ("src", "xlink:href", "srcset", "data")]
        if tag == "table":
            self._table = self.tables.setdefault(found.get("data-table") or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        marks = [(name, value) for name, value in given if name.startswith("data-") and name != "data-table"]
        self._mark = marks[0] if marks else None
        if self._mark:
            self.marked[self._mark] = ""

    def handle_endtag(self, tag: str) -> None:
        self._mark = None
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._mark:
            self.marked[self._mark] += data
        if self._table and self._table[-1]:
            self._table[-1][-1] = (self._table[-1][-1] + data).strip()


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
