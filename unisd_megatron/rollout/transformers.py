"""The embedded default engine: Hugging Face generation in the training processes. Needs no GPU and no server.

Every rank holds a copy of the model and samples its share of the prompts. Each sequence has a generator of
its own: a token is the arg-max of log-probs plus Gumbel noise (an exact draw from the distribution), so the completions
do not depend on how prompts are cut into batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging as transformers_logging

from unisd_megatron.batch import Completion
from unisd_megatron.errors import CheckFailed
from unisd_megatron.exchange import all_gather_json
from unisd_megatron.families.published import published
from unisd_megatron.grid import Grid
from unisd_megatron.rollout.engine import Request, Sampling, Weights
from unisd_megatron.rollout.structured import Grammar
from unisd_megatron.weights import internlm3


class TransformersEngine:
    """Generates with a `transformers` model whose weights are refreshed in place.

    Args: folder: Hugging Face checkpoint (its weights are the first policy); batch_size: sequences generated together;
    dtype: of the copy, that of training; tokenizer: the model's, where completions are to follow a JSON schema.
    """

    def __init__(self, folder: Path, grid: Grid, dtype: torch.dtype, batch_size: int = 32, *, tokenizer: Any = None) -> None:
        self._grid = grid
        self._tokenizer = tokenizer
        self._grammar: Grammar | None = None  # of the last schema asked for
        self._batch_size = batch_size
        transformers_logging.disable_progress_bar()
        self.model = _load(folder, dtype).to(grid.device).eval()
        # A checkpoint's own generation defaults (repetition penalty, top-k, ...) would act on the scores before ours.
        self.model.generation_config = GenerationConfig()
        self._parameters = published(self.model.named_parameters())
        self._version = 0

    @torch.no_grad()
    def refresh(self, weights: Weights, step: int) -> None:
        """Copies the stream in; `CheckFailed` names a tensor that is unknown, misshapen or missing from it."""
        missing = set(self._parameters)
        for name, tensor in itertools.chain.from_iterable(weights.everywhere()):
            target = self._parameters.get(name)
            if target is None or target.shape != tensor.shape:
                raise CheckFailed(f"weight sync of step {step}: the engine has no {name} of shape {tuple(tensor.shape)}")
            target.copy_(tensor)
            missing.discard(name)
        if missing:
            raise CheckFailed(f"weight sync of step {step}: the stream lacks {min(missing)} and {len(missing) - 1} more")
        self._version = step

    def members(self) -> list[str]:
        """None: every parameter was copied where the model computes with it, and there is no cache."""
        return []

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """See `members`."""
        return {}

    def parts(self, wanted: dict[str, list[int]]) -> dict[str, list[tuple[str, int]]]:
        """See `members`."""
        return {}

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.probe`."""
        return [self.generate(requests, sampling)]

    def rest(self) -> None:
        """Keeps its memory; there is nothing that could be made again more cheaply."""

    def close(self) -> None:
        """Holds nothing outside this process."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`. The ranks share the work and exchange the token ids."""
        axis = self._grid.world
        # Prompts of similar length share a batch; ranks take turns, so that each has short and long ones.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        mine = order[axis.rank :: axis.size]
        done: dict[int, Completion] = {}
        for start in range(0, len(mine), self._batch_size):
            part = mine[start : start + self._batch_size]
            done |= zip(part, self._generate_batch([requests[i] for i in part], sampling), strict=True)
        plain = {str(i): [list(c.token_ids), list(c.log_probs), c.finish_reason] for i, c in done.items()}
        merged = {int(i): value for part in all_gather_json(plain, axis) for i, value in part.items()}
        return [Completion(tuple(merged[i][0]), tuple(merged[i][1]), merged[i][2], self._version) for i in range(len(requests))]

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        width = max(len(request.prompt) for request in requests)
        device = self._grid.device
        prompts = torch.zeros(len(requests), width, dtype=torch.int64)
        attention = torch.zeros_like(prompts)
        for row, request in enumerate(requests):
            prompts[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            attention[row, width - len(request.prompt) :] = 1
        draw = _Draw(requests, sampling, self._grammar_of(sampling))
        out = self.model.generate(
            prompts.to(device),
            attention_mask=attention.to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_tokens, eos_token_id=list(sampling.eos_ids), pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([draw]),
        )
        return _cut(out[:, width:].cpu(), torch.stack(draw.log_probs, dim=1).cpu(), sampling)

    def _grammar_of(self, sampling: Sampling) -> Grammar | None:
        if sampling.json_schema is None:
            return None
        if self._grammar is None or not self._grammar.is_of(sampling):
            if self._tokenizer is None:
                raise ValueError("an engine without a tokenizer cannot follow a JSON schema")
            self._grammar = Grammar(sampling, self._tokenizer, self.model.config.get_text_config().vocab_size)
        return self._grammar


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's model; random weights beside a bare config.json (a Megatron checkpoint), to be refreshed before use."""
    internlm3.register()
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


class _Draw(LogitsProcessor):
    """Turns the scores of one position into a score that is highest at the drawn token; keeps its log-prob."""

    def __init__(self, requests: Sequence[Request], sampling: Sampling, grammar: Grammar | None = None) -> None:
        self._writing = None if grammar is None else grammar.writing(len(requests))
        self._generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        self._prompts = [torch.tensor(request.prompt) for request in requests]
        self._seen: Tensor | None = None  # bool [B, V], tokens of the prompt and so far; padding is none of them
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        if sampling.min_p:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self.log_probs: list[Tensor] = []  # [B] per position, under the sampling distribution

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = choice = self.distribution(input_ids, scores)
        if self._sampling.temperature:
            uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
            gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
            choice = log_probs.double() + gumbel.to(scores.device)
        token = choice.argmax(-1, keepdim=True)
        self.log_probs.append(log_probs.gather(1, token).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)

    def distribution(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probs `[B, V]` that tokens are drawn with; called once for each position, in order."""
        scores = scores.float()
        if self._writing is not None:
            scores = self._writing.mask(None if not self.log_probs else input_ids[:, -1], scores)
        scores = self._penalised(input_ids, scores)
        log_probs = torch.log_softmax(scores / (self._sampling.temperature or 1.0), -1)
        if self._sampling.temperature and self._warpers:
            log_probs = torch.log_softmax(self._warpers(input_ids, log_probs), -1)
        return log_probs

    def _penalised(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0:
            return scores
        if self._seen is None:
            self._seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, prompt.to(scores.device)] = True
        else:
            self._seen.scatter_(1, input_ids[:, -1:], True)
        return torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _cut(tokens: Tensor, log_probs: Tensor, sampling: Sampling) -> list[Completion]:
    """Completions up to and including the first end-of-sequence id."""
    out = []
    for row, values in zip(tokens.tolist(), log_probs.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in sampling.eos_ids), None)
        length = len(row) if end is None else end + 1
        out.append(Completion(tuple(row[:length]), tuple(values[:length]), "length" if end is None else "stop"))
    return out
