"""Multiple choice: what counts as a stated answer, in which form questions, references and wrong solutions are shown."""

import random
import re
from collections.abc import Mapping
from typing import Any

import pytest

from unisd_megatron.data.mcqa import ChoiceTask, choice_record, released_answer, right_letter, stated_answer
from unisd_megatron.data.task import Record

OPTIONS = {"A": "magnet", "B": "antique shop", "C": "house"}


class Quiz(ChoiceTask):
    name = "quiz"
    hub_id = None

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        return choice_record(f"quiz_{index}", row["question"], row["choices"], row["answer"], explanation=row.get("why"))


QUIZ, RELEASED = Quiz(), Quiz("released")
LANTERN = QUIZ.parse(
    {
        "question": " Where is one? ",
        "choices": ["magnet", "antique shop", "house"],
        "answer": 2,
        "why": "Houses are dark.",
    },
    0,
)
UNEXPLAINED = QUIZ.parse({"question": "Where?", "choices": ["here", "there"], "answer": 0}, 1)


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        # The form that is asked for, and its decorations.
        ("Reasoning: It is dark at home.\nAnswer: C", "C"),
        ("Answer: C.", "C"),
        ("Answer: (C)", "C"),
        ("**Answer:** C", "C"),
        ("**Answer: C**", "C"),
        ("**Answer**: **C**", "C"),
        ("### Answer: `C`", "C"),
        ("answer: c", "C"),
        ("ANSWER: C", "C"),
        ("Answer: <C>", "C"),
        ("Answer:\n\nC", "C"),
        ("Answer: C. house", "C"),
        ("Answer: C) house", "C"),
        ("Answer: C: house", "C"),
        ("Answer: C (house)", "C"),
        ("Answer: C - house", "C"),
        ("Answer: C, because it is dark there.", "C"),
        ("Answer: C, not A", "C"),
        ("Answer: Option C", "C"),
        ("Final answer: C", "C"),
        ("The correct option: C", "C"),
        ('{"reasoning": "dark", "answer": "C"}', "C"),
        ("So $\\boxed{C}$.", "C"),
        ("Answer: $\\boxed{\\text{C}}$", "C"),
        ("Answer: C</s>", "C"),
        ("Answer: C<|im_end|>\n<|endoftext|>", "C"),
        ("C<end_of_turn>", "C"),
        ("Answer：C", "C"),  # a Chinese colon
        ("Answer - C", "C"),
        ("**Final answer** – C", "C"),
        ("Answer: C is correct", "C"),
        ("Answer: C is the right choice.", "C"),
        # Sentences.
        ("C is the correct answer.", "C"),
        ("It is dark.\nTherefore, option C is the best choice.", "C"),
        ("(C) is the correct option", "C"),
        ("A is the correct answer.\nNo: the answer is C.", "C"),
        ("The answer is A.\nNo.\nC is the correct answer.", "C"),
        ("The answer is C.", "C"),
        ("Therefore, the correct answer is (C) house.", "C"),
        ("I think the answer must be **C**", "C"),
        ("the answer is option C because it is dark", "C"),
        ("The best choice is C.", "C"),
        # A letter and nothing else.
        ("C", "C"),
        ("(C)", "C"),
        ("**C.**", "C"),
        ("It is dark at home.\nC", "C"),
        ("C. house", "C"),
        ("b) Antique shop.", "B"),
        # The last statement counts.
        ("Answer: A\nNo, wait.\nAnswer: C", "C"),
        ("The answer is A. Let me check.\nAnswer: B\nThe answer is C.", "C"),
        ("Answer: C\nThis answer is because of the dark.", "C"),
        ("The answer is not A.\nAnswer: C", "C"),
        ("<think>The answer is A.</think>\nAnswer: C", "C"),
        ("The answer is A.</think>\nAnswer: C", "C"),
        ("<think>The answer is A.\nAnswer: C", None),
        ("Answer: <A/B/C>\nAnswer: B", "B"),
        # Words that begin with a letter of an option.
        ("Answer: Because it is dark", None),
        ("A magnet attracts iron.", None),
        ("Answer: A magnet attracts iron", None),
        ("Answer: house", None),
        ("C. elegans is a worm.", None),
        ("Answer: C. elegans", None),
        ("The answer is C. elegans, a worm.", None),
        ("Answer: A-frame", None),
        ("Answer: B's", None),
        ("The answer is a house.", None),
        ("The answer is clearly stated above.", None),
        ("Answers: A", None),
        ("Answer - A magnet", None),
        ("Answer: C is incorrect", None),
        ("Answer: C is correct, but so is A", None),
        ("Vitamin C is the correct answer.", None),
        ("C is not the correct answer.", None),
        ("C is the correct answer to another question.", None),
        # More than one, none, or none of these.
        ("Answer: A or B", None),
        ("Answer: A, C", None),
        ("Answer: A and B", None),
        ("Answer: A/B/C", None),
        ("Answer: A. Answer: B", None),
        ("The answer is A, but the answer is B.", None),
        ("Answer: (A) or (C)", None),
        ("Answer: (A)/(B)", None),
        ("Answer: C and B.", None),
        ("Answer: D", None),
        ("Answer: C\nAnswer: D", None),
        ("Answer: C\nAnswer: none of these", None),
        ("Answer:", None),
        ("Answer: ?", None),
        ("Either A or C.", None),
        ("A. magnet\nB. antique shop\nC. house", None),
        ("D", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_answer_of_a_completion_read_by_hand(completion: str, letter: str | None) -> None:
    assert stated_answer(completion, OPTIONS) == letter


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("Answer: C", "C"),
        ("Answer: (C)", "C"),
        ("Answer: Because it is dark", "B"),
        ("Answer: A\nAnswer: C", "A"),
        ("The answer is C.", "C"),
        ("the answer is Clear", "C"),
        ("The answer is: C", "C"),  # no colon in the sentence pattern: found as the last letter that stands alone
        ("ANSWER: C", "C"),
        ("A magnet attracts iron.", "A"),
        ("A magnet attracts iron.\nAnswer: C", "C"),
        ("C) house", "C"),
        ("Either A or C", "C"),
        ("**Answer:** C", "C"),
        ("answer: c", None),
        ("**Answer: Because A is not it, C**", "C"),
        ("Answer: D", None),
        ("It is dark at home.", None),
        ("", None),
    ],
)
def test_the_released_cascade_read_by_hand(completion: str, letter: str | None) -> None:
    assert released_answer(completion, OPTIONS) == letter


