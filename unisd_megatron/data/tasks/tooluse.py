"""ToolAlpaca: which calls of which documented tools serve a request, with which arguments.

The student answers in the ReAct form (`Thought`, `Action`, `Action Input` lines); calls written as JSON are read as well.
How calls are read and compared is in `toolcalls.py`. A gold call marked `[Optional]` may be left out.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unisd_megatron.data import prompts
from unisd_megatron.data.sources import read_rows
from unisd_megatron.data.task import Corruption, Record, Task, Verdict
from unisd_megatron.data.toolcalls import CALL, Call, arguments_of, read_calls, released_verdict, verdict
from unisd_megatron.errors import DataError

FORMAT = """Use the following format:
Thought: what is asked for, and which tools serve it
Action: the tool to call, one of [{tools}]
Action Input: its arguments, as a JSON object
(Repeat Action and Action Input for every further call, in the order of the calls. Do not invent results.)

Begin!"""
RELEASED_FORMAT = """Respond with a JSON object of this structure and nothing else:
{"tool_calls": [{"Action": "<tool>", "Action_Input": {"<parameter>": "<value>", ...}}]}

Begin!"""
RELEASED_REQUEST = "{} your thought process (the 'Thought' field in your response)."
OPTIONAL = "[Optional]"

_LISTED_TOOLS = re.compile(r"one of \[([^\]\n]*)\]")

_REQUESTS = {
    "wrong_action": "Call another tool than the right one: one whose name seems to fit, but that does something else.",
    "wrong_args": "Call the right tool with wrong arguments: a wrong value, two values exchanged, or one left out.",
    "wrong_interpretation": "Misread the request, and make the call that would serve the misread one.",
    "extra_tool_calls": "Make the right calls, and one call more that nobody asked for.",
}


class ToolUse(Task):
    """`Ahren09/ToolAlpaca`, or a file of its rows; for evaluation also the publisher's `eval_real.json`, `eval_simulated.json`.

    Of the publisher's files, instructions are left out that nobody can answer from the documentation: with gold arguments that
    are not JSON ("${id from search}"), or with undocumented tools. Credentials, which no prompt tells, are not compared.
    """

    name = "tooluse"
    hub_id = "Ahren09/ToolAlpaca"

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """All records of a split, or of "all". Raises `DataError` also for training on the publisher's evaluation files."""
        first = next(read_rows(Path(data_path)), None) if data_path is not None else None
        if data_path is None or first is None or "Golden_Answers" not in first[2] or split not in (*self.splits, "all"):
            records = super().load(split, data_path)
        elif split == "train":
            raise DataError(f"{data_path}: ToolAlpaca's evaluation files are not for training; use the hub's train split")
        else:
            rows = [(where, row) for where, _, api in read_rows(Path(data_path)) for where, row in _instructions(api, where)]
            parsed = [self._parse(row, index, where) for index, (where, row) in enumerate(rows)]
            records = [record for record in parsed if split == "all" or self.keep(record, split)]
        if self.released and split == "test":
            return [Record(each.id, {**each.fields, "prompt": _released_prompt(each.fields["prompt"])}) for each in records]
        return records

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        prompt, instruction, response = row["prompt"], row["instruction"], row.get("golden_response") or []
        for name, text in (("prompt", prompt), ("instruction", instruction)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name} is {text!r}; expected a text")
        lines = [response] if isinstance(response, str) else response
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"golden_response is {response!r}; expected texts")
        answer = "\n".join(lines).strip()
        calls = [_gold_call(call) for call in row.get("golden_answer") or []]
        calls = calls or [{"Action": call.tool, "Action_Input": json.dumps(call.arguments)} for call in read_calls(answer)]
        if not calls:
            raise ValueError("golden_answer is empty, and golden_response holds no call")
        fields = {"prompt": prompt, "instruction": instruction.strip(), "response": answer, "calls": calls}
        listed = _LISTED_TOOLS.findall(prompt)
        fields["tools"] = [tool.strip() for tool in listed[-1].split(",")] if listed else []
        fields["secrets"] = list(row.get("secrets", []))
        fields["documented"] = row.get("documented")
        return Record(f"tooluse_{index}", fields | {"api": row.get("name") or None})

    def keep(self, record: Record, split: str) -> bool:
        """Only what can be scored: gold arguments that are JSON, tools that are documented (released: whatever the hub has)."""
        documented = record.fields["documented"]
        if documented is None:  # a row of the hub
            return self.released or all(call.arguments is not None for call in _gold(record))
        return all(call.arguments is not None and call.tool in documented for call in _gold(record))

    def question(self, record: Record) -> str:
        return record.fields["prompt"]

    def reference(self, record: Record) -> str:
        """The thought, if the source has one, and the gold calls; released: the source's text, whatever its calls."""
        if self.released:
            return record.fields["response"] or "\n".join(
                f"Action: {call['Action']}\nAction Input: {call['Action_Input']}" for call in record.fields["calls"]
            )
        return _rendered(_thought(record), _gold(record))

    def judge(self, record: Record, completion: str) -> Verdict:
        if self.released:
            return released_verdict(completion, record.fields["calls"])
        calls, gold = read_calls(completion), _gold(record)
        secrets = record.fields["secrets"]
        required = [call for call, raw in zip(gold, record.fields["calls"], strict=True) if OPTIONAL not in raw["Action"]]
        whole, without_optional = verdict(calls, gold, secrets), verdict(calls, required, secrets)
        return without_optional if without_optional.correct else whole

    def group(self, record: Record) -> str | None:
        return record.fields["api"]

    def topic(self, record: Record) -> str:
        return record.fields["instruction"]

    def corrupt(self, record: Record, rng: random.Random) -> str | None:
        """The reference with one slip in its calls: an argument left out or off by one, or another of the listed tools."""
        gold, tools = _gold(record), record.fields["tools"]
        slips = [[*gold[:place], wrong, *gold[place + 1 :]] for place, call in enumerate(gold) for wrong in _slips(call, tools)]
        rng.shuffle(slips)
        solutions = (_rendered(_thought(record), calls) for calls in slips)
        return next((solution for solution in solutions if not self.judge(record, solution).correct), None)

    def corruptions(self, record: Record) -> Sequence[Corruption]:
        return [Corruption(kind, _request(record, request)) for kind, request in _REQUESTS.items()]

    def negative(self, record: Record, corruption: Corruption, reasoning: str, answer: str) -> str | None:
        """The calls of `answer` in the form of the reference, with the reasoning as thought where the reference has one.

        None where no well-formed call is given, or no thought where one is needed. Released: always with the thought, and with
        the answer as it came.
        """
        reasoning = reasoning.strip().removeprefix("Thought:").strip()
        if self.released:
            return f"Thought: {reasoning}\n{answer}" if reasoning else answer
        calls, has_thought = read_calls(answer), bool(_thought(record))
        if not calls or any(call.arguments is None for call in calls) or (has_thought and not reasoning):
            return None
        return _rendered(reasoning if has_thought else "", calls)

    def teacher_prompt(self, record: Record, solution: str, *, negative: bool = False) -> str:
        """Released: also asks for the thought, in other words for a wrong solution than for a right one."""
        if not self.released:
            return super().teacher_prompt(record, solution, negative=negative)
        prompt = prompts.with_solution(self.question(record), solution)
        return f"{prompt.rstrip()} {RELEASED_REQUEST.format('Including' if negative else 'Include')}"

    def auxiliary_prompt(self, record: Record, donors: Sequence[Record], *, gold: bool = False) -> str:
        """Behind requests and their calls, without the documentation of each donor's tools; released: each on one line."""
        shown = [(donor.fields["instruction"], self.reference(donor)) for donor in donors]
        if self.released:
            shown = [(instruction, answer.replace("\n", " ")) for instruction, answer in shown]
        return prompts.behind_examples(self._asked(record, gold), shown)


