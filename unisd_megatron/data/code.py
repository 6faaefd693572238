"""Python code in a model's answer. Answers are searched, never parsed: what nobody has read is parsed in the sandbox alone."""

from __future__ import annotations

import ast
import io
import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from itertools import takewhile

from unisd_megatron.data.thoughts import without_thoughts

_OPENING = re.compile(r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^`\n]*\n?")
_PYTHON = ("python", "py", "python3")
# No line of Python outside of a string begins with a capital, has no `=`, and ends like a sentence.
_PROSE = re.compile(r"[*_]{0,3}[A-Z][^=]*[.:!?][*_]{0,3}\s*")
_DEFINITION = re.compile(r"(?:async[ ]+)?def\b|class\b|import\b|from\b|[@#)\]}]")
_DEFINED = re.compile(r"^(?:(?:async[ ]+)?def|class)[ ]+(\w+)", re.MULTILINE)
_IMPORTED = re.compile(r"^(?:from[ ]+\S+[ ]+)?import\b[ ]*(\([^)]*\)|[^\n#]*)", re.MULTILINE)
_RELEASED_PYTHON = re.compile(r"```python\s*\n(.*?)```", re.DOTALL)
_RELEASED_BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def fenced(code: str) -> str:
    """The code as a Python code block."""
    return f"```python\n{code}\n```"


def defines(code: str, name: str) -> bool:
    """Whether the code defines a function or class `name`, or assigns to it, at its top level."""
    own = re.escape(name)
    return (
        re.search(rf"^(?:(?:async[ ]+)?def[ ]+{own}\b|class[ ]+{own}\b|{own}[ ]*(?::[^=\n]+)?=(?!=))", code, re.MULTILINE)
        is not None
    )


def extract_code(completion: str, name: str | None = None) -> str:
    """The program in an answer: of its code blocks the first that defines `name`, else the first in Python, else the first.

    Before a block that defines `name` stand the earlier ones whose definitions or imports it uses. A JSON object, as the
    answer or as a block, holds the code at "code"; an answer without any block is all code, but for sentences around it.
    Blanks where there is nothing.
    """
    text = without_thoughts(completion)
    inner = _json_code(text)
    if inner is not None:
        return extract_code(inner, name) if "```" in inner else inner
    blocks = list(_blocks(text))
    if not blocks:
        return _without_sentences(text)
    right = [place for place, (_, code) in enumerate(blocks) if name is not None and defines(code, name)]
    if right:
        return _with_helpers(blocks[right[0]][1], [code for language, code in blocks[: right[0]] if language in _PYTHON])
    python = [code for language, code in blocks if language in _PYTHON]
    return [*python, *(code for _, code in blocks)][0]


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """`(language, code)` of every code block. One that the end of the answer cuts short counts: only its fence may be missing.

    The closing fence begins a line, or ends the last line of the code.
    """
    opening, lines = None, list[str]()
    for line in io.StringIO(text):
        if opening is None:
            opening = _OPENING.fullmatch(line)
            continue
        fence = opening["fence"]
        before, closing, after = line.partition(fence)
        if closing and not (before.strip() and after.strip()):
            lines.append(f"{before.rstrip()}\n" if before.strip() else "")
            yield _block(opening["language"].lower(), "".join(lines))
            opening, lines = None, []
        else:
            lines.append(line)
    if opening is not None:
        yield _block(opening["language"].lower(), "".join(lines))


def _block(language: str, code: str) -> tuple[str, str]:
    """The block with its code at the left margin, where a list item had moved all of it; a JSON object is what it holds."""
    inner = _json_code(code)
    if inner is not None:
        return _PYTHON[0], extract_code(inner) if "```" in inner else inner
    return language, textwrap.dedent(code) if code.lstrip("\n")[:1] in (" ", "\t") else code


def _with_helpers(code: str, earlier: list[str]) -> str:
    """The code behind those earlier blocks that define or import what it uses, and do nothing else."""
    for block in reversed(earlier):
        if re.search(r"^from __future__ ", code, re.MULTILINE):  # which may stand behind nothing else
            break
        used = set(re.findall(r"\w+", code)) - _names(code)
        top = (line for line in block.split("\n") if line.strip() and not line[0].isspace())
        if _names(block) & used and all(map(_DEFINITION.match, top)):
            code = f"{block.rstrip()}\n\n\n{code}"
    return code


def _names(code: str) -> set[str]:
    """The names that definitions and imports at its top level give."""
    imported = [re.findall(r"[\w.]+", part) for found in _IMPORTED.findall(code) for part in found.split(",")]
    return {*_DEFINED.findall(code), *(words[-1].partition(".")[0] for words in imported if words)}


def _without_sentences(text: str) -> str:
    """The text without the sentences before and behind it, which no program can begin or end with."""
    lines = text.split("\n")
    before = list(takewhile(_is_no_code, lines))
    behind = list(takewhile(_is_no_code, reversed(lines[len(before) :])))
    if not any(line.strip() for line in [*before, *behind]):
        return text
    return "\n".join(lines[len(before) : len(lines) - len(behind)])


def _is_no_code(line: str) -> bool:
    return not line.strip() or _PROSE.fullmatch(line) is not None


def released_code(completion: str) -> str:
    """The same by the cascade of the authors' code: JSON, the first ```python block, the first block, all of it."""
    inner = _json_code(completion)
    if inner is not None:
        return inner
    block = _RELEASED_PYTHON.search(completion) or _RELEASED_BLOCK.search(completion)
    return block[1] if block else completion


def _json_code(text: str) -> str | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return answer["code"] if isinstance(answer, dict) and isinstance(answer.get("code"), str) else None


# Code of data sets.


def parse_code(code: str) -> ast.Module:
    """Its syntax tree, without Python's remarks; `SyntaxError` when it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MBPP's regular expressions are full of escapes that Python frowns on
        return ast.parse(code)


def meaning(code: str) -> str | None:
    """What the program says, whatever its layout; None when it is not Python."""
    try:
        return ast.dump(parse_code(code))
    except SyntaxError:
        return None


def unix(text: str) -> str:
    """The text with Unix line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def tidy(code: str) -> str:
    """The code with Unix line ends, no trailing blanks, and spaces for tabs: the layout that models write.

    Only if the program stays the same: a tab can be part of a string.
    """
    code = unix(code).strip("\n")
    neat = "\n".join(_spaced(line.rstrip()) for line in code.split("\n")).strip("\n")
    return neat if meaning(neat) == meaning(code) else code


def _spaced(line: str) -> str:
    body = line.lstrip(" \t")
    return line[: len(line) - len(body)].expandtabs(4) + body
