"""Verdicts: texts by their task, programs by being run, in the order of the answers."""

import json

import pytest

from sandboxes import sandbox_or_skip
from unisd_megatron.data.task import Verdict
from unisd_megatron.data.tasks.addition import Addition
from unisd_megatron.data.tasks.mbpp import Mbpp
from unisd_megatron.evaluate.judging import judging_identity, verdicts
from unisd_megatron.evaluate.sandbox import Limits, Sandbox

ROW = {
    "task_id": 11,
    "text": "Square.",
    "code": "def f(x):\n    return x * x",
    "test_list": ["assert f(2) == 4", "assert f(3) == 9"],
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip()


def test_texts_are_judged_without_a_sandbox() -> None:
    task = Addition()
    record = task.parse({"a": 1, "b": 2}, 0)
    told: list[int] = []
    found = verdicts(task, [(record, task.reference(record)), (record, "#0004"), (record, "")], progress=told.append)
    assert found == [Verdict(True), Verdict(False, "wrong answer"), Verdict(False, "no answer")] and told == [3]


def test_how_answers_are_judged_has_an_identity_that_json_keeps() -> None:
    identity = judging_identity(unsafe=False)
    assert json.loads(json.dumps(identity)) == identity != judging_identity(unsafe=True)
    assert identity["limits"] == {name: getattr(Limits(), name) for name in Limits.__slots__}  # those that `verdicts` runs with


def test_programs_are_run_and_fail_by_their_kind(sandbox: Sandbox) -> None:
    task = Mbpp()
    record = task.parse(ROW, 0)
    answers = [task.reference(record), "", "def f(x): return x", "def f(", "import os; os._exit(0)", "def f(x): return x ** 2"]
    told: list[int] = []
    found = verdicts(task, [(record, answer) for answer in answers], sandbox, told.append, workers=2)
    assert [one.failure for one in found] == [None, "no answer", "failed assertion", "syntax error", "exited early", None]
    assert [one.correct for one in found] == [True, False, False, False, False, True]
    assert told == [1, 2, 3, 4, 5, 6]
    assert verdicts(task, [(record, answers[0])])[0].correct  # with a sandbox of its own making
