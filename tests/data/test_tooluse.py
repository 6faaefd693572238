"""Tool use: which calls a completion makes, what they are worth, and the publisher's files as prompts."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from unisd_megatron.data.task import Record
from unisd_megatron.data.tasks.tooluse import ToolUse
from unisd_megatron.data.toolcalls import read_calls
from unisd_megatron.errors import DataError

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PROMPT = """Use the tools: search: finds rooms. book: books one.

Use the following format:
Thought: think
Action: one of [search, book, cancel]
Action Input: JSON

Begin!

Question: Two cheap rooms with a view"""
ROW = {
    "prompt": PROMPT,
    "instruction": "Two cheap rooms with a view",
    "golden_response": ["I search for rooms.", 'Action: search\nAction Input: {"rooms": 2, "view": true, "name": ""}'],
    "golden_answer": [{"Action": "search", "Action_Input": '{"rooms": 2, "view": true, "name": ""}'}],
    "name": "Hotels",
}
TASK, RELEASED = ToolUse(), ToolUse("released")
API = {
    "Name": "Hotels",
    "Function_Description": {
        "search": "Finds rooms.",
        "book": 'Books.\nParameters: {"id": "string"}',
        "components": "#Room: Object",
    },
    "Authentication": {"key": "***"},
    "Instructions": ["Find a room.", "Book the one you found.", "Ask me.", "Book room 7, and find another if you can."],
    "Golden_Answers": [
        [{"Action": "search", "Action_Input": '{"rooms": 1, "key": "a secret"}'}],
        [{"Action": "book", "Action_Input": '{"id": ${id from search}}'}],
        [{"Action": "getDetails", "Action_Input": "{}"}],
        [{"Action": "book", "Action_Input": '{"id": "7"}'}, {"Action": "[Optional]search", "Action_Input": "{}"}],
    ],
}


def record(*golden: tuple[str, object]) -> Record:
    calls = [{"Action": tool, "Action_Input": json.dumps(given)} for tool, given in golden]
    return TASK.parse(ROW | {"golden_response": [""], "golden_answer": calls}, 0)


def react(*calls: tuple[str, object]) -> str:
    return "\n".join(f"Action: {tool}\nAction Input: {json.dumps(given)}" for tool, given in calls)


def real(part: str) -> str:
    path = DATA / f"toolalpaca_eval_{part}.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set UNISD_DATA to the folder of the real benchmark files")
    return str(path)


def written(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


SEARCH = [("search", {"a": 1})]


@pytest.mark.parametrize(
    ("completion", "calls"),
    [
        ('Thought: So.\nAction: search\nAction Input: {"a": 1}', SEARCH),
        ('Action: search\nAction Input: {"a": 1}\nObservation: done\nThought: I know.\nFinal Answer: 1', SEARCH),
        ('Action: search\nAction Input: {\n  "a": 1\n}\nThis finds it.', SEARCH),
        ('Action: search\nAction Input:\n```json\n{"a": 1}\n```', SEARCH),
        ('**Action:** `search`\n**Action Input:** {"a": 1}', SEARCH),
        ('Action 1: search\nAction Input 1: {"a": 1}', SEARCH),
        ('Action: search()\nAction_Input: {"a": 1}', SEARCH),
        ('action: search\n\naction input: {"a": 1} (one)', SEARCH),
        ('Action: search\nAction Input: "{\\"a\\": 1}"', SEARCH),
        ('<think>Action: book\nAction Input: {}</think>\nAction: search\nAction Input: {"a": 1}', SEARCH),
        ('{"tool_calls": [{"Action": "search", "Action_Input": {"a": 1}}]}', SEARCH),
        ('```json\n{"tool_calls": [{"Thought": "so", "Action": "search", "Action_Input": "{\\"a\\": 1}"}]}\n```', SEARCH),
        ('{"Action": "search", "Action_Input": {"a": 1}}', SEARCH),
        ('So: search.</think>\nAction: search\nAction Input: {"a": 1}', SEARCH),
        ('{"Action": "search", "Action Input": {"a": 1}}', SEARCH),
        ('{"Action": "search", "Action_Input": {"a": 1}}\nThis finds it.', SEARCH),
        ('{"Action": "search", "Action_Input": {"a": 1}}\n{"Action": "book", "Action_Input": {}}', [*SEARCH, ("book", {})]),
        ('{"Action": "search", "Action Input": {"a": 1}}, {"Action": "book", "Action Input": {}}', [*SEARCH, ("book", {})]),
        (
            '```json\n{"Action": "search", "Action_Input": {"a": 1}}\n```\n```\n[{"Action": "book", "Action_Input": ""}]\n```',
            [*SEARCH, ("book", {})],
        ),
        # One JSON call that counts would hide what the rest does.
        ('{"Action": "search", "Action_Input": {"a": 1}}\nThen:\n{"Action": "book", "Action_Input": {}}', []),
        ('{"Action": "search", "Action_Input": {"a": 1}}\n{"Action": "book", "Action_Input": {}', []),
        ('{"Action": "search", "Action_Input": {"a": 1}}\nAction: book\nAction Input: {}', []),
        ("{\"Action\": \"search\", \"Action_Input\": {}}\n{'Action': 'book', 'Action_Input': {}}", []),
        ('{"Action": "search", "Action_Input": {"a": 1}}\n{"tool": "book"}', []),
        ('{"Action": "search", "arguments": {"a": 1}}', []),
        ('{"Action": "search", "Action_Input": {"a": 1}, "Action Input": {"a": 2}}', []),
        ('{"tool_calls": [{"Action": "search", "Action_Input": {"a": 1}}, {"Action_Input": {}}]}', []),
        ("Action: search\nAction Input: {}", [("search", {})]),
        ("Action: search\nAction Input:", [("search", {})]),
        ('{"tool_calls": [{"Action": "search", "Action_Input": null}]}', [("search", {})]),
        ("Action: search\nAction Input: {'a': 1}", [("search", None)]),
        ("Action: search\nAction Input: [1]", [("search", None)]),
        ("Action: search\nAction Input: rooms for two", [("search", None)]),
        ('Action: search\nAction Input:\nAction: book\nAction Input: {"a": 1}', [("search", {}), ("book", {"a": 1})]),
        (react(("search", {"a": 1}), ("book", {})), [("search", {"a": 1}), ("book", {})]),
        ("I would search for it.", []),
        ("Action: search", []),
        ('{"tool_calls": []}', []),
        ("", []),
    ],
)
def test_the_calls_of_a_completion_read_by_hand(completion: str, calls: list[tuple[str, object]]) -> None:
    assert [tuple(call) for call in read_calls(completion)] == calls


@pytest.mark.parametrize(
    ("gold", "given", "action", "arguments", "failure"),
    [
        # Values.
        ([("f", {"a": 1, "b": "x"})], [("f", {"a": 1, "b": "x"})], 1, 1, None),
        ([("f", {"a": 1, "b": "x"})], [("f", {"b": " x ", "a": 1.0})], 1, 1, None),
        ([("f", {"a": 1})], [("f", {"a": "1"})], 1, 1, None),
        ([("f", {"a": "1"})], [("f", {"a": 1})], 1, 1, None),
        ([("f", {"a": True})], [("f", {"a": "true"})], 1, 1, None),
        ([("f", {"a": "true"})], [("f", {"a": True})], 1, 1, None),
        ([("f", {"a": True})], [("f", {"a": "True"})], 1, 0, "wrong arguments"),
        ([("f", {"a": True})], [("f", {"a": 1})], 1, 0, "wrong arguments"),
        ([("f", {"a": "007"})], [("f", {"a": 7})], 1, 0, "wrong arguments"),
        ([("f", {"a": "1.10"})], [("f", {"a": "1.1"})], 1, 0, "wrong arguments"),
        ([("f", {"a": "5"})], [("f", {"a": "5 apples"})], 1, 0, "wrong arguments"),
        ([("f", {"a": 5})], [("f", {"a": "5 apples"})], 1, 0, "wrong arguments"),
        ([("f", {"a": "x"})], [("f", {"a": "X"})], 1, 0, "wrong arguments"),
        ([("f", {"a": ["x", 2]})], [("f", {"a": ["x", "2"]})], 1, 1, None),
        ([("f", {"a": ["x", "y"]})], [("f", {"a": ["y", "x"]})], 1, 0, "wrong arguments"),
        ([("f", {"a": {"b": [1], "c": "d"}})], [("f", {"a": {"c": "d", "b": [1]}})], 1, 1, None),
        ([("f", {"a": {"b": 1}})], [("f", {"a": {"b": 1, "c": 2}})], 1, 0, "wrong arguments"),
        ([("f", {"a": ["x"]})], [("f", {"a": "['x']"})], 1, 0, "wrong arguments"),
        # What is given too much, too little, or empty.
        ([("f", {"a": 1})], [("f", {"a": 1, "b": 2})], 1, 0.5, "wrong arguments"),
        ([("f", {"a": 1, "b": 2})], [("f", {"a": 1})], 1, 0.5, "wrong arguments"),
        ([("f", {"a": 1, "b": 2})], [("f", {"a": 1, "b": 3})], 1, 0.5, "wrong arguments"),
        ([("f", {"a": 1, "b": ""})], [("f", {"a": 1})], 1, 1, None),
        ([("f", {"a": 1})], [("f", {"a": 1, "b": "", "c": None})], 1, 1, None),
        ([("f", {"a": 0})], [("f", {})], 1, 0, "wrong arguments"),
        ([("f", {"a": False})], [("f", {})], 1, 0, "wrong arguments"),
        ([("f", {})], [("f", {})], 1, 1, None),
        ([("f", {})], [("f", {"a": 1})], 1, 0, "wrong arguments"),
        ([("f", {})], [("f", [])], 1, 0, "arguments not JSON"),
        # Calls.
        ([("f", {"a": 1})], [("g", {"a": 1})], 0, 1, "wrong tool"),
        ([("f", {"a": 1})], [("F", {"a": 1})], 0, 1, "wrong tool"),
        ([("f", {"a": 1}), ("g", {})], [("f", {"a": 1})], 0, 0, "missing call"),
        ([("f", {"a": 1})], [("f", {"a": 1}), ("f", {"a": 1})], 0, 0, "extra call"),
        ([("f", {"a": 1}), ("g", {})], [("g", {}), ("f", {"a": 1})], 0, 0, "wrong order"),
        ([("f", {"a": 1}), ("f", {"a": 2})], [("f", {"a": 1}), ("f", {"a": 3})], 1, 0.5, "wrong arguments"),
        ([("f", {"a": 1}), ("[Optional]g", {})], [("f", {"a": 1})], 1, 1, None),
        ([("f", {"a": 1}), ("[Optional]g", {})], [("f", {"a": 1}), ("g", {})], 1, 1, None),
        ([("f", {"a": 1})], [], 0, 0, "unparsable"),
    ],
)
def test_calls_are_worth_what_a_hand_says(
    gold: list[tuple[str, object]], given: list[tuple[str, object]], action: float, arguments: float, failure: str | None
) -> None:
    as_json = json.dumps({"tool_calls": [{"Action": tool, "Action_Input": value} for tool, value in given]})
    for completion in (react(*given), as_json):
        verdict = TASK.judge(record(*gold), completion)
        assert verdict.metrics == {"action": action, "arguments": arguments, "full": float(failure is None)}
        assert (verdict.correct, verdict.failure) == (failure is None, failure)


def test_a_second_call_on_a_line_of_its_own_counts() -> None:
    lines = [json.dumps({"Action": tool, "Action_Input": {}}) for tool in ("getX", "deleteAll")]
    found = [
        TASK.judge(record(*gold), "\n".join(lines)).failure for gold in ([("getX", {})], [("getX", {}), ("deleteAll", {})])
    ]
    assert found == ["extra call", None]


@pytest.mark.parametrize(
    ("gold", "given", "action", "arguments"),
    [
        ([("f", {"a": 1})], [("f", {"a": 1, "b": 2})], 1, 1),  # what is added is not penalised
        ([("f", {"a": True})], [("f", {"a": "true"})], 1, 0),  # 'True' against 'true'
        ([("f", {"a": True})], [("f", {"a": "True"})], 1, 1),
        ([("f", {"a": 1})], [("f", {"a": "1"})], 1, 1),
        ([("f", {"a": 1})], [("f", {"a": 1.0})], 1, 0),  # '1.0' against '1'
        ([("f", {"a": ["x"]})], [("f", {"a": "['x']"})], 1, 1),  # Python's way to write a list
        ([("f", {"a": "", "b": 1})], [("f", {"b": 1})], 1, 1),
        ([("f", {"a": ""})], [("f", {"b": 1})], 1, 1),
        ([("f", {})], [("f", {"a": 1})], 1, 0),
        ([("f", {})], [("f", {})], 1, 1),
        ([("f", {"a": 1, "b": 2})], [("f", {"a": 1})], 1, 0.5),
        ([("f", {"a": 1})], [("g", {"a": 1})], 0, 1),
        ([("f", {"a": 1}), ("g", {})], [("f", {"a": 1})], 0, 0),
        ([("f", {"a": 1})], [], 0, 0),
    ],
)
def test_the_released_metrics_by_hand(
    gold: list[tuple[str, object]], given: list[tuple[str, object]], action: float, arguments: float
) -> None:
    as_json = json.dumps({"tool_calls": [{"Action": tool, "Action_Input": value} for tool, value in given]})
    for completion in (react(*given), as_json):
        verdict = RELEASED.judge(record(*gold), completion)
        full = float(action == 1 and arguments == 1)
        assert verdict.metrics == {"action": action, "arguments": arguments, "full": full} and verdict.correct is bool(full)


def test_released_scoring_of_a_gold_answer_that_is_no_json_wants_no_arguments() -> None:
    broken = RELEASED.parse(ROW | {"golden_answer": [{"Action": "f", "Action_Input": '{"a": ${id}}'}]}, 0)
    assert RELEASED.judge(broken, "Action: f\nAction Input: {}").correct
    assert not RELEASED.judge(broken, 'Action: f\nAction Input: {"a": 1}').correct
    assert RELEASED.keep(broken, "train") and not TASK.keep(broken, "train")


def test_no_text_raises() -> None:
    rng = random.Random(0)
    pieces = ["Action", ":", " Input", "\n", "{", "}", '"a"', "[", "1", ",", "```", "tool_calls", "_", "é", " "]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(14))) for _ in range(3000)]
    for text in [
        *texts,
        "[" * 100_000,
        "Action: f\nAction Input: " + '{"a":' * 50_000,
        "Action:\n" * 500,
        "9" * 9000,
        "{}",
        "[]",
    ]:
        assert TASK.judge(record(("f", {})), text).correct in (True, False)
        assert RELEASED.judge(record(("f", {})), text).correct in (True, False)


def test_a_row_of_the_hub_becomes_a_record() -> None:
    found = TASK.parse(ROW, 4)
    assert (found.id, TASK.question(found), TASK.group(found)) == ("tooluse_4", PROMPT, "Hotels")
    assert TASK.topic(found) == "Two cheap rooms with a view"
    assert TASK.reference(found) == (
        'Thought: I search for rooms.\nAction: search\nAction Input: {"rooms": 2, "view": true, "name": ""}'
    )
    assert TASK.judge(found, TASK.reference(found)).correct
    assert RELEASED.reference(RELEASED.parse(ROW, 4)).startswith("I search for rooms.\nAction: search\n")


def test_gold_calls_are_read_from_the_response_where_there_is_no_other_answer() -> None:
    found = TASK.parse({name: value for name, value in ROW.items() if name != "golden_answer"}, 0)
    assert TASK.judge(found, TASK.reference(found)).correct and "search" in TASK.reference(found)
    as_text = TASK.parse(ROW | {"golden_answer": ['{"Action": "book", "Action_Input": {"id": 1}}'], "golden_response": [""]}, 0)
    assert TASK.reference(as_text) == 'Action: book\nAction Input: {"id": 1}'


def test_right_and_wrong_solutions_stand_in_one_form() -> None:
    found = TASK.parse(ROW, 0)
    right = TASK.reference(found)
    kinds = {each.kind: each for each in TASK.corruptions(found)}
    assert list(kinds) == ["wrong_action", "wrong_args", "wrong_interpretation", "extra_tool_calls"]
    for each in kinds.values():
        assert PROMPT in each.request and '{"rooms": 2, "view": true' in each.request and '{"reasoning": ' in each.request
    wrong = TASK.negative(found, kinds["wrong_action"], " Thought: I book. ", 'Action: book\nAction Input: {"rooms": 2}')
    assert wrong == 'Thought: I book.\nAction: book\nAction Input: {"rooms": 2}'
    assert TASK.judge(found, wrong).failure == "wrong tool"
    shown = TASK.teacher_prompt(found, right), TASK.teacher_prompt(found, wrong, negative=True)
    assert shown[0].replace(right, "SOLUTION") == shown[1].replace(wrong, "SOLUTION")
    for reasoning, answer in (("", react(*SEARCH)), ("I book.", "book it"), ("I book.", "Action: book\nAction Input: {'a'}")):
        assert TASK.negative(found, kinds["wrong_args"], reasoning, answer) is None
    silent = record(("search", {"a": 2}))  # its reference has no thought: neither has the wrong solution
    assert TASK.negative(silent, kinds["wrong_args"], "I search.", react(*SEARCH)) == react(*SEARCH)


def test_released_solutions_differ_in_form_as_the_authors_do() -> None:
    found = RELEASED.parse(ROW, 0)
    wrong = RELEASED.negative(found, RELEASED.corruptions(found)[0], "I book.", "Action: book\nAction Input: {}")
    assert wrong == "Thought: I book.\nAction: book\nAction Input: {}"
    right = RELEASED.teacher_prompt(found, RELEASED.reference(found))
    assert right.endswith(" Include your thought process (the 'Thought' field in your response).")
    assert RELEASED.teacher_prompt(found, wrong, negative=True).endswith(
        " Including your thought process (the 'Thought' field in your response)."
    )
    assert "I search for rooms. Action: search Action Input: {" in RELEASED.auxiliary_prompt(found, [found])


def test_donors_are_shown_without_the_documentation_of_their_tools() -> None:
    context = TASK.auxiliary_prompt(record(("book", {})), [TASK.parse(ROW, 1)])
    assert context.count("Use the tools: search") == 1 and TASK.reference(TASK.parse(ROW, 1)) in context
    assert context.endswith(PROMPT)


def test_a_slip_changes_the_calls_and_nothing_else() -> None:
    found = TASK.parse(ROW, 0)
    wrong = {TASK.corrupt(found, random.Random(seed)) for seed in range(60)}
    start = "Thought: I search for rooms.\nAction: "
    assert {text.removeprefix(start) for text in wrong if text is not None} == {
        'search\nAction Input: {"view": true, "name": ""}',
        'search\nAction Input: {"rooms": 2, "name": ""}',
        'search\nAction Input: {"rooms": 3, "view": true, "name": ""}',
        'book\nAction Input: {"rooms": 2, "view": true, "name": ""}',
        'cancel\nAction Input: {"rooms": 2, "view": true, "name": ""}',
    }
    bare = TASK.parse({"prompt": "Call f.", "instruction": "f", "golden_answer": [{"Action": "f", "Action_Input": "{}"}]}, 0)
    assert TASK.corrupt(bare, random.Random(0)) is None


def test_the_publishers_file_becomes_questions_that_can_be_answered(tmp_path: Path) -> None:
    first, last = TASK.load("test", written(tmp_path / "eval.json", [API]))
    question = TASK.question(first)
    assert "\n\nsearch: Finds rooms.\n\nbook: Books.\nParameters: " in question and "#Room" in question
    assert "one of [search, book]" in question and question.endswith("Request: Find a room.") and "secret" not in question
    assert TASK.reference(first) == 'Action: search\nAction Input: {"rooms": 1}'  # no credential
    assert TASK.judge(first, 'Action: search\nAction Input: {"rooms": 1, "key": "mine"}').correct
    assert TASK.judge(last, 'Action: book\nAction Input: {"id": "7"}').correct and TASK.group(last) == "Hotels"


def test_all_of_the_publishers_file_is_all_its_instructions(tmp_path: Path) -> None:
    assert len(TASK.load("all", written(tmp_path / "eval.json", [API]))) == 4


def test_the_released_evaluation_asks_for_json_and_the_training_does_not(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", [ROW])
    [tested], [trained] = RELEASED.load("test", path), RELEASED.load("train", path)
    assert '{"tool_calls": [' in RELEASED.question(tested) and "Thought:" not in RELEASED.question(tested)
    assert RELEASED.question(tested).endswith("Begin!\n\nQuestion: Two cheap rooms with a view")
    assert RELEASED.question(trained) == PROMPT == TASK.question(TASK.load("test", path)[0])


def test_training_on_the_publishers_evaluation_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval\.json: ToolAlpaca's evaluation files are not for training"):
        TASK.load("train", written(tmp_path / "eval.json", [API]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"prompt": " "}, "record 1: not a record of tooluse: prompt is ' '"),
        (ROW | {"instruction": None}, "instruction is None"),
        (ROW | {"golden_response": [1]}, "golden_response is [1]"),
        (ROW | {"golden_answer": [], "golden_response": ["so"]}, "golden_answer is empty, and golden_response holds no call"),
        (ROW | {"golden_answer": [{"Action_Input": "{}"}]}, "a call of golden_answer is {'Action_Input': '{}'}"),
        (ROW | {"golden_answer": ["search"]}, "not a record of tooluse: "),
        ({"prompt": "p"}, "field 'instruction' is missing"),
        (API | {"Golden_Answers": []}, "record 1: not an API of tooluse: "),
        (API | {"Function_Description": None}, "not an API of tooluse: "),
        (API | {"Golden_Answers": [[{}], [], [], []]}, "record 1, instruction 1: not a record of tooluse: "),
        ({"Golden_Answers": [], "Name": "x"}, "not an API of tooluse: field 'Function_Description' is missing"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(DataError, match=r"rows\.json, record 1") as caught:
        TASK.load("test", written(tmp_path / "rows.json", [row]))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("semantics", ["corrected", "released"])
@pytest.mark.parametrize(("part", "size"), [("simulated", 68), ("real", 104)])
def test_of_all_real_records_the_reference_is_right_and_the_wrong_solution_wrong(part: str, size: int, semantics: str) -> None:
    """68 of the 100 simulated instructions can be answered: as many as the hub's test split has."""
    task = RELEASED if semantics == "released" else TASK
    records = task.load("test", real(part))
    assert len({each.id for each in records}) == len(records) == size
    for each in records:
        wrong = task.corrupt(each, random.Random(each.id))
        assert task.judge(each, task.reference(each)).correct and task.reference(each) not in task.question(each), each.id
        assert wrong is not None and not task.judge(each, wrong).correct, each.id
        assert re.fullmatch(r"(Action: [\w-]+\nAction Input: \{.*\}(\n|$))+", wrong), each.id
