"""No leak: for every task and every kind of context, the gold answer is in a prompt exactly when it is said to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from unisd_megatron.data import TASKS, Example, Record, Task
from unisd_megatron.data.contexts import Instruction, Nearest, build_examples
from unisd_megatron.data.task import Semantics

COUNT = 12


def choice(n: int) -> list[str]:
    return [f"{word} of item {n}" for word in ("taste", "shape", "price", "smell")]


def tool_row(n: int) -> dict[str, Any]:
    call = {"Action": "look_up", "Action_Input": f'{{"key": "gold{n}x"}}'}
    prompt = f"Tools: look_up(key), drop(key)\nThe tool is one of: look_up, drop\nQuestion: Request number {n}\nBegin!"
    response = [f"Thought: I look up gold{n}x.\nAction: look_up\nAction Input: {call['Action_Input']}"]
    return {"prompt": prompt, "instruction": f"Request number {n}", "golden_response": response, "golden_answer": [call]}


def mbpp_row(n: int) -> dict[str, Any]:
    tests = [f"assert add{n}(1, 2) == {n + 3}"]
    return {
        "task_id": 601 + n,
        "code": f"def add{n}(a, b):\n    gold{n}x = a + b\n    return gold{n}x + {n}",
        "test_list": tests,
    }


def medical_row(n: int) -> dict[str, Any]:
    letters = dict(zip(("opa", "opb", "opc", "opd"), choice(n), strict=True))
    return {"id": f"m{n}", "question": f"Disease {n}?", **letters, "cop": n % 4, "exp": f"It is gold{n}x.", "subject_name": "A"}


def science_row(n: int) -> dict[str, Any]:
    return {
        "question": f"Which is it in case {n}?",
        "choices": choice(n),
        "answer": n % 4,
        "solution": f"By rule gold{n}x.",
        "lecture": "Cases differ.",
        "hint": f"This is case {n}.",
        "image": None,
    }


def common_sense_row(n: int) -> dict[str, Any]:
    choices = choice(n)
    return {
        "id": f"c{n}",
        "question": f"What about case {n}?",
        "choices": choices,
        "answer": choices[n % 4],
        "abstractive_explanation": f"because of gold{n}x",
    }


def word_problem_row(n: int) -> dict[str, Any]:
    return {
        "question": f"Person {n} has {n}?",
        "answer": f"gold{n}x: {n}+5010=<<{n}+5010={n + 5010}>>{n + 5010}\n#### {n + 5010}",
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "addition": lambda n: {"a": 113 + n, "b": 405 + 3 * n},
    "gsm8k": word_problem_row,
    "mbpp": lambda n: mbpp_row(n) | {"text": f"Add two numbers and {n}."},
    "mbpp_sanitized": lambda n: mbpp_row(n) | {"prompt": f"Add two numbers and {n}.", "test_imports": []},
    "cos_e": common_sense_row,
    "medmcqa": medical_row,
    "scienceqa": science_row,
    "scienceqa_hint": science_row,
    "tooluse": tool_row,
}
TRAINED = [name for name, task in TASKS.items() if "train" in task.splits]
SEMANTICS: list[Semantics] = ["corrected", "released"]


def gold_of(task: Task, record: Record, n: int) -> str:
    """What nobody could write who has not seen the reference of record `n`."""
    return task.reference(record) if task.name == "addition" else f"gold{n}x"


def side_by_side(count: int) -> Sequence[Sequence[int]]:
    """As if records were the more similar the nearer they stand."""
    return [sorted(range(COUNT), key=lambda j: (abs(i - j), j))[:count] for i in range(COUNT)]


def prepared(name: str, semantics: Semantics) -> tuple[Task, list[Record]]:
    task = TASKS[name](semantics)
    assert name in ROWS, f"a new task: give it rows here, whose references hold gold<n>x and whose questions do not ({name})"
    return task, [task.parse(ROWS[name](n), n) for n in range(COUNT)]


def build(
    task: Task, records: Sequence[Record], gold: bool, nearest: Nearest | None, instructions: list[Instruction] | None
) -> list[Example]:
    generated = None if task.has_rule() else {record.id: [f"A wrong way to {record.id}."] for record in records}
    examples, dropped = build_examples(
        task,
        records,
        auxiliary=3,
        donors_per_context=2,
        negatives=True,
        seed=1,
        gold=gold,
        nearest=nearest,
        instructions=instructions,
        generated=generated,
    )
    assert dropped == 0 and [one.id for one in examples] == [record.id for record in records]
    return examples


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize("method", ["random", "retrieval", "induction"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_gold_answer_is_shown_exactly_where_it_is_said_to_be(
    name: str, method: str, gold: bool, semantics: Semantics
) -> None:
    task, records = prepared(name, semantics)
    instructions = None
    if method == "induction":
        if name == "addition":
            pytest.skip("addition has no instructions")
        instructions = [Instruction(f"Take care, says {i}.", frozenset()) for i in range(4)]
    examples = build(task, records, gold, side_by_side if method == "retrieval" else None, instructions)
    # The released code leaks in two places (unisd.md A13, A22).
    shown = gold or (semantics == "released" and method == "retrieval" and name in ("tooluse", "medmcqa"))
    for n, (record, example) in enumerate(zip(records, examples, strict=True)):
        answer = gold_of(task, record, n)
        assert task.reference(record) in example.teacher and answer in example.teacher
        assert answer not in example.prompt
        assert len(example.auxiliary) == 3
        if shown and name == "medmcqa" and not gold:  # finds itself in the first context
            assert [answer in context for context in example.auxiliary] == [True, False, False]
        else:
            assert all((answer in context) == shown for context in example.auxiliary)
        assert example.negative is not None and task.reference(record) not in example.negative
        if not task.has_rule():
            assert f"A wrong way to {record.id}." in example.negative and answer not in example.negative


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["random", "retrieval"])
def test_contexts_show_other_records_answers(name: str, method: str) -> None:
    """Else the test above could not fail: donors are solved, and each context has its own."""
    task, records = prepared(name, "corrected")
    for n, example in enumerate(build(task, records, False, side_by_side if method == "retrieval" else None, None)):
        seen = [
            {other for other in range(COUNT) if gold_of(task, records[other], other) in context}
            for context in example.auxiliary
        ]
        assert [len(donors) for donors in seen] == [2, 2, 2] and len(set.union(*seen)) == 6
        if method == "retrieval":
            nearest = [other for other in side_by_side(7)[n] if other != n]
            assert seen == [set(nearest[:2]), set(nearest[2:4]), set(nearest[4:6])]


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "addition"])
def test_an_instruction_is_never_shown_to_a_record_that_it_was_induced_from(name: str) -> None:
    """It may tell that record's answer."""
    task, records = prepared(name, "corrected")
    telling = [Instruction(gold_of(task, record, n), frozenset({record.id})) for n, record in enumerate(records[:4])]
    examples = build(task, records, False, None, telling)
    for n, example in enumerate(examples):
        assert all(f"gold{n}x" not in context for context in example.auxiliary)
        assert len(set(example.auxiliary)) == 3  # there are as many others


@pytest.mark.parametrize("name", [name for name in TRAINED if "answer" in ROWS.get(name, dict)(0)])
@pytest.mark.parametrize("method", ["random", "retrieval"])
def test_a_twin_is_no_donor_in_whatever_order_its_options_stand(name: str, method: str) -> None:
    task, records = prepared(name, "corrected")
    row = ROWS[name](3)
    if "choices" in row:
        row["choices"] = row["choices"][::-1]
        row["answer"] = 3 - row["answer"] if isinstance(row["answer"], int) else row["answer"]
    twin = Record("twin", task.parse(row, 3).fields)
    ranked = [sorted(range(COUNT + 1), key=lambda j: (j != COUNT, abs(3 - j), j))] * (COUNT + 1)
    for seed in range(8):
        examples, _ = build_examples(
            task,
            [*records, twin],
            auxiliary=3,
            donors_per_context=2,
            negatives=False,
            seed=seed,
            nearest=(lambda count: [one[:count] for one in ranked]) if method == "retrieval" else None,
        )
        for example in (examples[3], examples[-1]):
            assert all("gold3x" not in context for context in example.auxiliary)
