"""GSM8K: what counts as an answer, and wrong solutions that are wrong."""

import os
import random
import re
from pathlib import Path

import pytest

from unisd_megatron.data.task import Record
from unisd_megatron.data.tasks.gsm8k import Gsm8k, extract_answer, released_answer

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
NATALIA = Record(
    "gsm8k_0",
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
    },
)
TASK = Gsm8k()


def real(split: str) -> list[Record]:
    path = DATA / f"gsm8k_{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set UNISD_DATA to the folder of the real benchmark files")
    return TASK.load(split, str(path))


def record(answer: str) -> Record:
    return Record("gsm8k_1", {"question": "How many?", "answer": answer})


def test_the_question_is_followed_by_the_form_of_the_answer() -> None:
    question = TASK.question(NATALIA)
    assert question.startswith("Natalia sold clips to 48") and question.endswith("\n#### <number>")
    assert "step by step" in question and "72" not in question


def test_the_reference_has_no_calculator_annotations() -> None:
    assert TASK.reference(NATALIA) == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("48 + 24 = 72\n#### 72", 72),
        ("#### 10\nWait, that is wrong.\n#### 72", 72),
        ("#### 72.", 72),
        ("#### $1,080.00", 1080),
        ("####72", 72),
        ("#### –5", -5),  # an en dash
        ("#### ‑5", -5),  # a hyphen that does not break
        ("#### $–5", -5),
        ("It takes 10–3", 3),
        ("#### <<3*4=12>>12", 12),
        ("#### 3*4=12", 12),
        ("#### $3 * 4 = $12.", 12),
        ("#### 10 - 3 = 7\nCheck: 7 + 3 = 10", 7),
        ("#### 12 = the total", 12),
        ("#### (3 + 4) * 2 = 14", 14),
        ("#### 5 apples (with x = 3)", 5),
        ("So \\boxed{18}.\nCheck: 6 each for 3 people", 18),
        ("The answer is $\\boxed{18}$, for 3 people.", 18),
        ("Answer: in 2 steps, \\boxed{\\$18}.", 18),
        ("#### 5 is too small.</think>The answer is 7.", 7),
        ("<think>#### 5</think>So 7.", 7),
        ("<think>So 7.", None),
        ("#### **72** clips, out of 100", 72),
        ("#### 50%", 50),
        ("#### -7", -7),
        ("#### −7", -7),
        ("#### -$7", -7),
        ("#### $-7", -7),
        ("#### \\$18", 18),
        ("#### .5", 0.5),
        ("#### 1,00,000", 100_000),
        ("The answer is 72.", 72),
        ("the answer is: $1,234,567", 1_234_567),
        ("The answer is 5. No: the final answer is 7, since 3 + 4 is that.", 7),
        ("Answer: 12 apples and 3 pears", 12),
        ("**Answer:** 12 apples and 3 pears", 12),
        ("**Answer**: 12 apples and 3 pears", 12),
        ("She has 3 + 4 = 7 apples.", 7),
        ("It takes 10-3", 3),
        ("Between 10 and 12, so \\boxed{11}.", 11),
        ("First 2, 3, and then 5.", 5),
        ("so it is 3.50 dollars", 3.5),
        ("#### \nThe answer is 9", 9),
        ("8 ####", 8),
        ("The answer is unknown, though 6 is likely. The answer is none of them", 6),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_answer_of_a_completion_read_by_hand(completion: str, answer: float | None) -> None:
    found = extract_answer(completion)
    assert (None if found is None else float(found)) == answer


@pytest.mark.parametrize(
    ("gold", "completion", "correct"),
    [
        ("72", "#### 72", True),
        ("72", "#### 72.00", True),
        ("72", "#### 72.00009", True),
        ("72", "#### 72.001", False),
        ("72", "72 is the sum.\n#### 27", False),
        ("72", "It is seventy-two.", False),
        ("1,080", "The answer is $1080.", True),
        ("1080", "#### 1,080", True),
        ("-7", "#### 7", False),
        ("-7", "#### -7", True),
        ("0", "nothing", False),
        ("0.5", "#### 1/2 = 0.5", True),
        ("0.5", "#### 1/2", False),  # a number, not a calculation, is asked for
    ],
)
def test_an_answer_is_compared_as_a_number(gold: str, completion: str, correct: bool) -> None:
    assert TASK.judge(record(f"By thought.\n#### {gold}"), completion).correct is correct


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("48 + 24 = 72\n#### 72", 72),
        ("#### 10\nWait, that is wrong.\n#### 72", 72),
        ("#### $1,080.00", 1080),
        ("#### 50%", 50),
        ("#### -7", -7),
        ("#### −7", 7),  # a typographic minus is no sign
        ("#### -$7", 7),  # nor is one before the currency
        ("#### .5", 5),  # a decimal needs its zero
        ("#### 1,00,000", 1),  # Indian commas cut the number
        ("the answer is: $1,234,567", 1_234_567),
        ("The answer is 5. No: the final answer is 7.", 5),  # phrases are tried in an order of their own
        ("Answer: 12 apples and 3 pears", 12),
        ("THE ANSWER IS 12, not 3", 3),
        ("It takes 10-3", -3),  # the minus of a subtraction is read as a sign
        ("She has 3 + 4 = 7 apples.", 7),
        ("so it is 3.50 dollars", 3.5),
        ("#### \nThe answer is 9", 9),
        ("8 ####", 8),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_released_answer_of_a_completion_read_by_hand(completion: str, answer: float | None) -> None:
    found = released_answer(completion)
    assert (None if found is None else float(found)) == answer


