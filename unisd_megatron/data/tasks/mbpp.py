"""MBPP: short Python functions, asked for in a sentence and checked by assertions that the prompt shows.

Nothing here runs code of a data set or of a model; references and wrong solutions are handled as text and syntax trees.
Two faults of the released code are there under `--semantics released` alone: it renames the first `def` of a reference to the
tested name, which breaks the 13 references that begin with a helper, and it states that helper's signature as the required one.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unisd_megatron.data.bugs import small_bugs
from unisd_megatron.data.code import defines, extract_code, fenced, meaning, parse_code, released_code, tidy, unix
from unisd_megatron.data.task import Corruption, Program, Record, Task, Verdict

SPLITS = {"train": range(601, 975), "test": range(11, 511)}  # task ids, of the full and of the sanitized configuration
NOTES = """## Note
- Write the function, with the imports and helpers that it needs, in one Python code block, and nothing else.
- Give the function the name that the test cases call."""
BUG_KINDS = ("off-by-one error", "wrong operator", "missing edge case", "wrong return value")  # as in the authors' code
BUG_REQUEST = """You play a programmer who is sure of the solution but has made one mistake: {kind}.

## Task
{text}

## Test Cases
{tests}

## Rules
- Write all of the code that the function `{name}` needs. It runs, but at least one test case fails because of the mistake.
- The mistake is easy to overlook; no comment or name hints at it.
- Reply in JSON: {{"reasoning": "why the code should work, as the programmer sees it", "answer": "the code"}}."""


class Mbpp(Task):
    """`google-research-datasets/mbpp` (full), or a file of all its rows; the sanitized schema is read too."""

    name = "mbpp"
    hub_id = "google-research-datasets/mbpp"
    hub_config = "full"

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        task_id, text, code = row["task_id"], row["prompt"] if "prompt" in row else row["text"], row["code"]
        tests, imports, setup = row["test_list"], row.get("test_imports") or [], row.get("test_setup_code") or ""
        if type(task_id) is not int:  # `true` is an int to isinstance
            raise ValueError(f"task_id is {task_id!r}; expected a whole number")
        for name, value in (("the task's text", text), ("code", code)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} is {value!r}; expected a text")
        for name, lines in (("test_list", tests), ("test_imports", imports), ("test_setup_code", [setup])):
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                raise ValueError(f"{name} is {lines!r}; expected lines of code")
        if not tests:
            raise ValueError("test_list is empty")
        for name, source in (("code", code), ("test_list", "\n".join(tests))):
            try:
                parse_code(source)
            except SyntaxError as error:
                raise ValueError(f"{name} is not Python: {error.msg} (its line {error.lineno})") from error
        before = unix("\n".join([*imports, setup])).strip()
        return Record(f"mbpp_{task_id}", {"task_id": task_id, "text": text, "code": code, "tests": tests, "setup": before})

    def keep(self, record: Record, split: str) -> bool:
        """By task id: the one file that MBPP is published as holds all splits."""
        return record.fields["task_id"] in SPLITS[split]

    def question(self, record: Record) -> str:
        tests = _shown_tests(record)
        parts = [record.fields["text"].strip()]
        signature = self._signature(record)
        if signature is not None:
            parts.append(f"The required function signature is: {signature}")
            skeleton = f"def {signature}:\n    ..."
        else:
            skeleton = "# your code"
        return "\n\n".join([*parts, NOTES, f"## Answer Format\n{fenced(skeleton)}", f"## Test Cases\n{tests}"])

    def _signature(self, record: Record) -> str | None:
        function = _first_function(record) if self.released else _tested_function(record)
        if function is None:
            return None
        arguments = ", ".join(one.arg for one in function.args.args) if self.released else ast.unparse(function.args)
        return f"{function.name}({arguments})"

    def topic(self, record: Record) -> str:
        return self.question(record) if self.released else record.fields["text"].strip()

    def reference(self, record: Record) -> str:
        return _renamed(record) if self.released else fenced(tidy(record.fields["code"]))

    def corrupt(self, record: Record, rng: random.Random) -> str | None:
        """The reference with one small bug in the tested function; None when nothing in it offers one.

        An edit of the text, not of the tree, so that comments and layout stay and only the bug tells the two apart.
        """
        code = tidy(record.fields["code"])
        function = _tested_function(record, code)
        bugs = sorted(set(small_bugs(function, code))) if function is not None else []
        rng.shuffle(bugs)
        for start, end, replacement in bugs:
            wrong = code[:start] + replacement + code[end:]
            if meaning(wrong) not in (None, meaning(code)):  # an edit may have hit a comment
                return wrong if self.released else fenced(wrong)
        return None

    def corruptions(self, record: Record) -> Sequence[Corruption]:
        shown = {"text": record.fields["text"].strip(), "tests": _shown_tests(record), "name": _tested_name(record)}
        return [Corruption(kind, BUG_REQUEST.format(kind=kind, **shown)) for kind in BUG_KINDS]

    def negative(self, record: Record, corruption: Corruption, reasoning: str, answer: str) -> str | None:
        """The code alone, as the reference is; None for what is no solution of this task, or is the reference."""
        name = _tested_name(record)
        code = unix(extract_code(answer, name)).strip("\n")
        if not defines(code, name) or code == tidy(record.fields["code"]):
            return None
        return code if self.released else fenced(code)

    def judge(self, record: Record, completion: str) -> Verdict | Program:
        code = released_code(completion) if self.released else extract_code(completion, _tested_name(record))
        if not code.strip():
            return Verdict(False, "no answer")
        return Program(code, _shown_tests(record))


class MbppSanitized(Mbpp):
    """The part of MBPP that was checked by hand, with its texts and tests reworded: 120 train and 257 test problems."""

    name = "mbpp_sanitized"
    hub_config = "sanitized"

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        if "prompt" not in row and "text" in row:
            raise ValueError("a row of the full configuration; use --dataset mbpp, or the file of the sanitized one")
        return super().parse(row, index)


def _shown_tests(record: Record) -> str:
    """What the tests need beforehand, then the tests."""
    return "\n".join([record.fields["setup"], *record.fields["tests"]]).strip()


def _tested_name(record: Record) -> str:
    """The name of the reference's that the tests call, whatever defines it; the first they call where none is certain."""
    function = _tested_function(record)
    if function is not None:
        return function.name
    called = _called(record)
    return next((name for name in called if defines(record.fields["code"], name)), called[0] if called else "")