def test_no_text_raises_and_none_takes_long() -> None:
    rng = random.Random(0)
    pieces = [
        "Answer",
        "answer is",
        ":",
        " ",
        "\n",
        "**",
        "(",
        "C",
        "A",
        "house",
        "\\boxed{",
        "}",
        "$",
        ".",
        ",",
        "é",
        "\x00",
        "²",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(3000)]
    for text in [*texts, "answer: " * 3000, "(" * 20_000, "answer:" + " *" * 20_000, "\\boxed{" * 5000, "A" * 50_000]:
        assert stated_answer(text, OPTIONS) in (*OPTIONS, None)
        assert released_answer(text, OPTIONS) in (*OPTIONS, None)


def test_the_question_asks_for_the_form_of_the_reference() -> None:
    question = QUIZ.question(LANTERN)
    assert "\n\nQuestion: Where is one?\n\nA. magnet\nB. antique shop\nC. house\n\n" in question
    assert question.endswith("Reasoning: <at most 3 short sentences>\nAnswer: <A/B/C>") and "Houses are dark" not in question
    assert QUIZ.reference(LANTERN) == "Reasoning: Houses are dark.\nAnswer: C"
    assert QUIZ.reference(UNEXPLAINED) == "Answer: A"
    assert QUIZ.topic(LANTERN) == "Where is one?"


def test_verdicts_name_the_failure() -> None:
    found = [QUIZ.judge(LANTERN, text) for text in ("Answer: C", "Answer: A", "Answer: D", "Because")]
    assert [(each.correct, each.failure) for each in found] == [
        (True, None),
        (False, "wrong answer"),
        (False, "no answer"),
        (False, "no answer"),
    ]
    assert QUIZ.judge(LANTERN, "Answer: Chairs").correct is False and RELEASED.judge(LANTERN, "Answer: Chairs").correct is True


def test_the_options_are_completions_and_exactly_one_is_right() -> None:
    options = QUIZ.options(LANTERN)
    assert options == {"A": "Answer: A", "B": "Answer: B", "C": "Answer: C"}
    assert [letter for letter, text in options.items() if QUIZ.judge(LANTERN, text).correct] == ["C"]


def test_each_wrong_letter_is_asked_for_and_what_comes_back_is_wrong() -> None:
    corruptions = QUIZ.corruptions(LANTERN)
    assert [each.kind for each in corruptions] == ["wrong option A", "wrong option B"]
    assert "A (magnet)" in corruptions[0].request and "C. house" in corruptions[0].request
    for corruption, letter in zip(corruptions, "AB", strict=True):
        wrong = QUIZ.negative(LANTERN, corruption, " Reasoning: Iron is dark. ", letter)
        assert wrong == f"Reasoning: Iron is dark.\nAnswer: {letter}"
        assert QUIZ.judge(LANTERN, wrong).failure == "wrong answer"
    assert QUIZ.negative(LANTERN, corruptions[0], " \n", "A") is None
    assert QUIZ.negative(LANTERN, corruptions[0], "It is a house after all.", "C") is None  # argues for something else
    assert not QUIZ.has_rule() and QUIZ.corrupt(LANTERN, random.Random(0)) is None


