"""MBPP: short Python functions, asked for in a sentence and checked by assertions that the prompt shows.

Nothing here runs code of a data set or of a model; references and wrong solutions are handled as text and syntax trees.
Two faults of the released code are not repeated: it renames the first `def` of a reference to the tested name, which
breaks the 13 references that begin with a helper, and it states that helper's signature as the required one.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, chain, pairwise
from typing import Any

from unisd_megatron.data.task import Record, Task
from unisd_megatron.errors import DataError, RequestError

SPLITS = {"train": range(601, 975), "test": range(11, 511)}  # task ids, of the full and of the sanitized configuration
NOTES = """## Note
- Write the function, with the imports and helpers that it needs, in one Python code block, and nothing else.
- Give the function the name that the test cases call."""


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
                _parse(source)
            except SyntaxError as error:
                raise ValueError(f"{name} is not Python: {error.msg} (its line {error.lineno})") from error
        before = _unix("\n".join([*imports, setup])).strip()
        return Record(f"mbpp_{task_id}", {"task_id": task_id, "text": text, "code": code, "tests": tests, "setup": before})

    def keep(self, record: Record, split: str) -> bool:
        """By task id: the one file that MBPP is published as holds all splits."""
        if split not in SPLITS:
            raise DataError(f"--dataset {self.name} has no split {split!r}; use {' or '.join(SPLITS)}")
        return record.fields["task_id"] in SPLITS[split]

    def question(self, record: Record) -> str:
        tests = "\n".join([record.fields["setup"], *record.fields["tests"]]).strip()
        parts = [record.fields["text"].strip()]
        function = _tested_function(record)
        if function is not None:
            signature = f"{function.name}({ast.unparse(function.args)})"
            parts.append(f"The required function signature is: {signature}")
            skeleton = f"def {signature}:\n    ..."
        else:
            skeleton = "# your code"
        return "\n\n".join([*parts, NOTES, f"## Answer Format\n{fenced(skeleton)}", f"## Test Cases\n{tests}"])

    def reference(self, record: Record) -> str:
        return fenced(_clean(record.fields["code"]))

    def corrupt(self, record: Record, rng: random.Random) -> str | None:
        """The reference with one small bug in the tested function; None when nothing in it offers one.

        An edit of the text, not of the tree, so that comments and layout stay and only the bug tells the two apart.
        """
        code = _clean(record.fields["code"])
        function = _tested_function(record, code)
        bugs = sorted(set(_bugs(function, code))) if function is not None else []
        rng.shuffle(bugs)
        for start, end, replacement in bugs:
            wrong = code[:start] + replacement + code[end:]
            if _dump(wrong) not in (None, _dump(code)):  # an edit may have hit a comment
                return fenced(wrong)
        return None

    def is_correct(self, record: Record, completion: str) -> bool:
        raise RequestError(
            "scoring mbpp needs the code sandbox, which this version does not have; train on it, evaluate on gsm8k or addition"
        )


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _tested_function(record: Record, code: str | None = None) -> ast.FunctionDef | None:
    """The definition that the tests call; None when they call something else, such as a class or a lambda with a name."""
    tree = _parse(record.fields["code"] if code is None else code)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}  # the last one of a name counts
    for test in _parse("\n".join(record.fields["tests"])).body:
        for node in ast.walk(test):  # outer calls before the calls in their arguments
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                return functions[node.func.id]
    return None


def _parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MBPP's regular expressions are full of escapes that Python frowns on
        return ast.parse(code)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _clean(code: str) -> str:
    """The code with Unix line ends, no trailing blanks, and spaces for tabs: the layout that models write.

    Only if the program stays the same: a tab can be part of a string.
    """
    code = _unix(code).strip("\n")
    neat = "\n".join(_spaced(line.rstrip()) for line in code.split("\n")).strip("\n")
    return neat if _dump(neat) == _dump(code) else code


def _spaced(line: str) -> str:
    body = line.lstrip(" \t")
    return line[: len(line) - len(body)].expandtabs(4) + body


def _dump(code: str) -> str | None:
    """What the program says, whatever its layout; None when it is not Python."""
    try:
        return ast.dump(_parse(code))
    except SyntaxError:
        return None


# Small bugs, as edits of a program's text: `(start, end, replacement)`.

Edit = tuple[int, int, str]
_Place = tuple[int, int]  # line from 1, column in bytes: as syntax trees count
_Bug = tuple[_Place, _Place, str, str | Mapping[str, str]]  # where to look, for which pattern; what to write instead


def _pairs(table: str) -> dict[str, str]:
    return dict(pair.split("~") for pair in table.split())


_OPERATOR = r"[-+*/%&|^<>=!]+|\b(?:not\s+in|in|and|or)\b"
_OPERATORS = _pairs(
    "<~> >~< <=~>= >=~<= ==~!= !=~== and~or or~and +~- -~+ *~+ /~* //~% %~// **~* &~| |~& ^~| <<~>> >>~<<"
    " +=~-= -=~+= *=~+= /=~*= //=~%= %=~//= &=~|= |=~&= ^=~|= <<=~>>= >>=~<<="
) | {"in": "not in", "not in": "in"}
_FUNCTIONS = _pairs("max~min min~max any~all all~any sum~max sorted~list reversed~sorted tuple~list list~tuple set~list")
_METHODS = _pairs(
    "upper~lower lower~upper isupper~islower islower~isupper startswith~endswith endswith~startswith ceil~floor floor~ceil"
    " keys~values values~keys lstrip~rstrip rstrip~lstrip find~rfind rfind~find issubset~issuperset"
    " issuperset~issubset union~intersection intersection~union nlargest~nsmallest nsmallest~nlargest"
    " bisect_left~bisect_right bisect_right~bisect_left permutations~combinations combinations~permutations"
)


def _bugs(function: ast.FunctionDef, code: str) -> Iterator[Edit]:
    """Every small bug that the function offers."""
    lines = code.split("\n")
    offsets = list(accumulate((len(line) + 1 for line in lines), initial=0))

    def offset(place: _Place) -> int:
        return offsets[place[0] - 1] + len(lines[place[0] - 1].encode()[: place[1]].decode())

    nodes = list(_nodes(function.body))
    returned = {node.value.value for node in nodes if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant)}
    texts = sorted(value for value in returned if isinstance(value, str))
    for node in nodes:
        bugs = chain(_operator_bugs(node), _condition_bugs(node), _value_bugs(node, texts), _call_bugs(node))
        for first, last, pattern, instead in bugs:
            start, end = offset(first), offset(last)
            found = re.search(pattern, code[start:end])
            if found is None:
                continue
            replacement = instead if isinstance(instead, str) else instead.get(found[0])
            if replacement is not None:
                yield start + found.start(), start + found.end(), replacement


def _nodes(roots: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below, except inside f-strings, whose columns Python before 3.12 does not know."""
    for root in roots:
        yield root
        if not isinstance(root, ast.JoinedStr):
            yield from _nodes(ast.iter_child_nodes(root))


