"""HumanEval: Python functions to be written from their signature and docstring, checked by tests that are not shown."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from unisd_megatron.data.code import defines, extract_code, fenced, parse_code, released_code, unix
from unisd_megatron.data.task import Program, Record, Task, Verdict

NOTES = """## Note
1. Write the complete function, with its signature and its docstring.
2. Write the imports that it needs.
3. Put all of it in one Python code block.
4. Write no explanation.
5. Leave the name and the arguments as they are."""
_TEXTS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


class HumanEval(Task):
    """`openai/openai_humaneval`, or a file of its rows; for evaluation only."""

    name = "humaneval"
    hub_id = "openai/openai_humaneval"
    splits = {"test": "test"}

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        fields = {name: row[name] for name in _TEXTS}
        for name, text in fields.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name} is {text!r}; expected a text")
        fields = {name: unix(text) for name, text in fields.items()}
        for name, code in (
            ("prompt and canonical_solution", fields["prompt"] + fields["canonical_solution"]),
            ("test", fields["test"]),
        ):
            try:
                parse_code(code)
            except SyntaxError as error:
                raise ValueError(f"{name}: not Python: {error.msg} (line {error.lineno})") from error
        if _entry(fields) is None:
            raise ValueError(f"prompt does not define its entry_point {fields['entry_point']!r}")
        if "def check(" not in fields["test"]:
            raise ValueError("test does not define `check`")
        return Record(fields["task_id"], fields)

    def question(self, record: Record) -> str:
        return f"{record.fields['prompt'].strip()}\n\n{NOTES}"

    def topic(self, record: Record) -> str:
        return record.fields["prompt"].strip()

    def reference(self, record: Record) -> str:
        return fenced(f"{record.fields['prompt']}{record.fields['canonical_solution']}".strip("\n"))

    def judge(self, record: Record, completion: str) -> Verdict | Program:
        """The answer behind what the prompt defines before the function; an answer without the function is its body."""
        fields = record.fields
        code = released_code(completion) if self.released else extract_code(completion, fields["entry_point"])
        if not code.strip():
            return Verdict(False, "no answer")
        if self.released:
            return Program(code, _with_check(fields))
        if not defines(code, fields["entry_point"]):
            return Program(fields["prompt"] + _indented(code), _tests(fields))
        if re.search(r"^from __future__ ", code, re.MULTILINE):  # which may stand behind nothing else
            return Program(code, _tests(fields))
        return Program(_preamble(fields) + code, _tests(fields))


def _entry(fields: Mapping[str, str]) -> ast.FunctionDef | None:
    tree = parse_code(fields["prompt"] + fields["canonical_solution"])
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return next((one for one in functions if one.name == fields["entry_point"]), None)


def _preamble(fields: Mapping[str, str]) -> str:
    """Imports and helpers that the prompt gives before the function; the answer may repeat them or count on them."""
    entry = _entry(fields)
    assert entry is not None  # `parse` has seen to it
    return "".join(fields["prompt"].splitlines(keepends=True)[: entry.lineno - 1])


def _tests(fields: Mapping[str, str]) -> str:
    """The tests behind the prompt's helpers: a test that uses `poly` means the given one, not the answer's."""
    return _preamble(fields) + _with_check(fields)


def _with_check(fields: Mapping[str, str]) -> str:
    called = re.search(r"^check\(", fields["test"], re.MULTILINE)
    return fields["test"] if called else f"{fields['test']}\n\ncheck({fields['entry_point']})\n"


def _indented(body: str) -> str:
    """A function's body as it stands behind its `def`: as it is, or moved to the right where it was written alone."""
    first = next(line for line in body.splitlines() if line.strip())
    return body if first[0] in " \t" else textwrap.indent(body, "    ")