def test_released_scoring_reads_a_subtraction_as_a_negative_number() -> None:
    assert Gsm8k("released").judge(record("So.\n#### 3"), "It takes 10-3").correct is False
    assert TASK.judge(record("So.\n#### 3"), "It takes 10-3").correct is True


def test_no_text_raises() -> None:
    rng = random.Random(0)
    alphabet = "0123456789.,-−$%/# \n#answer is:The²٣½\\(){}eE\x00"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(3000)]
    for text in [*texts, "9" * 10_000, "#### " + "9" * 10_000, "1" + ",11" * 2000, "#" * 1000, "#### 1/0", "٣"]:
        assert TASK.judge(NATALIA, text).correct in (True, False)
        assert Gsm8k("released").judge(NATALIA, text).correct in (True, False)


def test_a_slip_is_carried_on_to_the_answer() -> None:
    """Every wrong solution of this record is the right one with another number for May, or a wrong sum of right numbers."""
    wrong = {TASK.corrupt(NATALIA, random.Random(seed)) for seed in range(60)}
    form = r"Natalia sold 48/2 = (\d+) clips in May\.\nNatalia sold 48\+\1 = (\d+) clips altogether in April and May\.\n#### \2"
    found = [(int(match[1]), int(match[2])) for text in wrong if (match := re.fullmatch(form, text))]
    assert len(found) == len(wrong)
    assert all(total != 72 and (total == 48 + may or may == 24) for may, total in found)
    assert any(may != 24 for may, _ in found) and any(may == 24 for may, _ in found)


def test_a_slip_never_changes_what_the_question_gives() -> None:
    """The calculated 5 equals the given 5 boxes: were it the number to slip, the boxes would slip with it."""
    solution = Record(
        "gsm8k_1", {"question": "How much do 5 boxes hold?", "answer": "2+3=<<2+3=5>>5 each. 5*5=<<5*5=25>>25\n#### 25"}
    )
    wrong = {TASK.corrupt(solution, random.Random(seed)) for seed in range(40)}
    assert len(wrong) > 2 and all(re.fullmatch(r"2\+3=5 each\. 5\*5=(\d+)\n#### \1", text) for text in wrong)


def test_a_wrong_answer_keeps_the_way_numbers_are_written() -> None:
    solution = record("It is 9*120 = $<<9*120=1080>>1,080, paid on the 3rd day.\n#### 1,080")
    for seed in range(20):
        wrong = TASK.corrupt(solution, random.Random(seed))
        form = r"It is 9\*120 = \$(1,0[789]\d), paid on the 3rd day\.\n#### \1"
        assert re.fullmatch(form, wrong) and "1,080" not in wrong


@pytest.mark.parametrize("answer", ["So 7.\n#### 7", "#### 7", "He owes 3 - 10 = <<3-10=-7>>-7\n#### -7", "None: 0\n#### 0"])
def test_a_solution_without_a_usable_step_is_wrong_at_its_end(answer: str) -> None:
    for seed in range(10):
        wrong = TASK.corrupt(record(answer), random.Random(seed))
        assert not TASK.judge(record(answer), wrong).correct and re.search(r"#### -?\d+$", wrong)


def test_the_same_generator_gives_the_same_wrong_solution() -> None:
    assert TASK.corrupt(NATALIA, random.Random(3)) == TASK.corrupt(NATALIA, random.Random(3))


@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_of_all_real_records_the_reference_is_right_and_the_wrong_solution_wrong(split: str, size: int) -> None:
    records = real(split)
    assert len(records) == len({record.id for record in records}) == size
    for each in records:
        reference, wrong = TASK.reference(each), TASK.corrupt(each, random.Random(f"0:{each.id}"))
        assert TASK.judge(each, reference).correct and "<<" not in reference, each.id
        assert wrong != reference and not TASK.judge(each, wrong).correct and "<<" not in wrong, each.id
        assert wrong.count("\n") == reference.count("\n"), each.id  # the same form: only numbers differ
        assert re.sub(r"[\d,.]+", "", wrong) == re.sub(r"[\d,.]+", "", reference), each.id


@pytest.mark.parametrize(
    ("reasoning", "answer", "solution"),
    [
        ("5 - 2 = 3 each.\n5 * 3 = 15", "15", "5 - 2 = 3 each.\n5 * 3 = 15\n#### 15"),
        ("5 * 3 = 15", "$1,500.", "5 * 3 = 15\n#### 1,500"),
        ("5 * 3 = 15\n#### 15", "#### 15", "5 * 3 = 15\n#### 15"),
        ("It is -2.", "-2", "It is -2.\n#### -2"),
        ("", "15", None),
        ("5 * 3 = 15", "fifteen", None),
        ("5 * 3 = 15", "15 or 16", None),
    ],
)
def test_a_models_wrong_solution_takes_the_form_of_the_reference(reasoning: str, answer: str, solution: str | None) -> None:
    corruption, *_ = TASK.corruptions(NATALIA)
    assert NATALIA.fields["question"].strip() in corruption.request and corruption.kind in corruption.request
    assert TASK.negative(NATALIA, corruption, reasoning, answer) == solution
