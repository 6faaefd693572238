"""GPQA: for evaluation only, with an order of its own for each question."""

import json
from collections import Counter
from pathlib import Path

import pytest

from unisd_megatron.data.mcqa import right_letter
from unisd_megatron.data.tasks.gpqa import Gpqa
from unisd_megatron.errors import DataError

ROW = {
    "Record ID": "rec06pnAkLOr2t2mp",
    "Question": "Which particle has no charge?\n",
    "Correct Answer": "neutron\n",
    "Incorrect Answer 1": "proton",
    "Incorrect Answer 2": "electron",
    "Incorrect Answer 3": "positron",
    "Explanation": "It is neutral.",
    "High-level domain": "Physics",
    "Subdomain": "Particle Physics",
}
TASK = Gpqa()


def many(count: int) -> list[dict[str, str]]:
    return [ROW | {"Record ID": f"rec{number}", "Question": f"Question {number}?"} for number in range(count)]


def written(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dataset gpqa has no split 'train'; it is for evaluation only"):
        TASK.load("train", written(tmp_path / "rows.json", [ROW]))
    with pytest.raises(DataError, match="evaluation only"):
        TASK.load("train", None)


def test_a_row_of_the_hub_becomes_a_question() -> None:
    record = TASK.parse(ROW, 0)
    letter = right_letter(record)
    assert f"\n{letter}. neutron\n" in TASK.question(record) and TASK.group(record) == "Physics"
    assert TASK.reference(record) == f"Reasoning: It is neutral.\nAnswer: {letter}"
    assert TASK.judge(record, TASK.reference(record)).correct
    assert len(TASK.corruptions(record)) == 3


def test_the_right_answer_is_at_every_letter_about_equally_often() -> None:
    letters = Counter(right_letter(TASK.parse(row, 0)) for row in many(400))
    assert set(letters) == set("ABCD") and min(letters.values()) > 70  # 100 expected, standard deviation 8.7


def test_the_order_of_a_question_does_not_depend_on_its_place(tmp_path: Path) -> None:
    rows = many(12)
    forward = {record.id: TASK.question(record) for record in TASK.load("test", written(tmp_path / "rows.json", rows))}
    backward = {record.id: TASK.question(record) for record in TASK.load("test", written(tmp_path / "rows.json", rows[::-1]))}
    assert forward == backward and len(forward) == 12


def test_the_released_order_depends_on_the_place(tmp_path: Path) -> None:
    rows = [ROW | {"Record ID": f"rec{n}"} for n in range(4)]
    records = Gpqa("released").load("test", written(tmp_path / "rows.json", rows))
    assert "".join(map(right_letter, records)) == "DDBA"  # of `random.Random(42 + place).shuffle([0, 1, 2, 3])`


def test_a_broken_row_is_refused_with_its_place(tmp_path: Path) -> None:
    broken = {name: value for name, value in ROW.items() if name != "Incorrect Answer 2"}
    with pytest.raises(DataError, match="record 2: not a record of gpqa: field 'Incorrect Answer 2' is missing"):
        TASK.load("test", written(tmp_path / "rows.json", [ROW, broken]))