def _start(node: ast.expr) -> _Place:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> _Place:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset


def _operator_bugs(node: ast.AST) -> Iterator[_Bug]:
    """Another comparison, connective or arithmetic operator between two operands."""
    match node:
        case ast.Compare(left=left, comparators=others):
            operands = [left, *others]
        case ast.BoolOp(values=operands):
            pass
        case ast.BinOp(left=left, right=right) if not (_is_text_or_list(left) or _is_text_or_list(right)):
            operands = [left, right]  # texts and lists know only + and *
        case ast.AugAssign(target=target, value=value):
            operands = [target, value]
        case _:
            operands = []
    for before, after in pairwise(operands):
        yield _end(before), _start(after), _OPERATOR, _OPERATORS


def _is_text_or_list(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.List) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _condition_bugs(node: ast.AST) -> Iterator[_Bug]:
    """A condition negated, or no longer negated, where there is no operator to flip."""
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            tests = [test]
        case ast.comprehension(ifs=tests):
            pass
        case _:
            tests = []
    for test in tests:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield _start(test), _end(test), r"^not\b\s*", ""
        elif not isinstance(test, ast.Compare | ast.BoolOp | ast.Constant):
            yield _start(test), _start(test), "", "not "


def _value_bugs(node: ast.AST, returned: Collection[str]) -> Iterator[_Bug]:
    """A number or an index off by one, True for False, or another of the texts that the function returns."""
    match node:
        case ast.Constant(value=bool(value)):
            yield _start(node), _end(node), r"\w+", str(not value)
        case ast.Constant(value=int(value)):
            yield _start(node), _end(node), r"\w+", str(value + 1)
            if value > 0:
                yield _start(node), _end(node), r"\w+", str(value - 1)
        case ast.Return(value=ast.Constant(value=str(value)) as text):
            yield from ((_start(text), _end(text), r"(?s).+", repr(other)) for other in returned if other != value)
        case ast.Subscript(slice=ast.Name() as position, ctx=ast.Load()):
            yield _end(position), _end(position), "", " - 1"


def _call_bugs(node: ast.AST) -> Iterator[_Bug]:
    """A range one too short or too long, the opposite of a function or method, a wrong repetition in a pattern."""
    match node:
        case ast.Call(func=ast.Name(id="range"), args=[stop] | [_, stop] | [_, stop, _]):
            if isinstance(stop, ast.Name | ast.Call | ast.Attribute | ast.Subscript):
                yield _end(stop), _end(stop), "", " + 1"
                yield _end(stop), _end(stop), "", " - 1"
        case ast.Call(func=ast.Name() as function):
            yield _start(function), _end(function), r"\w+", _FUNCTIONS
        case ast.Call(func=ast.Attribute(attr="replace"), args=[old, new]):
            yield _start(old), _end(new), r"(?s).+", f"{ast.unparse(new)}, {ast.unparse(old)}"
        case ast.Call(func=ast.Attribute(value=owner) as method):
            yield _end(owner), _end(method), r"\w+$", _METHODS
            if isinstance(owner, ast.Name) and owner.id == "re" and node.args:
                yield _start(node.args[0]), _end(node.args[0]), r"[+*]", "?"