def _gold_call(call: Any) -> dict[str, str]:
    """A call of the source, its arguments as text."""
    call = json.loads(call) if isinstance(call, str) else call
    if not isinstance(call, Mapping) or not isinstance(call.get("Action"), str) or not call["Action"].strip():
        raise ValueError(f"a call of golden_answer is {call!r}; expected an Action and its Action_Input")
    given = call.get("Action_Input")
    return {"Action": call["Action"].strip(), "Action_Input": given if isinstance(given, str) else json.dumps(given or {})}


def _gold(record: Record) -> list[Call]:
    """The right calls, without credentials."""
    calls = []
    for call in record.fields["calls"]:
        arguments = arguments_of(call["Action_Input"])
        if arguments is not None:
            arguments = {name: value for name, value in arguments.items() if name not in record.fields["secrets"]}
        calls.append(Call(call["Action"].removeprefix(OPTIONAL).strip(), arguments))
    return calls


def _thought(record: Record) -> str:
    """What the source's response says before its first call."""
    response = record.fields["response"]
    match = CALL.search(response)
    return response[: match.start()].strip().removeprefix("Thought:").strip() if match is not None else ""


def _rendered(thought: str, calls: Sequence[Call]) -> str:
    lines = [f"Action: {call.tool}\nAction Input: {json.dumps(call.arguments, ensure_ascii=False)}" for call in calls]
    return "\n".join([f"Thought: {thought}", *lines] if thought else lines)


