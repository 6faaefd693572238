"""The demo's task promises fixed text forms, a held-out tenth, and negatives that are wrong but look the same."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from unisd_megatron.data.task import Record
from unisd_megatron.data.tasks.addition import (
    Addition,
    careful_solution,
    careless_solution,
    is_held_out,
    question_text,
    referred_text,
    solved_text,
)
from unisd_megatron.errors import DataError

MODEL = Path(__file__).parents[2] / "examples" / "demo" / "model"
TASK = Addition()
SOLUTION = "7+5+0=12;4+8+1=13;3+2+1=06#0632"


def record_of(a: int, b: int) -> Record:
    return TASK.parse({"a": a, "b": b}, 0)


def all_records() -> list[Record]:
    return TASK.load("train", None) + TASK.load("test", None)


def test_forms_are_those_the_model_was_pretrained_on() -> None:
    record, donor = record_of(347, 285), record_of(7, 5)
    assert record.id == "347+285"
    assert TASK.question(record) == question_text(347, 285) == "Q:347+285\nA:"
    assert TASK.reference(record) == careful_solution(347, 285) == SOLUTION
    assert TASK.teacher_prompt(record, SOLUTION) == referred_text(347, 285, SOLUTION) == f"Q:347+285\nR:{SOLUTION}\nA:"
    shown = "Q:007+005\nA:7+5+0=12;0+0+1=01;0+0+0=00#0012\n"
    assert solved_text(7, 5, careful_solution(7, 5)) == shown
    assert TASK.auxiliary_prompt(record, [donor]) == shown + "Q:347+285\nA:"
    assert TASK.auxiliary_prompt(record, [donor, donor]) == shown * 2 + "Q:347+285\nA:"
    assert TASK.auxiliary_prompt(record, []) == TASK.question(record)


@pytest.mark.parametrize(
    ("a", "b", "careful", "careless"),
    [
        (0, 0, "0+0+0=00;0+0+0=00;0+0+0=00#0000", "0+0+0=00;0+0+0=00;0+0+0=00#0000"),
        (999, 999, "9+9+0=18;9+9+1=19;9+9+1=19#1998", "9+9+0=18;9+9+0=18;9+9+0=18#1888"),
        (347, 285, SOLUTION, "7+5+0=12;4+8+0=12;3+2+0=05#0522"),
        (900, 800, "0+0+0=00;0+0+0=00;9+8+0=17#1700", "0+0+0=00;0+0+0=00;9+8+0=17#1700"),
    ],
)
def test_solutions_by_hand(a: int, b: int, careful: str, careless: str) -> None:
    assert (careful_solution(a, b), careless_solution(a, b)) == (careful, careless)


def test_an_author_may_be_wrong_about_single_digits() -> None:
    def believed(x: int, y: int) -> int:
        return 9 if {x, y} == {3, 8} else x + y

    assert careful_solution(383, 118, believed) == "3+8+0=09;8+1+0=09;3+1+0=04#0499"
    assert careless_solution(383, 148, believed) == "3+8+0=09;8+4+0=12;3+1+0=04#0429"


def test_every_text_has_one_length() -> None:
    for record in all_records():
        reference = TASK.reference(record)
        lengths = len(TASK.question(record)), len(reference), len(TASK.teacher_prompt(record, reference))
        assert lengths == (12, 31, 46)


def test_references_are_right() -> None:
    assert all(TASK.judge(record, TASK.reference(record)).correct for record in all_records())


def test_corruptions_are_wrong_and_of_the_reference_form() -> None:
    for record in all_records():
        wrong = TASK.corrupt(record, random.Random(0))
        assert len(wrong) == 31
        assert not TASK.judge(record, wrong).correct
        positive, negative = TASK.teacher_prompt(record, TASK.reference(record)), TASK.teacher_prompt(record, wrong)
        assert negative == positive.replace(TASK.reference(record), wrong)


def test_sums_with_a_carry_are_corrupted_by_forgetting_it() -> None:
    for record in all_records():
        a, b = record.fields["a"], record.fields["b"]
        if a % 10 + b % 10 > 9 or a % 100 + b % 100 > 99:
            assert TASK.corrupt(record, random.Random(0)) == careless_solution(a, b)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (SOLUTION, True),
        ("#0632", True),
        ("#632", True),
        ("#0999#0632", True),
        ("#0632\n", True),
        ("#0632#", False),
        ("#0633", False),
        ("#06320", False),
        ("#+632", False),
        ("#6_32", False),
        ("#-632", False),
        ("#0632;", False),
        ("0632", False),
        ("#", False),
        ("", False),
        ("#\u0660632", False),
    ],
)
def test_answer_is_the_number_behind_the_last_mark(completion: str, right: bool) -> None:
    assert TASK.judge(record_of(347, 285), completion).correct is right


def test_zero_is_an_answer() -> None:
    assert TASK.judge(record_of(0, 0), "#0000").correct
    assert not TASK.judge(record_of(0, 0), "#").correct


def test_splits_are_disjoint_repeatable_and_of_their_sizes() -> None:
    train, test = TASK.load("train", None), TASK.load("test", None)
    assert (len({record.id for record in train}), len({record.id for record in test})) == (len(train), len(test)) == (2048, 300)
    assert all(is_held_out(**record.fields) for record in test)
    assert not any(is_held_out(**record.fields) for record in train)
    assert (train, test) == (TASK.load("train", None), TASK.load("test", None))


def test_the_drawn_questions_stay() -> None:
    # numbers reported for the demo are about these very questions
    assert [record.id for record in TASK.load("train", None)[:3]] == ["991+697", "594+171", "824+199"]
    assert [record.id for record in TASK.load("test", None)[:3]] == ["195+272", "276+297", "622+863"]


def test_a_tenth_is_held_out_in_every_residue_class() -> None:
    held_out = [0] * 10
    for a in range(0, 1000, 3):
        for b in range(0, 1000, 7):
            held_out[(a + b) % 10] += is_held_out(a, b)
    share = [count / (334 * 143 / 10) for count in held_out]
    assert min(share) > 0.08
    assert max(share) < 0.12


def test_a_file_is_split_by_the_same_rule(tmp_path: Path) -> None:
    rows = [{"a": a, "b": a + 1} for a in range(100)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, test = TASK.load("train", str(path)), TASK.load("test", str(path))
    assert [record.fields for record in test] == [row for row in rows if is_held_out(**row)]
    assert [record.fields for record in train] == [row for row in rows if not is_held_out(**row)]


@pytest.mark.parametrize("row", [{"a": 1}, {"a": 1, "b": 1000}, {"a": -1, "b": 0}, {"a": "1", "b": 2}, {"a": True, "b": 2}])
def test_a_broken_row_is_named(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"a": 1, "b": 2}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"questions\.jsonl, line 2: "):
        TASK.load("train", str(path))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev'; use train or test"):
        TASK.load("dev", None)


def test_the_committed_tokenizer_is_one_token_per_character() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    characters = "0123456789+=#;:QRAX\n "
    assert tokenizer.encode(characters) == list(range(2, 23))
    assert tokenizer.decode(list(range(2, 23))) == characters
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 32)
    assert tokenizer.chat_template is None
    for record in all_records()[::50]:
        text = TASK.auxiliary_prompt(record, [record_of(7, 5)]) + TASK.reference(record)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == text


def test_the_committed_model_is_of_the_stated_shape_and_size() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    stated = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 32, "hidden_size": 64, "dtype": "float16"}
    assert {name: config[name] for name in stated} == stated
    assert json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"] == 1
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 1_000_000
