"""A model's exact distribution at each token of a completion that is given to it (teacher forcing).

Legend: T tokens of the completion, V vocabulary. Sequences are read one at a time: no padding, and no number depends on what
else is in a batch. Prompt and completion are the ids that were sampled; nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unisd_megatron.data import Task
from unisd_megatron.data.tokens import Tokenizer
from unisd_megatron.evaluate.run import Answer, Asked, unanswered
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.grid import Axis
from unisd_megatron.losses import token_log_probs
from unisd_megatron.rollout.transformers import TransformersEngine


@torch.no_grad()
def completion_logits(engine: TransformersEngine, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Logits `[T, V]` in fp32 that predict each completion token."""
    ids = torch.tensor([[*prompt, *completion]], device=engine.model.device)
    logits = engine.model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits
    return logits[0, :-1].float()


def completion_log_probs(engine: TransformersEngine, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-prob of each completion token, `[T]`, nats: a softmax over the whole vocabulary in fp32, at temperature 1."""
    logits = completion_logits(engine, prompt, completion)
    return token_log_probs(logits, torch.tensor(completion, device=logits.device))


def shared(numbers: Sequence[int], world: Axis) -> Iterator[int]:
    """This rank's part of the work."""
    return iter(numbers[world.rank :: world.size])


def choose(
    asked: Sequence[Asked],
    engine: TransformersEngine,
    tokenizer: Tokenizer,
    judge: Judge,
    world: Axis,
    *,
    max_prompt_length: int,
) -> list[Answer]:
    """The likeliest option of each question as its answer, in order, on every rank. Collective over `world`.

    An option counts with the sum of its tokens' log-probs behind the prompt, without an end of sequence. The task judges the
    chosen text like any other completion.
    """
    mine = {}
    for number in shared(range(len(asked)), world):
        question = asked[number].question
        options = option_ids(judge.task, asked[number], tokenizer)
        if len(question.token_ids) + max(map(len, options.values())) <= max_prompt_length:
            mine[str(number)] = {
                letter: float(completion_log_probs(engine, question.token_ids, ids).sum()) for letter, ids in options.items()
            }
    read = {int(number): values for part in all_gather_json(mine, world) for number, values in part.items()}
    letters = {number: max(values, key=values.__getitem__) for number, values in read.items()}
    texts = {n: judge.task.options(asked[n].question.record)[letter] for n, letter in letters.items()}
    chosen = [(asked[number].question.record, text) for number, text in sorted(texts.items())]
    verdicts = dict(zip(sorted(texts), judge.verdicts(chosen, world), strict=True))
    answers = []
    for number, one in enumerate(asked):
        if number not in read:
            answers.append(unanswered(judge.task, one))
            continue
        ids = option_ids(judge.task, one, tokenizer)[letters[number]]
        verdict, record = verdicts[number], one.question.record
        answers.append(
            Answer(
                id=record.id,
                sample=one.sample,
                group=judge.task.group(record),
                prompt=one.question.prompt,
                completion=texts[number],
                tokens=len(ids),
                token_ids=ids,
                finished=True,
                correct=verdict.correct,
                failure=verdict.failure,
                metrics=verdict.metrics,
                options=read[number],
            )
        )
    return answers


def option_ids(task: Task, asked: Asked, tokenizer: Tokenizer) -> Mapping[str, tuple[int, ...]]:
    """The options of a question as token ids, by letter."""
    texts = task.options(asked.question.record)
    return {letter: tuple(tokenizer.encode(text, add_special_tokens=False)) for letter, text in texts.items()}
