"""How far a model has moved from its base, and how well it fits the reference solutions (paper's PPL_ret, JSD, PPL_fit).

    corpus PPL = exp(-sum_i sum_t log p(y_it) / sum_i T_i)        mean PPL = mean_i exp(-sum_t log p(y_it) / T_i)
    JSD        = sum_i sum_t D_it / sum_i T_i, D = KL(base||M)/2 + KL(model||M)/2, M their mean, nats, over the whole vocabulary

Retention reads the model's own completions under its base (forward), and the base's completions under the model (reverse).
End of sequence: a sampled end of sequence is a token of the completion like any other and counts; one that was never sampled
(a completion cut short) is not added. PPL_fit scores the reference's own tokens, to which no end of sequence belongs.
Released semantics score the completion's text, tokenised anew, so that no end of sequence counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unisd_megatron.data import Record, Task
from unisd_megatron.data.tokens import Tokenizer
from unisd_megatron.evaluate.reading import completion_log_probs, completion_logits, shared
from unisd_megatron.evaluate.results import digest
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Axis
from unisd_megatron.losses import token_divergence, token_log_probs
from unisd_megatron.rollout.transformers import TransformersEngine


@dataclass(frozen=True, slots=True)
class Text:
    """A completion to be read behind its prompt, both as ids."""

    id: str
    sample: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest([self.id, self.sample, self.prompt, self.completion])


Measure = Callable[[Text], dict[str, float]]


def compare(reader: TransformersEngine, writer: TransformersEngine) -> Measure:
    """Measures a completion of `writer`'s: its log-prob under `reader` and under `writer` (sums), and the JSD of both (sum)."""

    def measure(text: Text) -> dict[str, float]:
        read, written = (completion_logits(one, text.prompt, text.completion) for one in (reader, writer))
        ids = read.new_tensor(text.completion).long()
        return {
            "log_prob": float(token_log_probs(read, ids).double().sum()),
            "own_log_prob": float(token_log_probs(written, ids).double().sum()),
            "jsd": float(token_divergence(written, read, alpha=0.5).double().sum()),
        }

    return measure


def fit(reader: TransformersEngine) -> Measure:
    """Measures a reference solution: its log-prob under `reader` (sum)."""
    return lambda text: {"log_prob": float(completion_log_probs(reader, text.prompt, text.completion).double().sum())}


def still_read(rows: Sequence[dict[str, Any]], texts: Sequence[Text]) -> int:
    """How many of the rows, from the first, are of these very texts: answers that were made anew are read anew."""
    pairs = zip(rows, texts, strict=False)
    return next((n for n, (row, text) in enumerate(pairs) if row.get("read") != text.digest), min(len(rows), len(texts)))


def measured(texts: Sequence[Text], measure: Measure, world: Axis) -> list[dict[str, Any]]:
    """A row for each text, in order, on every rank. Collective over `world`."""
    mine = {str(number): measure(texts[number]) for number in shared(range(len(texts)), world)}
    found = {int(number): values for part in all_gather_json(mine, world) for number, values in part.items()}
    return [
        {"id": text.id, "sample": text.sample, "tokens": len(text.completion), "read": text.digest, **found[number]}
        for number, text in enumerate(texts)
    ]


def completions(rows: Sequence[dict[str, Any]], prompts: dict[str, tuple[int, ...]], tokenizer: Tokenizer | None) -> list[Text]:
    """What was generated, by the rows of `answers.jsonl`; nothing for an empty answer or one that was never asked.

    Args: tokenizer: given, the text is tokenised anew (released semantics); else the sampled ids are read.
    """
    texts = []
    for one in rows:
        again = tokenizer.encode(one["completion"], add_special_tokens=False) if tokenizer is not None else one["token_ids"]
        if again:
            texts.append(Text(one["id"], one["sample"], prompts[one["id"]], tuple(again)))
    return texts


def references(task: Task, records: Sequence[Record], prompts: dict[str, tuple[int, ...]], tokenizer: Tokenizer) -> list[Text]:
    """The reference solutions, behind the student's prompts."""
    encoded = [(one.id, tuple(tokenizer.encode(task.reference(one), add_special_tokens=False))) for one in records]
    return [Text(name, 0, prompts[name], ids) for name, ids in encoded if ids]


def perplexities(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Corpus and mean perplexity, mean log-prob over tokens, and what they are over; the JSD where it was measured."""
    tokens = sum(one["tokens"] for one in rows)
    log_prob = math.fsum(one["log_prob"] for one in rows) / tokens
    found = {
        "completions": len(rows),
        "tokens": tokens,
        "mean_log_prob": log_prob,
        "ppl_corpus": _exp(-log_prob),
        "ppl_mean": math.fsum(_exp(-one["log_prob"] / one["tokens"]) for one in rows) / len(rows),
    }
    if "jsd" in rows[0]:
        found["own_ppl_corpus"] = _exp(-math.fsum(one["own_log_prob"] for one in rows) / tokens)
        found["jsd"] = math.fsum(one["jsd"] for one in rows) / tokens
        found["jsd_mean_over_completions"] = math.fsum(one["jsd"] / one["tokens"] for one in rows) / len(rows)
    return found


def _exp(value: float) -> float:
    """exp, and inf where it does not fit: a token of probability 0 is possible."""
    return math.exp(value) if value < 700 else math.inf
