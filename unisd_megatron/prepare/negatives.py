"""Wrong solutions that a model writes, each shown to be wrong: one that passes the task's answer check is drawn again.

The model answers in JSON of a schema whose texts are bounded, so that even a model that rambles comes to an end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import Corruption, Record, Task
from unisd_megatron.data.tokens import Tokenizer, encode_prompt
from unisd_megatron.errors import DataError
from unisd_megatron.evaluate.judging import verdicts
from unisd_megatron.prepare.cache import cache_file, read_rows
from unisd_megatron.prepare.generate import Log, Writer, open_writer
from unisd_megatron.prepare.order import Order, missing
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.weights.hf import eos_ids

KIND = "negatives"
TOO_LONG = "prompt too long"


@dataclass
class Slot:
    """One wrong solution to be: what is asked, and what came of it."""

    record: Record
    corruption: Corruption
    prompt: tuple[int, ...]
    number: int  # among all slots of the cache; with the seed and the try, the seed of what is drawn
    rejected: list[str] = field(default_factory=list)  # why, for each answer that was thrown away
    output: str = ""
    solution: str | None = None
    check: str = ""

    def row(self) -> dict[str, Any]:
        """As the cache keeps it."""
        return {
            "kind": self.corruption.kind,
            "prompt": self.corruption.request,
            "output": self.output,
            "solution": self.solution,
            "check": self.check,
            "rejected": self.rejected,
        }


def read(order: Order) -> dict[str, list[str]]:
    """The wrong solutions of each record, by its id; `ConfigError` with the command that prepares them if they are not."""
    path, header, _ = _identity(order, load_tokenizer(order.source))
    rows = read_rows(path, header)
    if rows is None:
        raise missing(order, "negatives", path)
    return {row["id"]: [one["solution"] for one in row["negatives"] if one["solution"] is not None] for row in rows}


def prepare(order: Order, batch_size: int) -> str:
    """Writes the cache, or what is left of it to be written, and says what it holds. Called on every rank.

    Raises `DataError` for a task that no model can be asked about.
    """
    tokenizer = load_tokenizer(order.source)
    path, header, sampling = _identity(order, tokenizer)
    per_example, tries = order.caches.negatives_per_example, order.caches.negative_tries
    room = order.source.arch.max_position - sampling.max_tokens
    slots = [
        [
            Slot(record, corruption, encode_prompt(tokenizer, corruption.request), i * per_example + j)
            for j, corruption in enumerate(_asked(order.task, record, per_example))
        ]
        for i, record in enumerate(order.records)
    ]
    fitting = [len(one.prompt) for group in slots for one in group if len(one.prompt) <= room]
    if not fitting:
        raise DataError(f"all prompts are longer than the {room} tokens of --model_name; lower --negative_max_length")
    if read_rows(path, header) is None:
        align = max(1, batch_size // per_example)
        with (
            open_writer(order, tokenizer, longest=max(fitting) + sampling.max_tokens, structured=True) as writer,
            Log(writer, path, header, align) as log,
        ):
            while log.done < len(slots):
                group = slots[log.done : log.done + align]
                _fill([one for each in group for one in each], order, writer, sampling, room, tries)
                log.append([_row(order.records[log.done + i], each) for i, each in enumerate(group)])
    return _summary(path, read_rows(path, header) or [])


def _row(record: Record, slots: Sequence[Slot]) -> dict[str, Any]:
    return {"id": record.id, "negatives": [one.row() for one in slots]}


def _identity(order: Order, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any], Sampling]:
    """Where the cache lies, its header, and how its answers are drawn."""
    count = order.caches.negatives_per_example
    prompts = [one.request for record in order.records for one in _asked(order.task, record, count)]
    if not prompts:
        raise DataError(f"--dataset {order.task.name} has no kinds of wrong solutions to ask a model for")
    caches = order.caches
    schema = _schema(prompts[:64], tokenizer, caches.negative_max_length)
    header = order.written_header("negatives", len(order.records), prompts) | {"schema": schema}
    sampling = Sampling(
        caches.cache_temperature, 1.0, 0, caches.negative_max_length, eos_ids(order.source.path), json_schema=schema
    )
    return cache_file(caches.cache_dir, KIND, header), header, sampling


def _schema(prompts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> str:
    """`{"reasoning": text, "answer": text}`, of texts that fit into the tokens at this tokenizer's rate on the prompts."""
    rate = max(1, sum(map(len, prompts)) // sum(len(tokenizer.encode(prompt)) for prompt in prompts))  # characters a token
    bounds = {"reasoning": rate * max_tokens // 4, "answer": rate * max_tokens // 3}
    texts = {name: {"type": "string", "minLength": 1, "maxLength": max(1, bound)} for name, bound in bounds.items()}
    return json.dumps({"type": "object", "properties": texts, "required": [*texts], "additionalProperties": False})


def _asked(task: Task, record: Record, count: int) -> list[Corruption]:
    """The kinds in turn."""
    kinds = task.corruptions(record)
    return [kinds[j % len(kinds)] for j in range(count)] if kinds else []


def _fill(slots: Sequence[Slot], order: Order, writer: Writer, sampling: Sampling, room: int, tries: int) -> None:
    """Draws until each slot has a wrong solution, or has had its tries. Collective over the world."""
    for one in slots:
        one.check = TOO_LONG if len(one.prompt) > room else ""
    waiting = [one for one in slots if not one.check]
    for number in range(tries):
        seed = order.caches.cache_seed
        requests = [Request(one.record.id, one.prompt, sequence_seed(seed, number, one.number)) for one in waiting]
        outputs = writer.write(requests, sampling)
        judged = writer.agreed(_judge(order.task, waiting, outputs) if writer.leads else None)
        for one, output, (solution, check) in zip(waiting, outputs, judged, strict=True):
            one.output, one.solution, one.check = output, solution, check
            if solution is None:
                one.rejected.append(check)
        waiting = [one for one in waiting if one.solution is None]


def _judge(task: Task, slots: Sequence[Slot], outputs: Sequence[str]) -> list[tuple[str | None, str]]:
    """For each answer its wrong solution, or None, and what the check said: how it fails, or why it is thrown away."""
    found = [_solution(task, one, output) for one, output in zip(slots, outputs, strict=True)]
    if task.released:  # which never looks whether they are wrong
        return [(text, reason or "not checked") for text, reason in found]
    places = [i for i, (text, _) in enumerate(found) if text is not None]
    checked = verdicts(task, [(slots[i].record, found[i][0] or "") for i in places])
    for i, verdict in zip(places, checked, strict=True):
        found[i] = (None, "passes the answer check") if verdict.correct else (found[i][0], verdict.failure or "wrong")
    return found


def _solution(task: Task, slot: Slot, output: str) -> tuple[str | None, str]:
    try:
        answer: Mapping[str, str] = json.loads(output, strict=False)
    except ValueError:
        return None, "cut before its end"
    text = task.negative(slot.record, slot.corruption, answer["reasoning"].strip(), answer["answer"].strip())
    if text is None:
        return None, "not usable"
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, "not Unicode text"
    return (None, "the reference itself") if text.strip() == task.reference(slot.record).strip() else (text, "")


def _summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    slots = [one for row in rows for one in row["negatives"]]
    usable = sum(one["solution"] is not None for one in slots)
    reasons: dict[str, int] = {}
    for reason in (reason for one in slots for reason in [*one["rejected"], *[TOO_LONG] * (one["check"] == TOO_LONG)]):
        reasons[reason] = reasons.get(reason, 0) + 1
    thrown = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    without = sum(all(one["solution"] is None for one in row["negatives"]) for row in rows)
    return f"{path}: {usable} of {len(slots)} wrong solutions; thrown away: {thrown}; records without any: {without}"
