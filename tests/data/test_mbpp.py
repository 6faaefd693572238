"""MBPP: the right signature, references left working, and bugs that are small, in the right place, and never run."""

import ast
import os
import random
import re
import warnings
from pathlib import Path

import pytest

from unisd_megatron.data.task import Program, Record, Verdict
from unisd_megatron.data.tasks.mbpp import BUG_KINDS, Mbpp, MbppSanitized
from unisd_megatron.errors import DataError

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
TASK = Mbpp()
RELEASED = Mbpp("released")
ROW = {
    "task_id": 601,
    "text": "Write a function to double a number.",
    "code": "def helper(x):\r\n\treturn x + 1\r\ndef double(n, times = 2): \r\n\tif n:\r\n\t\treturn n * times\r\n",
    "test_list": ["assert double(helper(1)) == 4"],
    "test_setup_code": "",
}


def parsed(**changes: object) -> Record:
    return TASK.parse(ROW | changes, 0)


def function(*body: str) -> Record:
    """A record whose tested function `f(a, b)` has this body."""
    return parsed(code="\n    ".join(["def f(a, b):", *body]), test_list=["assert f(1, 2)"])


def code_of(solution: str) -> str:
    assert solution.startswith("```python\n") and solution.endswith("\n```")
    return solution.removeprefix("```python\n").removesuffix("\n```")


def meaning(code: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\d" in plain strings
        return ast.dump(ast.parse(code))


def real(split: str) -> list[Record]:
    path = DATA / "mbpp.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set UNISD_DATA to the folder of the real benchmark files")
    return TASK.load(split, str(path))


def test_the_question_states_the_tested_function_and_not_the_helper_before_it() -> None:
    question = TASK.question(parsed())
    assert question.startswith(
        "Write a function to double a number.\n\nThe required function signature is: double(n, times=2)\n"
    )
    assert "def double(n, times=2):" in question and "def helper" not in question
    assert question.endswith("## Test Cases\nassert double(helper(1)) == 4")


@pytest.mark.parametrize(
    "code", ["double = lambda n: 2 * n", "class double(int): pass", "from operator import add as double", "double = {}.get"]
)
def test_a_tested_name_without_a_definition_costs_only_the_signature(code: str) -> None:
    record = parsed(code=code, test_list=["assert double(2) == 4"])
    question = TASK.question(record)
    assert "signature" not in question and "assert double(2) == 4" in question and "```python\n" in question
    assert code_of(TASK.reference(record)) == code
    assert TASK.corrupt(record, random.Random(0)) is None


def test_the_sanitized_schema_gives_the_same_question() -> None:
    sanitized = {key: value for key, value in ROW.items() if key not in ("text", "test_setup_code")}
    record = TASK.parse(sanitized | {"prompt": ROW["text"], "test_imports": []}, 0)
    assert TASK.question(record) == TASK.question(parsed())
    record = TASK.parse(sanitized | {"prompt": ROW["text"], "test_imports": ["import math"]}, 0)
    assert TASK.question(record).endswith("## Test Cases\nimport math\nassert double(helper(1)) == 4")


def test_what_the_tests_need_beforehand_is_shown() -> None:
    question = TASK.question(parsed(test_setup_code="root = 1 \r\nleaf = 2"))
    assert question.endswith("## Test Cases\nroot = 1 \nleaf = 2\nassert double(helper(1)) == 4")


def test_the_reference_is_laid_out_neatly() -> None:
    assert code_of(TASK.reference(parsed())) == (
        "def helper(x):\n    return x + 1\ndef double(n, times = 2):\n    if n:\n        return n * times"
    )


@pytest.mark.parametrize(
    "code",
    [
        "def double(n):\n\ttext = '''\n\tindented'''\n\treturn text",  # a tab that is part of a string
        "def double(n):\n        if n:\n\treturn n",  # a tab as wide as eight spaces, whose neighbour is not
        "def double(n):\r\n    return 'a' \\\r\n        'b'",
        "def double(n):\n  if n:\n\treturn n\n  return 0",
    ],
)
def test_tidying_never_changes_the_program(code: str) -> None:
    try:
        expected = meaning(code)
    except SyntaxError:  # then it must be refused, not repaired
        with pytest.raises(ValueError, match="code is not Python"):
            parsed(code=code)
        return
    reference = code_of(TASK.reference(parsed(code=code, test_list=["assert double(1)"])))
    assert meaning(reference) == expected and "\r" not in reference


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"code": "def f(:"}, "code is not Python"),
        ({"code": None}, "code is None"),
        ({"text": " "}, "the task's text is ' '"),
        ({"task_id": "601"}, "task_id is '601'"),
        ({"test_list": []}, "test_list is empty"),
        ({"test_list": "assert f(1)"}, "test_list is 'assert f\\(1\\)'"),
        ({"test_list": ["assert f(1"]}, "test_list is not Python"),
        ({"test_setup_code": 3}, "test_setup_code is \\[3\\]"),
    ],
)
def test_a_row_of_another_schema_is_refused_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(**changes)


