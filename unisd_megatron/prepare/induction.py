"""Instructions that a model induces from groups of solved examples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import Record
from unisd_megatron.data.contexts import Instruction
from unisd_megatron.data.prompts import asking_for_instruction
from unisd_megatron.data.tokens import encode_prompt
from unisd_megatron.errors import DataError
from unisd_megatron.prepare.cache import cache_file, read_rows
from unisd_megatron.prepare.generate import Log, open_writer
from unisd_megatron.prepare.order import Order, missing
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.weights.hf import eos_ids

KIND = "induction"
MOST_GROUPS = 100


def read(order: Order) -> list[Instruction]:
    """The instructions; `ConfigError` with the command that prepares them if they are not."""
    path, header = _identity(order)
    rows = read_rows(path, header)
    if rows is None:
        raise missing(order, "induction", path)
    return [Instruction(row["instruction"], frozenset(row["examples"])) for row in rows if row["instruction"]]


def prepare(order: Order, batch_size: int) -> str:
    """Writes the cache, or what is left of it to be written, and says what it holds. Called on every rank."""
    order.task.instructed_prompt(order.records[0], "")  # a task that cannot show instructions says so before any is made
    path, header = _identity(order)
    tokenizer, caches = load_tokenizer(order.source), order.caches
    sampling = Sampling(caches.cache_temperature, 1.0, 0, caches.induction_max_length, eos_ids(order.source.path))
    groups = _groups(order)
    texts = [_prompt(order, group) for group in groups]
    # The authors send the bare text; it is a question to a chat model.
    prompts = [tuple(tokenizer.encode(text)) if order.task.released else encode_prompt(tokenizer, text) for text in texts]
    room = order.source.arch.max_position - sampling.max_tokens
    fitting = [len(prompt) for prompt in prompts if len(prompt) <= room]
    if not fitting:
        raise DataError(f"all prompts are longer than the {room} tokens of --model_name; lower --num_demos")
    if read_rows(path, header) is None:
        with (
            open_writer(order, tokenizer, longest=max(fitting) + sampling.max_tokens, structured=False) as writer,
            Log(writer, path, header, batch_size) as log,
        ):
            while log.done < len(groups):
                numbers = range(log.done, min(log.done + batch_size, len(groups)))
                asked = [i for i in numbers if len(prompts[i]) <= room]
                requests = [Request(str(i), prompts[i], sequence_seed(caches.cache_seed, 0, i)) for i in asked]
                said = dict(zip(asked, writer.write(requests, sampling), strict=True))
                log.append([_row(groups[i], texts[i], said.get(i)) for i in numbers])
    rows = read_rows(path, header) or []
    return f"{path}: {sum(bool(row['instruction']) for row in rows)} instructions of {len(rows)} groups"


def _row(group: list[Record], prompt: str, output: str | None) -> dict[str, Any]:
    """As the cache keeps it; no instruction where the prompt was too long or the answer says nothing that can be shown."""
    instruction = (output or "").strip()
    try:
        instruction.encode()
    except UnicodeEncodeError:
        instruction = ""
    check = "prompt too long" if output is None else "used" if instruction else "empty"
    return {
        "examples": [record.id for record in group],
        "prompt": prompt,
        "output": output,
        "check": check,
        "instruction": instruction,
    }


def _identity(order: Order) -> tuple[Path, dict[str, Any]]:
    groups = _groups(order)
    header = order.written_header("induction", len(groups), [_prompt(order, group) for group in groups])
    return cache_file(order.caches.cache_dir, KIND, header), header


def _groups(order: Order) -> list[list[Record]]:
    """Disjoint groups of records, drawn with the seed; at most 100. Raises `DataError` where there are too few for one."""
    size, records = order.caches.num_demos, list(order.records)
    count = min(len(records) // size, MOST_GROUPS)
    if not count:
        raise DataError(f"--num_demos {size} is more than the {len(records)} records of {order.task.name}; lower it")
    random.Random(f"{order.caches.cache_seed}:induction").shuffle(records)
    return [records[first : first + size] for first in range(0, count * size, size)]


def _prompt(order: Order, group: list[Record]) -> str:
    return asking_for_instruction([(order.task.question(record), order.task.reference(record)) for record in group])
