"""ScienceQA: which questions are kept, what is shown beside them, and how they are grouped."""

import json
from pathlib import Path

import pytest

from unisd_megatron.data.mcqa import right_letter
from unisd_megatron.data.tasks.scienceqa import ScienceQa, ScienceQaHint
from unisd_megatron.errors import DataError

ROW = {
    "image": None,
    "question": "Which material is this spoon made of?",
    "choices": ["glass", "wood"],
    "answer": 1,
    "hint": "The passage below describes a spoon.",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "natural science",
    "topic": "physics",
    "category": "Materials",
    "skill": "Identify materials",
    "lecture": "A material is a type of matter.",
    "solution": "Look at the spoon.\nIt is made of wood.",
}
PICTURED = ROW | {"image": {"bytes": "", "path": "image.png"}, "question": "What does the picture show?"}
TASK = ScienceQa()


def written(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_the_lecture_is_shown_and_the_hint_only_on_demand() -> None:
    plain, hinted = TASK.question(TASK.parse(ROW, 0)), ScienceQaHint().question(ScienceQaHint().parse(ROW, 0))
    assert "\n\nContext: A material is a type of matter.\n\nA. glass\nB. wood\n\n" in plain and "passage below" not in plain
    assert "\n\nHint: The passage below describes a spoon.\n\nA. glass" in hinted and "Context: A material" in hinted
    bare = TASK.question(TASK.parse(ROW | {"lecture": "", "hint": ""}, 0))
    assert "Context" not in bare and "Hint" not in bare


def test_the_wrong_solution_is_asked_for_with_the_lecture_in_sight() -> None:
    [corruption] = TASK.corruptions(TASK.parse(ROW, 0))
    assert corruption.kind == "wrong option A" and "A material is a type of matter." in corruption.request


def test_the_reference_and_the_group() -> None:
    record = TASK.parse(ROW, 3)
    assert TASK.reference(record) == "Reasoning: Look at the spoon.\nIt is made of wood.\nAnswer: B"
    assert TASK.judge(record, TASK.reference(record)).correct
    assert TASK.group(record) == "natural science/physics" and TASK.topic(record) == ROW["question"]
    assert TASK.reference(TASK.parse(ROW | {"solution": ""}, 0)) == "Answer: B"


def test_questions_with_an_image_are_left_out(tmp_path: Path) -> None:
    records = TASK.load("test", written(tmp_path / "rows.json", [PICTURED, ROW, PICTURED]))
    assert [record.id for record in records] == ["scienceqa_1"]
    with pytest.raises(DataError, match="no test record for --dataset scienceqa"):
        TASK.load("test", written(tmp_path / "rows.json", [PICTURED]))


def test_the_released_order_counts_the_questions_without_an_image(tmp_path: Path) -> None:
    """Choice 1 of 5 goes to B, A, B by `random.Random(42)`, `43` and `44`: the picture before must not count."""
    row = ROW | {"choices": ["glass", "wood", "steel", "wool", "clay"]}
    path = written(tmp_path / "rows.json", [PICTURED, row, row])
    assert [right_letter(record) for record in ScienceQa("released").load("train", path)] == ["B", "A"]


def test_the_publishers_file_holds_all_splits_by_problem_id(tmp_path: Path) -> None:
    problems = {"7": ROW | {"split": "train"}, "9": ROW | {"split": "test"}, "12": ROW | {"split": "val"}}
    path = written(tmp_path / "problems.json", problems)
    assert [record.id for record in TASK.load("train", path)] == ["scienceqa_7"]
    assert [record.id for record in TASK.load("test", path)] == ["scienceqa_9"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"answer": 2}, "the answer is 2"), ({"choices": None}, "the choices are None"), ({"lecture": 1}, "Context is 1")],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match=f"record 2: not a record of scienceqa: {reason}"):
        TASK.load("train", written(tmp_path / "rows.json", [ROW, ROW | changes]))