def test_a_file_is_split_by_task_id() -> None:
    ids = {split: {record.fields["task_id"] for record in real(split)} for split in ("train", "test")}
    assert ids == {"train": set(range(601, 975)), "test": set(range(11, 511))}
    with pytest.raises(DataError, match="no split 'dev'; use train or test"):
        real("dev")


BUGS = [
    (["return a < b"], {"return a > b"}),
    (["return a <= b != 3.5"], {"return a >= b != 3.5", "return a <= b == 3.5"}),
    (["return a  not  in b"], set()),  # an unusual spelling is left alone
    (["return a not in b"], {"return a in b"}),
    (["return a in b"], {"return a not in b"}),
    (["return a and b"], {"return a or b"}),
    (["return (a) + (b)"], {"return (a) - (b)"}),
    (["return a + 'x'"], set()),  # a text cannot be subtracted: that bug would be none of meaning but of type
    (["return True"], {"return False"}),
    (["return 3"], {"return 4", "return 2"}),
    (["return 0"], {"return 1"}),
    (["return f'{a + 1}'"], set()),  # positions inside f-strings differ between Python versions
    (["return {'ä': a}['ä'] + b"], {"return {'ä': a}['ä'] - b"}),  # columns are counted in bytes
    (["return (a  # not a < b", "    < b)"], set()),  # the operator in the comment is not the operator
    (["'''Returns 3 < 4.'''", "return a"], set()),
    (["for x in range(a):", "    yield x"], {"for x in range(a + 1):", "for x in range(a - 1):"}),
    (["a += b", "return a"], {"a -= b"}),
    (["if a:", "    return b"], {"if not a:"}),
    (["if not a:", "    return b"], {"if a:"}),
    (["return max(a)"], {"return min(a)"}),
    (["return a.upper()"], {"return a.lower()"}),
    (["return a[b]"], {"return a[b - 1]"}),
    (["if a == b: return 'Yes'", "return 'No'"], {"if a != b: return 'Yes'", "if a == b: return 'No'", "return 'Yes'"}),
    (["return a.replace('x', '')"], {"return a.replace('', 'x')"}),
    (["return re.findall('x+', a)"], {"return re.findall('x?', a)"}),
]


@pytest.mark.parametrize(("body", "bugs"), BUGS, ids=[" ".join(body) for body, _ in BUGS])
def test_a_bug_is_one_small_edit_of_the_meaning(body: list[str], bugs: set[str]) -> None:
    record = function(*body)
    right = code_of(TASK.reference(record)).split("\n")
    changed = set()
    for seed in range(40):
        wrong = TASK.corrupt(record, random.Random(seed))
        if wrong is None:
            assert not bugs
            continue
        differing = [line.strip() for line, before in zip(code_of(wrong).split("\n"), right, strict=True) if line != before]
        assert len(differing) == 1
        changed.update(differing)
    assert changed == bugs


def test_the_bug_is_in_the_tested_function() -> None:
    right = code_of(TASK.reference(parsed()))
    for seed in range(20):
        wrong = code_of(TASK.corrupt(parsed(), random.Random(seed)) or "")
        assert wrong != right and wrong.startswith("def helper(x):\n    return x + 1\ndef double(n, times = 2):\n")


