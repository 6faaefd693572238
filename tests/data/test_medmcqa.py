"""MedMCQA: which rows are questions, and that a file which counts otherwise is not read."""

import json
from pathlib import Path

import pytest

from unisd_megatron.data.tasks.medmcqa import MedMcqa
from unisd_megatron.errors import DataError

ROW = {
    "id": "e9ad821a",
    "question": "Which vitamin is supplied from only animal source:",
    "opa": "Vitamin C",
    "opb": "Vitamin B7",
    "opc": "Vitamin B12",
    "opd": "Vitamin D",
    "cop": 2,
    "choice_type": "single",
    "exp": "Ans. (c) Vitamin B12. Plants have none.",
    "subject_name": "Biochemistry",
    "topic_name": "Vitamins and Minerals",
}
TASK = MedMcqa()


def written(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_row_of_the_hub_becomes_a_question() -> None:
    record = TASK.parse(ROW, 0)
    assert record.id == "medmcqa_e9ad821a" and TASK.group(record) == "Biochemistry"
    assert "A. Vitamin C\nB. Vitamin B7\nC. Vitamin B12\nD. Vitamin D\n" in TASK.question(record)
    assert TASK.reference(record) == "Reasoning: Ans. (c) Vitamin B12. Plants have none.\nAnswer: C"
    assert TASK.judge(record, TASK.reference(record)).correct
    assert TASK.reference(TASK.parse(ROW | {"exp": None}, 0)) == "Answer: C"
    assert [each.kind[-1] for each in TASK.corruptions(record)] == ["A", "B", "D"]


def test_a_letter_and_its_word_are_told_apart() -> None:
    record = TASK.parse(ROW | {"cop": 1}, 0)
    assert TASK.judge(record, "Answer: B").correct
    assert TASK.judge(record, "Answer: B cells make antibodies").failure == "no answer"


def test_hidden_answers_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROW | {"cop": -1}, ROW, ROW | {"cop": 7})
    assert len(TASK.load("test", path)) == 1
    assert len(MedMcqa("released").load("test", path)) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cop": 4}, "cop is 4: the publisher's files count options from 1"),
        ({"cop": "2"}, "cop is '2'"),
        ({"cop": None}, "cop is None"),
        ({"opb": None}, "expected a list of texts"),
        ({"question": ""}, "the question is ''"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match=r"line 2: not a record of medmcqa: ") as caught:
        TASK.load("train", written(tmp_path / "rows.jsonl", ROW, ROW | changes))
    assert reason in str(caught.value)


def test_the_test_split_of_the_hub_is_its_validation_split() -> None:
    assert MedMcqa.splits == {"train": "train", "test": "validation"}  # the hub's own test split hides the answers
