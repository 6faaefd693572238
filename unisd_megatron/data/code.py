"""Python code in a model's answer. Answers are searched, never parsed: what nobody has read is parsed in the sandbox alone."""

from __future__ import annotations

import ast
import json
import re
import warnings

# A block that the end of the answer cuts short counts too: what is missing may be only the fence.
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_PYTHON = ("python", "py", "python3")
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

    An answer that is a JSON object holds it at "code"; one without any block is all code. Blanks where there is nothing.
    """
    text = _THOUGHT.sub("", completion)
    inner = _json_code(text)
    if inner is not None:
        return extract_code(inner, name) if "```" in inner else inner
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        return text
    right = [block for block in blocks if name is not None and defines(block["code"], name)]
    python = [block for block in blocks if block["language"].lower() in _PYTHON]
    return [*right, *python, *blocks][0]["code"]


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