def _called(record: Record) -> list[str]:
    """The names that the tests call, outer calls before the calls in their arguments."""
    tests = parse_code("\n".join(record.fields["tests"]))
    calls = [node for test in tests.body for node in ast.walk(test) if isinstance(node, ast.Call)]
    return [call.func.id for call in calls if isinstance(call.func, ast.Name)]


def _tested_function(record: Record, code: str | None = None) -> ast.FunctionDef | None:
    """The definition that the tests call; None when they call something else, such as a class or a lambda with a name."""
    tree = parse_code(record.fields["code"] if code is None else code)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}  # the last one of a name counts
    return next((functions[name] for name in _called(record) if name in functions), None)


# What the released code does instead.


def _first_function(record: Record) -> ast.FunctionDef | None:
    """The first definition of a function, which may be a helper."""
    return next((node for node in parse_code(record.fields["code"]).body if isinstance(node, ast.FunctionDef)), None)


def _renamed(record: Record) -> str:
    """The reference with its first `def`, at whatever depth, named as the first test calls it."""
    code = unix(record.fields["code"])
    called = re.match(r"\s*assert\s+(\w+)\s*\(", record.fields["tests"][0])
    return code if called is None else re.sub(r"\bdef\s+\w+", f"def {called[1]}", code, count=1)
