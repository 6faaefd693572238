"""Answers of a model: ask, generate, score. Also what the evaluation during training calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unisd_megatron.data import Record, Task
from unisd_megatron.data.tokens import Tokenizer, encode_prompt
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.grid import Axis
from unisd_megatron.rollout.engine import Request, RolloutEngine, Sampling, sequence_seed

TOO_LONG, UNFINISHED = "prompt too long", "not finished"
"""Failures that no task knows of: nothing was generated; the completion was cut at its largest length."""


@dataclass(frozen=True, slots=True)
class Question:
    """A record as the model is asked it: one user turn, as token ids."""

    record: Record
    index: int  # among the records
    prompt: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question, and which of the answers to it. Equal to itself only."""

    question: Question
    sample: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One scored answer, as `answers.jsonl` has it."""

    id: str
    sample: int
    group: str | None
    prompt: str
    completion: str  # without its end-of-sequence token
    tokens: int  # of the completion, that one included
    token_ids: tuple[int, ...]
    finished: bool  # ended by itself
    correct: bool
    failure: str | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    log_probs: tuple[float, ...] | None = None  # of each token under the sampling distribution, nats; where asked for
    options: Mapping[str, float] | None = None  # log-prob of each option, nats; where options are read


def ask(task: Task, records: Iterable[Record], tokenizer: Tokenizer) -> list[Question]:
    """The questions, in order."""
    texts = [(record, task.question(record)) for record in records]
    return [Question(record, i, text, encode_prompt(tokenizer, text)) for i, (record, text) in enumerate(texts)]


def each_sample(questions: Iterable[Question], samples: int = 1) -> list[Asked]:
    """All answers that are wanted, question by question."""
    return [Asked(question, sample) for question in questions for sample in range(samples)]


def answer(
    asked: Sequence[Asked],
    engine: RolloutEngine,
    sampling: Sampling,
    tokenizer: Tokenizer,
    judge: Judge,
    world: Axis,
    *,
    max_prompt_length: int,
    seed: int = 0,
    log_probs: bool = False,
) -> list[Answer]:
    """Answers of the model behind `engine`, in order, on every rank. Collective over `world`, all ranks.

    A question longer than `max_prompt_length` is not asked and counts as wrong. So does an answer that did not end: it is not
    even scored, but for released semantics, which score whatever there is.
    """
    fits = [one for one in asked if len(one.question.token_ids) <= max_prompt_length]
    requests = [
        Request(one.question.record.id, one.question.token_ids, sequence_seed(seed, one.sample, one.question.index))
        for one in fits
    ]
    said = dict(zip(fits, engine.generate(requests, sampling) if requests else [], strict=True))
    texts = {
        one: tokenizer.decode([i for i in completion.token_ids if i not in sampling.eos_ids])
        for one, completion in said.items()
    }
    scored = [one for one, completion in said.items() if completion.finish_reason == "stop" or judge.task.released]
    verdicts = dict(zip(scored, judge.verdicts([(one.question.record, texts[one]) for one in scored], world), strict=True))
    answers = []
    for one in asked:
        if one not in said:
            answers.append(unanswered(judge.task, one))
            continue
        completion, verdict = said[one], verdicts.get(one)
        answers.append(
            Answer(
                id=one.question.record.id,
                sample=one.sample,
                group=judge.task.group(one.question.record),
                prompt=one.question.prompt,
                completion=texts[one],
                tokens=len(completion.token_ids),
                token_ids=completion.token_ids,
                finished=completion.finish_reason == "stop",
                correct=verdict is not None and verdict.correct,
                failure=verdict.failure if verdict is not None else UNFINISHED,
                metrics=verdict.metrics if verdict is not None else {},
                log_probs=completion.log_probs if log_probs else None,
            )
        )
    return answers


def unanswered(task: Task, asked: Asked) -> Answer:
    """The answer to a question that was not put to the model."""
    question = asked.question
    group = task.group(question.record)
    return Answer(question.record.id, asked.sample, group, question.prompt, "", 0, (), False, False, TOO_LONG)


def accuracy(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return sum(one.correct for one in answers) / len(answers)


def row(answer: Answer) -> dict[str, Any]:
    """The answer as JSON has it; what was not asked for is left out."""
    plain = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
    plain |= {"token_ids": list(answer.token_ids), "metrics": dict(answer.metrics)}
    optional = {"log_probs": answer.log_probs, "options": answer.options}
    return {name: value for name, value in plain.items() if name not in optional or value is not None}