def test_an_option_that_says_the_same_as_the_right_one_is_no_wrong_option() -> None:
    twins = QUIZ.parse({"question": "Where?", "choices": ["Home", "home ", "shop"], "answer": 0}, 0)
    assert [each.kind for each in QUIZ.corruptions(twins)] == ["wrong option C"]


def test_right_and_wrong_solutions_stand_in_one_form() -> None:
    right = QUIZ.reference(LANTERN)
    wrong = QUIZ.negative(LANTERN, QUIZ.corruptions(LANTERN)[0], "Iron is dark.", "A")
    assert wrong is not None
    shown = QUIZ.teacher_prompt(LANTERN, right), QUIZ.teacher_prompt(LANTERN, wrong, negative=True)
    assert shown[0].replace(right, "SOLUTION") == shown[1].replace(wrong, "SOLUTION")


def test_released_solutions_differ_in_form_as_the_authors_do() -> None:
    """`Answer: X.` and no blank lines around for the wrong one; a line end more after the right one; a bare letter alone."""
    right = RELEASED.teacher_prompt(LANTERN, RELEASED.reference(LANTERN))
    negative = RELEASED.negative(LANTERN, RELEASED.corruptions(LANTERN)[0], "Iron is dark.", "C")
    assert negative == "Reasoning: Iron is dark.\nAnswer: A."
    wrong = RELEASED.teacher_prompt(LANTERN, negative, negative=True)
    assert right.startswith("\n") and right.endswith("\n") and "Answer: C\n\n\n" in right
    assert wrong == wrong.strip() and "Answer: A.\n\n" in wrong and "Answer: A.\n\n\n" not in wrong
    assert RELEASED.reference(UNEXPLAINED) == "A" and RELEASED.judge(UNEXPLAINED, "A").correct
    context = RELEASED.auxiliary_prompt(UNEXPLAINED, [LANTERN])
    assert "Where is one?\n\nA) magnet\nB) antique shop\nC) house\n" in context
    assert "Answer: C.\nExplanation: Houses are dark." in context and context.endswith(RELEASED.question(UNEXPLAINED))


def test_donors_are_shown_whole_and_the_question_last() -> None:
    context = QUIZ.auxiliary_prompt(UNEXPLAINED, [LANTERN])
    assert QUIZ.reference(LANTERN) in context and context.endswith(QUIZ.question(UNEXPLAINED))


def test_the_order_is_the_publishers_and_the_released_one_is_drawn_by_position(tmp_path: Any) -> None:
    """Expected: `random.Random(42 + position).shuffle([0, 1, 2, 3, 4])`, which is what the authors' loaders do."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Q?", "choices": ["a", "b", "c", "d", "e"], "answer": 1}\n' * 3)
    for record in QUIZ.load("train", str(path)):
        assert list(re.findall(r"^[A-E]\. (\w)$", QUIZ.question(record), re.MULTILINE)) == list("abcde")
        assert right_letter(record) == "B"
    orders = []
    for record in RELEASED.load("train", str(path)):
        shown = dict(re.findall(r"^([A-E])\. (\w)$", RELEASED.question(record), re.MULTILINE))
        assert shown[right_letter(record)] == "b"
        orders.append("".join(shown.values()))
    assert orders == ["dbcea", "bedca", "cbead"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": " "}, "the question is ' '"),
        ({"question": None}, "the question is None"),
        ({"choices": "abc"}, "the choices are 'abc'"),
        ({"choices": ["a", 2]}, "expected a list of texts"),
        ({"choices": ["a"]}, "there are 1 choices"),
        ({"choices": ["a"] * 11}, "there are 11 choices"),
        ({"answer": 3}, "the answer is 3"),
        ({"answer": -1}, "the answer is -1"),
        ({"answer": True}, "the answer is True"),
        ({"answer": "A"}, "the answer is 'A'"),
        ({"why": 5}, "the explanation is 5"),
    ],
)
def test_what_is_not_a_question_with_one_right_choice_is_refused(changes: dict[str, object], reason: str) -> None:
    row = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 0}
    with pytest.raises(ValueError, match=re.escape(reason)):
        QUIZ.parse(row | changes, 0)
