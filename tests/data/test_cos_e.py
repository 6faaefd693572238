"""CoS-E: the hub's table, the publisher's pair of files, and the real records."""

import json
import os
import re
from pathlib import Path

import pytest

from unisd_megatron.data.contexts import build_examples
from unisd_megatron.data.tasks.cos_e import CosE
from unisd_megatron.errors import DataError

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HUB_ROW = {
    "id": "1de9ea66",
    "question": "The fox walked from the city into the forest, what was it looking for?",
    "choices": ["pretty flowers.", "hen house", "natural habitat", "storybook", "dense forest"],
    "answer": "natural habitat",
    "abstractive_explanation": "Foxes live in forests.",
    "extractive_explanation": "the forest",
}
STEM = {"stem": "Where is a lantern?", "choices": [{"label": "A", "text": "shop"}, {"label": "B", "text": "house"}]}
QUESTION = {"answerKey": "B", "id": "d3b4", "question": STEM}
EXPLANATION = {"id": "d3b4", "explanation": {"open-ended": "It is dark at home.", "selected": "not for sale"}}
TASK = CosE()


def written(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(folder: Path, questions: list[object], explanations: list[object]) -> str:
    written(folder / "cose_train_v1.0.jsonl", *explanations)
    return written(folder / "csqa_v1.0_train_rand_split.jsonl", *questions)


def real(part: str) -> str:
    path = DATA / f"csqa_v1.0_{part}_rand_split.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set UNISD_DATA to the folder of the real benchmark files")
    return str(path)


def test_a_row_of_the_hub_becomes_a_question() -> None:
    record = TASK.parse(HUB_ROW, 0)
    assert record.id == "cos_e_1de9ea66" and "\nE. dense forest\n" in TASK.question(record)
    assert TASK.reference(record) == "Reasoning: Foxes live in forests.\nAnswer: C"
    assert TASK.judge(record, TASK.reference(record)).correct and CosE.splits["test"] == "validation"


def test_the_publishers_pair_is_joined_by_id(tmp_path: Path) -> None:
    other = QUESTION | {"id": "fb72"}
    more = EXPLANATION | {"id": "fb72", "explanation": {"open-ended": "Another reason.", "selected": ""}}
    records = TASK.load("train", pair(tmp_path, [QUESTION, other], [more, EXPLANATION]))
    assert [TASK.reference(record) for record in records] == [
        "Reasoning: It is dark at home.\nAnswer: B",
        "Reasoning: Another reason.\nAnswer: B",
    ]


def test_questions_alone_have_references_without_reasoning(tmp_path: Path) -> None:
    for name in ("csqa_v1.0_train_rand_split.jsonl", "questions.jsonl"):
        [record] = TASK.load("train", written(tmp_path / name, QUESTION))
        assert TASK.reference(record) == "Answer: B" and TASK.judge(record, "Answer: B").correct


@pytest.mark.parametrize(
    ("explanations", "reason"),
    [
        ([EXPLANATION | {"id": "zzzz"}], "no explanation for cos_e_d3b4 of "),
        ([EXPLANATION, EXPLANATION], "line 2: the id cos_e_d3b4 is that of "),
        ([{"id": "d3b4"}], "line 1: no explanation of cos_e: explanation.open-ended is None"),
        ([{"id": "d3b4", "explanation": "dark"}], "line 1: no explanation of cos_e"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path, explanations: list[object], reason: str) -> None:
    with pytest.raises(DataError, match=r"cose_train_v1\.0\.jsonl") as caught:
        TASK.load("train", pair(tmp_path, [QUESTION], explanations))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "split", "right"), [("dev", "train", "test"), ("train", "test", "train")])
def test_the_publishers_file_of_the_other_split_is_refused(tmp_path: Path, part: str, split: str, right: str) -> None:
    path = written(tmp_path / f"csqa_v1.0_{part}_rand_split.jsonl", QUESTION)
    with pytest.raises(DataError, match=rf"{part}_rand_split\.jsonl: by its name this is the {right} split, not the {split} "):
        TASK.load(split, path)
    assert len(TASK.load(right, path)) == len(TASK.load("all", path)) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (HUB_ROW | {"answer": "a river"}, "the answer 'a river' is not among the choices"),
        (HUB_ROW | {"choices": None}, "is not among the choices None"),
        (QUESTION | {"answerKey": "C"}, "the answer 'C' is not among the choices ['A', 'B']"),
        ({"id": "d3b4", "question": STEM}, "field 'answerKey' is missing"),
        (QUESTION | {"question": {"stem": "Where?"}}, "field 'choices' is missing"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(DataError, match="line 1: not a record of cos_e: ") as caught:
        TASK.load("train", written(tmp_path / "rows.jsonl", row))
    assert reason in str(caught.value)


@pytest.mark.parametrize("semantics", ["corrected", "released"])
@pytest.mark.parametrize(("part", "split", "size"), [("train", "train", 7610), ("dev", "test", 950)])
def test_of_all_real_records_the_reference_is_right_and_every_wrong_option_wrong(
    part: str, split: str, size: int, semantics: str
) -> None:
    task = CosE("released" if semantics == "released" else "corrected")
    records = task.load(split, real(part))
    assert len({record.id for record in records}) == len(records) == size
    for record in records:
        reference = task.reference(record)
        assert task.judge(record, reference).correct and re.search(r"(?s)^Reasoning: .+\nAnswer: [ABC]$", reference), record.id
        assert reference not in task.question(record) and reference in task.teacher_prompt(record, reference), record.id
        corruptions = task.corruptions(record)
        assert len(corruptions) == 2, record.id
        for corruption in corruptions:
            wrong = task.negative(record, corruption, record.fields["explanation"], corruption.kind[-1])
            assert wrong is not None and task.judge(record, wrong).failure == "wrong answer", record.id


def test_real_records_become_examples() -> None:
    records = TASK.load("train", real("train"))
    examples, dropped = build_examples(TASK, records, auxiliary=1, donors_per_context=1, negatives=False, seed=0)
    assert len(examples) == 7610 and dropped == 0
    for record, example in zip(records, examples, strict=True):
        reference = TASK.reference(record)
        assert reference in example.teacher and reference not in example.prompt, record.id
        assert example.auxiliary[0].endswith(example.prompt) and example.auxiliary[0].count(example.prompt) == 1, record.id
