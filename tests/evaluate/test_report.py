"""The numbers of hand-made answers, and the table and picture made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from unisd_megatron.evaluate import report
from unisd_megatron.evaluate.statistics import wilson
from unisd_megatron.evaluate.summary import summarize


def answer(number: int, correct: bool, group: str | None, *, sample: int = 0, failure: str = "wrong answer") -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "sample": sample,
        "group": group,
        "tokens": 10 + number,
        "finished": failure != "not finished",
        "correct": correct,
        "failure": None if correct else failure,
        "metrics": {"names": 0.5} if number < 2 else {},
    }


ROWS = [
    answer(0, True, "physics"),
    answer(1, False, "physics"),
    answer(2, False, "biology", failure="not finished"),
    answer(3, False, "physics"),
]


def test_accuracy_groups_failures_and_metrics() -> None:
    found = summarize(ROWS)
    assert (found["correct"], found["answers"], found["accuracy"]) == (1, 4, 0.25)
    assert found["interval"] == pytest.approx(wilson(1, 4)) and found["interval_method"] == "Wilson"
    assert list(found["groups"]) == ["biology", "physics"]
    assert found["groups"]["physics"]["accuracy"] == pytest.approx(1 / 3)
    assert found["groups"]["physics"]["interval"] == pytest.approx(wilson(1, 3))
    assert (found["finished"], found["mean_tokens"]) == (0.75, 11.5)
    assert found["failures"] == {"wrong answer": 2, "not finished": 1}
    assert found["metrics"] == {"names": 0.25}  # an answer that was not scored counts as 0


def test_pass_at_k_of_several_answers() -> None:
    """One of two right, none of two right: pass@1 a quarter, pass@2 a half."""
    rows = [answer(n, (n, s) == (0, 1), None, sample=s) for n in range(2) for s in range(2)]
    found = summarize(rows)
    assert found["pass_at_k"] == {"1": 0.25, "2": 0.5}
    assert (found["examples"], found["answers"], found["groups"]) == (2, 4, {})
    assert found["interval"] == pytest.approx(wilson(0.75, 3))  # 4 answers, design effect (1/16) / (3/64)
    assert found["interval_method"] == "Wilson, effective number of answers"


def test_table_and_picture(tmp_path: Path) -> None:
    result = {"dataset": "gpqa", "model": "a model", **summarize(ROWS), "fit": {"ppl_corpus": 7.56, "tokens": 12}}
    report.write(tmp_path, result)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "accuracy.png", "result.json"}
    table = (tmp_path / "table.md").read_text()
    low, high = (100 * bound for bound in wilson(1, 3))
    assert f"| physics | 3 | 33.33 | {low:.1f} to {high:.1f} |" in table
    for line in ("| pass@1 | 0.2500 |", "| names | 0.2500 |", "| not finished | 1 |", "| fit: ppl_corpus | 7.56 |"):
        assert line in table.splitlines(), line
    blue, red = (0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)
    pixels = (image.imread(tmp_path / "accuracy.png")[:, :, :3] * 255).round().astype(int)
    found = {colour: (pixels == colour).all(-1).sum(1).astype(bool).sum() for colour in (blue, red)}
    assert found[blue] > 20 and found[red] > 2 * 20  # rows of pixels with the bar of "all", and with two kinds of failure
    assert report.headline(result).startswith("gpqa: 25.0 % (1 of 4), 95 % interval 4.6 to 69.9 %")


MANY = [answer(n, False, f"group {n}", failure=f"kind {n}") for n in range(60)]


@pytest.mark.parametrize("rows", [[answer(0, True, None)], MANY])
def test_nothing_wrong_and_very_much_wrong_are_drawn_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    report.draw({"dataset": "gpqa", "model": "a model", **summarize(rows)}, tmp_path / "picture.png")
    assert image.imread(tmp_path / "picture.png").shape[0] < 1400
