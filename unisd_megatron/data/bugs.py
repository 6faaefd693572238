"""Small bugs, as edits of a program's text: one operator, number, condition or call is another. Nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, chain, pairwise

Edit = tuple[int, int, str]
"""`(start, end, replacement)`."""

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


def small_bugs(function: ast.FunctionDef, code: str) -> Iterator[Edit]:
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