# Prompts, and wrong calls.


def _instructions(api: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, as the hub has them, of one API of the publisher's files."""
    try:
        described, name = dict(api["Function_Description"]), api["Name"]
        components = described.pop("components", "")
        pairs = list(zip(api["Instructions"], api["Golden_Answers"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{where}: not an API of tooluse: {reason}") from error
    tools = "\n\n".join(f"{tool}: {description}" for tool, description in described.items())
    form = FORMAT.format(tools=", ".join(described))
    documentation = "\n\n".join(part for part in (f"The tools of {name}:\n\n{tools}", components.strip(), form) if part)
    for number, (instruction, calls) in enumerate(pairs, start=1):
        row: dict[str, Any] = {
            "prompt": f"Serve the request with the tools below.\n\n{documentation}\n\nRequest: {instruction}"
        }
        row |= {"instruction": instruction, "golden_answer": calls, "name": name, "secrets": api.get("Authentication") or ()}
        yield f"{where}, instruction {number}", row | {"documented": list(described)}


def _released_prompt(prompt: str) -> str:
    """The prompt with the ReAct form replaced by JSON, as the released evaluation asks (its training does not)."""
    start = prompt.find("Use the following format:")
    end = prompt.find("Begin!", start)
    return prompt if start < 0 or end < 0 else prompt[:start] + RELEASED_FORMAT + prompt[end + len("Begin!") :]


def _slips(call: Call, tools: Sequence[str]) -> Iterator[Call]:
    arguments = dict(call.arguments or {})
    for name, value in arguments.items():
        yield Call(call.tool, {other: kept for other, kept in arguments.items() if other != name})
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Call(call.tool, {**arguments, name: value + 1})
    yield from (Call(tool, arguments) for tool in tools if tool not in (call.tool, "getDetails"))


def _request(record: Record, mistake: str) -> str:
    return (
        "Play an assistant that makes a mistake in using tools.\n\n"
        f"## What the assistant is told\n{record.fields['prompt']}\n\n"
        f"## The right answer\n{_rendered('', _gold(record))}\n\n"
        f"## The mistake to make\n{mistake}\n"
        "- The answer must differ from the right one in its calls, look genuine, and not mention any mistake.\n"
        "- Give a short reasoning that leads to it.\n"
        "- Write each call on two lines, `Action: <tool>` and `Action Input: <arguments as a JSON object>`.\n\n"
        'Respond in JSON: {"reasoning": "<the thought>", "answer": "<the Action and Action Input lines>"}'
    )
