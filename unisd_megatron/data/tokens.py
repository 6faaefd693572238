"""Text to token ids, once. After this nothing is re-tokenised: prompts and completions travel as ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, Prompts, auxiliary
from unisd_megatron.data.example import Example
from unisd_megatron.errors import DataError


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: str | None
    eos_token_id: int | None

    def encode(self, text: str, **kwargs: Any) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids that the model reads before it answers: one user turn where there is a chat template, else the plain text.

    Special tokens are added exactly once: by the template, or by the tokenizer where there is none.
    """
    if tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return tuple(tokenizer.encode(rendered, add_special_tokens=False))
    return tuple(tokenizer.encode(text))


def encode_examples(tokenizer: Tokenizer, examples: Iterable[Example], max_prompt_length: int) -> tuple[list[Prompts], int]:
    """All views of all examples as ids, and how many examples were dropped because a view is too long.

    Nothing is cut. Raises `DataError` if nothing is left.
    """
    kept: list[Prompts] = []
    dropped, longest = 0, 0
    for example in examples:
        texts = {STUDENT: example.prompt, TEACHER: example.teacher}
        texts |= {auxiliary(k): text for k, text in enumerate(example.auxiliary)}
        if example.negative is not None:
            texts[NEGATIVE] = example.negative
        views = {name: encode_prompt(tokenizer, text) for name, text in texts.items()}
        length = max(len(ids) for ids in views.values())
        if length > max_prompt_length:
            dropped, longest = dropped + 1, max(longest, length)
        else:
            kept.append(Prompts(example.id, views))
    if not kept:
        raise DataError(
            f"all {dropped} examples have a prompt longer than --max_prompt_length {max_prompt_length} "
            f"(the longest has {longest} tokens)"
        )
    return kept, dropped


def end_of_answer(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> int:
    """Which of the end-of-sequence ids ends an answer: the one that the chat template puts there, else the tokenizer's own."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
        ends = [one for one in tokenizer.encode(behind, add_special_tokens=False) if one in eos_ids]
        if ends:
            return ends[0]
    own = tokenizer.eos_token_id
    return own if own is not None and own in eos_ids else eos_ids[0]


def encode_references(
    tokenizer: Tokenizer,
    prompts: Iterable[Prompts],
    references: Mapping[str, str],
    eos_ids: Sequence[int],
    max_completion_length: int,
) -> tuple[list[Prompts], int]:
    """The prompts with their references as completions, and how many were dropped because the reference is too long.

    Args: references: text by record id. Each is encoded without special tokens and ended as an answer is. Nothing is cut.
    Raises `DataError` if nothing is left.
    """
    end = end_of_answer(tokenizer, eos_ids)
    kept: list[Prompts] = []
    dropped, longest = 0, 0
    for one in prompts:
        ids = (*tokenizer.encode(references[one.id], add_special_tokens=False), end)
        if len(ids) > max_completion_length:
            dropped, longest = dropped + 1, max(longest, len(ids))
        else:
            kept.append(dataclasses.replace(one, reference=ids))
    if not kept:
        raise DataError(
            f"all {dropped} examples have a reference longer than --max_completion_length {max_completion_length} "
            f"(the longest has {longest} tokens)"
        )
    return kept, dropped
