"""HumanEval: for evaluation only; answers that are the function or its body, tested with the helpers that were given."""

import os
from pathlib import Path

import pytest

from unisd_megatron.data.task import Program, Record, Verdict
from unisd_megatron.data.tasks.humaneval import HumanEval
from unisd_megatron.errors import DataError

DATA = Path(os.environ.get("UNISD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
TASK = HumanEval()
ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef f(x):\n    """ Returns x, halved.\n    """\n',
    "entry_point": "f",
    "canonical_solution": "    return half(x)\n",
    "test": "def check(candidate):\n    assert candidate(2) == half(2)\n",
}


def parsed(**changes: object) -> Record:
    return TASK.parse(ROW | changes, 0)


def program(completion: str, semantics: str = "corrected") -> Program:
    judged = HumanEval("released" if semantics == "released" else "corrected").judge(parsed(), completion)
    assert isinstance(judged, Program)
    return judged


def test_the_question_is_the_stub_and_the_reference_its_completion() -> None:
    assert TASK.question(parsed()).startswith(f"{ROW['prompt'].strip()}\n\n## Note\n")
    assert TASK.reference(parsed()) == f"```python\n{ROW['prompt']}{ROW['canonical_solution'].rstrip()}\n```"
    assert ROW["canonical_solution"].strip() not in TASK.question(parsed())


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (
            "```python\ndef f(x):\n    return half(x)\n```",
            "def half(x):\n    return x / 2\n\n\ndef f(x):\n    return half(x)\n",
        ),
        ("    return half(x)\n", 'halved.\n    """\n    return half(x)\n'),
        ("```python\nreturn half(x)\n```", 'halved.\n    """\n    return half(x)\n'),
        ("```python\n    y = half(x)\n    if y:\n        return y\n```", '"""\n    y = half(x)\n    if y:\n        return y\n'),
        ("It is half of x.</think>\n    return half(x)\n", '"""\n\n    return half(x)\n'),
        ("\n    y = half(x)\n\n    return y", 'halved.\n    """\n\n    y = half(x)\n\n    return y'),
    ],
)
def test_an_answer_is_the_function_or_its_body_behind_what_was_given(completion: str, expected: str) -> None:
    code = program(completion).code
    assert code.startswith("import math\n") and code.endswith(expected)
    compile(code, "answer", "exec")
    assert code.count("def f(") == 1


def test_an_import_from_the_future_stays_first() -> None:
    code = "from __future__ import annotations\ndef f(x): return x / 2"
    assert program(code).code == code


def test_the_tests_use_the_given_helpers_and_not_the_answers() -> None:
    tests = program("def half(x): return 0\ndef f(x): return 0").tests
    assert tests.startswith("import math\n\n\ndef half(x):\n    return x / 2\n") and tests.endswith("\n\ncheck(f)\n")
    assert "def f(" not in tests


def test_released_runs_the_code_alone() -> None:
    released = program("```python\ndef f(x): return x\n```", "released")
    assert released.code == "def f(x): return x\n" and "def half" not in released.tests


def test_no_answer_is_wrong() -> None:
    assert TASK.judge(parsed(), "```python\n\n```") == Verdict(False, "no answer")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ""}, "prompt is ''"),
        ({"test": None}, "test is None"),
        ({"test": "def test(): pass"}, "does not define `check`"),
        ({"entry_point": "g"}, "does not define its entry_point 'g'"),
        ({"canonical_solution": "  return ("}, "not Python"),
    ],
)
def test_a_row_of_another_schema_is_refused_with_a_reason(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(**changes)


def test_training_on_it_is_refused() -> None:
    with pytest.raises(DataError, match="humaneval has no split 'train'; it is for evaluation only"):
        TASK.load("train", None)


def test_every_real_record_is_read() -> None:
    path = DATA / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set UNISD_DATA to the folder of the real benchmark files")
    records = TASK.load("test", str(path))
    assert len(records) == 164
    for record in records:
        whole = TASK.judge(record, TASK.reference(record))
        body = TASK.judge(record, record.fields["canonical_solution"])
        assert isinstance(whole, Program) and isinstance(body, Program)
        assert whole.tests == body.tests and body.code == record.fields["prompt"] + record.fields["canonical_solution"]
