"""Calls of tools in a completion, and what they are worth against the right ones.

Corrected scoring compares arguments as JSON: numbers by value, lists in order, objects by key; a text and a number or truth
value are equal when the text writes it ("5" and 5, "true" and true: the gold answers do both), two texts when they are the same
up to blanks around them. An argument that is empty or null is one that is not given. What is given too much counts against, as
does what is missing; calls are compared in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unisd_megatron.data.task import Verdict
from unisd_megatron.data.thoughts import without_thoughts

CALL = re.compile(
    r"^[ \t*_#>-]*(?:ASSISTANT )?Action(?:[ \t]*\d+)?[*_ \t]*:[*_ \t]*(?P<name>[^\n]*)\n\s*"
    r"[*_#>-]*(?:ASSISTANT )?Action[ _]?(?:\d+[ _]?)?Input(?:[ \t]*\d+)?[*_ \t]*:[*_ \t]*",
    re.MULTILINE | re.IGNORECASE | re.ASCII,
)
_BEFORE_JSON = re.compile(r"(?:[\s,;]|```(?:json)?)*(?=[{\[])", re.IGNORECASE)
_ACTION_KEY = re.compile(r"\bAction[\"'*_` ]*:")
_INPUT_KEYS = ("Action_Input", "Action Input")  # as asked for, and as the ReAct form spells it
_FENCE = re.compile(r"\A\s*(?:```(?:json)?\s*)?", re.IGNORECASE)
_RELEASED_CALL = re.compile(
    r"Action\s*\d*\s*:\s*(.*?)\nAction\s*\d*\s*Input\s*\d*\s*:\s*(.*?)(?=\nThought|\nAction\s*\d*\s*:|$)", re.DOTALL
)
_JSON = json.JSONDecoder()


class Call(NamedTuple):
    """A tool and its arguments; None where they are not a JSON object."""

    tool: str
    arguments: Mapping[str, Any] | None


def read_calls(completion: str) -> list[Call]:
    """The calls that a completion makes, in order: from JSON if it begins with JSON calls, else from its `Action` lines."""
    text = without_thoughts(completion).strip()
    values, rest = _json_values(text)
    if values and any(isinstance(one, Mapping) and "Action" in one for one in _listed(values[0])):
        return [] if _ACTION_KEY.search(rest) else _json_calls(values)
    matches = list(CALL.finditer(text))
    ends = [*(match.start() for match in matches), len(text)][1:]
    return [
        Call(_tool(match["name"]), _written_arguments(text[match.end() : end]))
        for match, end in zip(matches, ends, strict=True)
    ]


def _json_values(text: str) -> tuple[list[Any], str]:
    """The JSON objects and lists that the text begins with, in code blocks or not, and what follows the last of them."""
    values, end = [], 0
    while (before := _BEFORE_JSON.match(text, end)) is not None:
        try:
            value, end = _JSON.raw_decode(text, before.end())
        except (ValueError, RecursionError):  # not JSON, a number of too many digits, too many brackets
            break
        values.append(value)
    return values, text[end:]


def _listed(value: Any) -> list[Any]:
    """The calls that a JSON value lists, or the value as the only one."""
    listed = value.get("tool_calls", [value]) if isinstance(value, Mapping) else value
    return listed if isinstance(listed, list) else [listed]


def _json_calls(values: Sequence[Any]) -> list[Call]:
    """All calls; none where one of them is no object with an `Action` and, under one of its two spellings, its input."""
    calls = []
    for call in (call for value in values for call in _listed(value)):
        given = [call[key] for key in _INPUT_KEYS if key in call] if isinstance(call, Mapping) else []
        if len(given) != 1 or "Action" not in call:
            return []
        calls.append(Call(_tool(str(call["Action"])), arguments_of(given[0])))
    return calls


def _written_arguments(text: str) -> Mapping[str, Any] | None:
    """The arguments that the text after `Action Input:` begins with, on this line or below; none where nothing is written."""
    value = _decoded(text)
    if value is None:
        return None if text.partition("\n")[0].strip() else {}
    return arguments_of(value)


def arguments_of(value: Any) -> Mapping[str, Any] | None:
    """The arguments of a call: an object, or a text that writes one; nothing at all is no arguments."""
    if isinstance(value, str):
        value = _decoded(value) if value.strip() else {}
        return value if isinstance(value, Mapping) else None
    return {} if value is None else value if isinstance(value, Mapping) else None


def _decoded(text: str) -> Any:
    """The JSON value that the text begins with, in a code block or not; None where it begins with none."""
    try:
        return _JSON.raw_decode(_FENCE.sub("", text, count=1))[0]
    except (ValueError, RecursionError):  # not JSON, a number of too many digits, too many brackets
        return None


def _tool(name: str) -> str:
    return name.strip().strip("`*_\"' ").removesuffix("()")


def verdict(calls: Sequence[Call], gold: Sequence[Call], secrets: Sequence[str]) -> Verdict:
    """The ToolAlpaca metrics: right tools in order ("action"), the share of right arguments ("arguments"), and both ("full").

    `secrets`: arguments that are not looked at. Where the calls are not as many as the right ones, no argument is right.
    """
    tools, right = [call.tool for call in calls], [call.tool for call in gold]
    pairs = zip(calls, gold, strict=True) if len(calls) == len(gold) else ()
    shares = [_share(call.arguments, other.arguments, secrets) for call, other in pairs]
    arguments = sum(shares) / len(shares) if shares else 0.0
    metrics = {"action": float(tools == right), "arguments": arguments, "full": float(tools == right and arguments == 1)}
    if not calls:
        failure = "unparsable"
    elif len(calls) != len(gold):
        failure = "missing call" if len(calls) < len(gold) else "extra call"
    elif tools != right:
        failure = "wrong order" if sorted(tools) == sorted(right) else "wrong tool"
    else:
        failure = "arguments not JSON" if any(call.arguments is None for call in calls) else "wrong arguments"
    return Verdict(bool(metrics["full"]), None if metrics["full"] else failure, metrics)


def _share(given: Mapping[str, Any] | None, gold: Mapping[str, Any] | None, secrets: Sequence[str]) -> float:
    """The share of arguments, of those given or right, that are given and right."""
    if given is None or gold is None:
        return 0.0
    found = {name: value for name, value in given.items() if name not in secrets and value not in ("", None)}
    wanted = {name: value for name, value in gold.items() if value not in ("", None)}
    names = found.keys() | wanted.keys()
    same = [name in found and name in wanted and _equal(found[name], wanted[name]) for name in names]
    return sum(same) / len(same) if same else 1.0


def _equal(one: Any, other: Any) -> bool:
    match one, other:
        case str(), str():
            return one.strip() == other.strip()
        case (str() as text, bool() | int() | float() as value) | (bool() | int() | float() as value, str() as text):
            return _equal(_strict_json(text), value)
        case list(), list():
            return len(one) == len(other) and all(map(_equal, one, other))
        case dict(), dict():
            return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
        case _:
            return isinstance(one, bool) == isinstance(other, bool) and one == other


def released_verdict(completion: str, gold: Sequence[Mapping[str, str]]) -> Verdict:
    """The released metrics: names in order; the share of the gold's arguments, compared as Python texts, whatever is added."""
    calls = _released_calls(completion)
    same_count = len(calls) == len(gold)
    action = same_count and all(call["Action"] == right["Action"] for call, right in zip(calls, gold, strict=True))
    shares = [_released_share(*pair) for pair in zip(calls, gold, strict=True)] if same_count else []
    arguments = sum(shares) / len(shares) if shares else 0.0
    full = action and arguments == 1
    failure = None if full else "unparsable" if not calls else "wrong tool" if not action else "wrong arguments"
    if calls and not same_count:
        failure = "missing call" if len(calls) < len(gold) else "extra call"
    return Verdict(full, failure, {"action": float(action), "arguments": arguments, "full": float(full)})


def _released_calls(completion: str) -> list[dict[str, str]]:
    found = _strict_json(completion)
    listed = found.get("tool_calls") if isinstance(found, Mapping) else None
    if isinstance(listed, list) and listed and all(isinstance(call, Mapping) and "Action" in call for call in listed):
        return [_released_call(str(call["Action"]), json.dumps(call.get("Action_Input"))) for call in listed]
    return [_released_call(tool, given.strip().strip('"')) for tool, given in _RELEASED_CALL.findall(completion)]


def _released_call(tool: str, given: str) -> dict[str, str]:
    return {"Action": tool.strip(), "Action_Input": given}


def _released_share(call: Mapping[str, str], gold: Mapping[str, str]) -> float:
    given, wanted = _strict_json(call["Action_Input"]), _strict_json(gold["Action_Input"])
    given, wanted = (value if isinstance(value, dict) else {} for value in (given, wanted))
    if not wanted:
        return float(not given)
    same = [str(given.get(name)).strip() == str(value).strip() for name, value in wanted.items() if value not in ("", None)]
    return sum(same) / len(same) if same else 1.0


def _strict_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
