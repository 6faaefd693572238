"""The thoughts of a model that reasons before it answers."""

from __future__ import annotations


def without_thoughts(completion: str) -> str:
    """What stands behind the last `</think>`, whether or not the completion opened the thought (chat templates do).

    Nothing, where a thought has no end.
    """
    answer = completion.rpartition("</think>")[2]
    return "" if answer.lstrip().startswith("<think>") else answer