def test_nothing_is_executed(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    record = parsed(code=f"open({str(trap)!r}, 'w')\ndef double(n):\n    return n * 2\ndouble(3)")
    TASK.question(record), TASK.reference(record), TASK.corrupt(record, random.Random(0))
    TASK.judge(record, TASK.reference(record))
    assert not trap.exists()


def test_regular_expressions_of_the_data_cause_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = parsed(code="import re\ndef double(n):\n    return re.findall('\\d+', n)[0]")
        assert "double(n)" in TASK.question(record) and TASK.corrupt(record, random.Random(0)) is not None


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_real_reference_is_broken_and_every_signature_is_the_tested_one(split: str) -> None:
    """The released code renames the first function of 13 train references and asks for a helper in 12 prompts."""
    for record in real(split):
        reference = code_of(TASK.reference(record))
        assert meaning(reference) == meaning(record.fields["code"]), record.id
        assert "\r" not in reference
        signature = TASK.question(record).partition("signature is: ")[2]
        assert re.search(rf"\b{signature.partition('(')[0]}\s*\(", record.fields["tests"][0]), record.id


@pytest.mark.parametrize(("task_id", "name"), [(630, "get_coordinates"), (645, "find_k_product"), (949, "sort_list")])
def test_a_real_reference_that_begins_with_a_helper_is_asked_for_by_its_own_name(task_id: int, name: str) -> None:
    (record,) = [each for each in real("train") if each.fields["task_id"] == task_id]
    assert f"signature is: {name}(" in TASK.question(record)


def test_most_real_records_offer_a_bug() -> None:
    records = real("train")
    pairs = [(TASK.reference(each), TASK.corrupt(each, random.Random(f"0:{each.id}"))) for each in records]
    wrong = [(right, other) for right, other in pairs if other is not None]
    for right, other in wrong:
        assert meaning(code_of(other)) != meaning(code_of(right))
    assert len(wrong) >= 0.9 * len(records), f"only {len(wrong)} of {len(records)} references can be corrupted"


# Answers.

F = "def f(x):\n    return x\n"
ANSWERS = {
    "a block": (f"Here:\n```python\n{F}```\nDone.", F),
    "no block": (F, F),
    "a block that the end cuts short": (f"```python\n{F}", F),
    "a block without a language": (f"```\n{F}```", F),
    "an example before the solution": (f"```python\nprint(f(1))\n```\n```python\n{F}```", F),
    "a shell block first": (f"```bash\npip install x\n```\n```py\n{F}```", F),
    "an indented block": (f"1. So:\n  ```python\n{F}  ```", F),
    "JSON": ('{"code": "def f(x):\\n    return x\\n"}', F),
    "JSON with a block in it": ('{"code": "```python\\ndef f(x):\\n    return x\\n```"}', F),
    "thoughts with a block": (f"<think>```python\ndef f(x): return 0\n```</think>```python\n{F}```", F),
    "a thought that the chat template opened": (f"Try:\n```python\ndef f(x): return 0\n```\n</think>\n```python\n{F}```", F),
    "a thought without end": (f"<think>\n```python\n{F}```", ""),
    "a fence behind the last line": ("```python\ndef f(x):\n    return x```\nDone.", F),
    "backticks in a docstring": (
        '```python\ndef f(x):\n    """See ```f```"""\n    return x\n```',
        'def f(x):\n    """See ```f```"""\n    return x\n',
    ),
    "a block inside a list item": ("1. So:\n\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done.", F),
    "a block that begins a list item": ("- ```python\n  def f(x):\n      return x\n  ```", F),
    "tildes": (f"~~~python\n{F}~~~\nDone.", F),
    "four backticks": (f"````python\n{F}````", F),
    "JSON in a block": ('```json\n{"code": "def f(x):\\n    return x\\n"}\n```', F),
    "sentences around": (f"Here is `f(x)`:\n\n{F}\n**It returns x, as asked.**\nIs it right? Yes!", F.rstrip("\n")),
    "a docstring of sentences": ('"""\nReturns x.\n"""\ndef f(x): return x', '"""\nReturns x.\n"""\ndef f(x): return x'),
    "no program at all": ("I cannot do this.", ""),
    "helpers in blocks before": (
        "```python\nimport math as m\n```\n```python\ndef g(x):\n    return m.floor(x)\n```\n"
        "```python\ndef f(x):\n    return g(x)\n```",
        "import math as m\n\n\ndef g(x):\n    return m.floor(x)\n\n\ndef f(x):\n    return g(x)\n",
    ),
    "a helper that is given again": (
        "```python\ndef g(x): return 0\n```\n```python\ndef g(x): return x\ndef f(x): return g(x)\n```",
        "def g(x): return x\ndef f(x): return g(x)\n",
    ),
    "a block before that nobody uses": (f"```python\ndef g(x:\n```\n```python\n{F}```", F),
    "a block before that does something": (
        "```python\ndef g(x): return x\nprint(g(input()))\n```\n```python\ndef f(x): return g(x)\n```",
        "def f(x): return g(x)\n",
    ),
    "an assigned name": ("```python\nhelp = 1\n```\n```python\nf = lambda x: x\n```", "f = lambda x: x\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_code_of_an_answer_is_found(name: str) -> None:
    completion, code = ANSWERS[name]
    judged = TASK.judge(parsed(code=F, test_list=["assert f(1) == 1"]), completion)
    if code:
        assert isinstance(judged, Program) and judged.code == code and judged.tests == "assert f(1) == 1"
    else:
        assert judged == Verdict(False, "no answer")


def test_the_program_is_tested_with_what_the_tests_need() -> None:
    judged = TASK.judge(parsed(test_setup_code="root = 1", test_imports=["import math"]), "x")
    assert isinstance(judged, Program) and judged.tests == "import math\nroot = 1\nassert double(helper(1)) == 4"


def test_the_released_cascade_takes_the_first_python_block() -> None:
    completion = f"```python\nprint(f(1))\n```\n```python\n{F}```"
    judged = RELEASED.judge(parsed(code=F, test_list=["assert f(1) == 1"]), completion)
    assert isinstance(judged, Program) and judged.code == "print(f(1))\n"


# The released faults.


def test_released_renames_the_first_def_of_exactly_the_references_that_are_known_to_break() -> None:
    changed = {one.fields["task_id"] for one in real("train") if RELEASED.reference(one) != plain(one)}
    assert changed == {601, 630, 645, 671, 702, 735, 797, 896, 905, 912, 926, 949, 962}
    assert sum(RELEASED.reference(one) != plain(one) for one in real("test")) == 20


def plain(record: Record) -> str:
    return str(record.fields["code"]).replace("\r\n", "\n").replace("\r", "\n")


def test_released_asks_for_the_first_function_by_its_positional_arguments() -> None:
    assert "signature is: helper(x)\n" in RELEASED.question(parsed())
    wrong = [one for one in real("train") if RELEASED.question(one).split("(")[0] != TASK.question(one).split("(")[0]]
    assert len(wrong) == 12


# Wrong solutions that a model writes.


def test_a_model_is_asked_for_each_kind_of_bug() -> None:
    corruptions = TASK.corruptions(parsed(test_setup_code="root = 1"))
    assert tuple(one.kind for one in corruptions) == BUG_KINDS
    for one in corruptions:
        for shown in (
            one.kind,
            "Write a function to double a number.",
            "`double`",
            "root = 1",
            "assert double(helper(1)) == 4",
        ):
            assert shown in one.request
        assert TASK.reference(parsed()) not in one.request and '{"reasoning":' in one.request


@pytest.mark.parametrize("answer", ["def double(n):\n    return n", "```python\ndef double(n):\n    return n\n```"])
def test_a_wrong_solution_has_the_form_of_the_reference(answer: str) -> None:
    corruption = TASK.corruptions(parsed())[0]
    assert TASK.negative(parsed(), corruption, "It doubles.", answer) == "```python\ndef double(n):\n    return n\n```"


@pytest.mark.parametrize("answer", ["", "I cannot.", "def triple(n):\n    return n", "import os", "REFERENCE"])
def test_what_is_no_wrong_solution_of_the_task_is_refused(answer: str) -> None:
    answer = TASK.reference(parsed()) if answer == "REFERENCE" else answer
    assert TASK.negative(parsed(), TASK.corruptions(parsed())[0], "", answer) is None


# The configurations.


def test_the_sanitized_configuration_is_not_the_full_one() -> None:
    with pytest.raises(ValueError, match="a row of the full configuration; use --dataset mbpp"):
        MbppSanitized().parse(ROW, 0)
    row = {key: value for key, value in ROW.items() if key not in ("text", "test_setup_code")} | {
        "prompt": "Double.",
        "test_imports": [],
    }
    record = MbppSanitized().parse(row, 0)
    assert MbppSanitized().keep(record, "train") and not MbppSanitized().keep(record, "test")
    assert (Mbpp.hub_config, MbppSanitized.hub_config) == ("full", "sanitized")


def test_all_rows_of_a_file_can_be_had() -> None:
    real("train")  # skips where there is no file
    assert len(TASK.load("all", str(DATA / "mbpp.jsonl"))) == 974
