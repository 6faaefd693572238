"""Completions that are JSON of a schema: which tokens may come next, as a mask on the scores. The door to xgrammar.

xgrammar is what vLLM uses too, so both engines may write the same JSON (up to a space between two fields).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unisd_megatron.errors import MissingDependency
from unisd_megatron.rollout.engine import Sampling

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar


class Grammar:
    """A schema in the tokens of one tokenizer.

    Args: sampling: with a `json_schema`; vocab_size: columns of the scores, which may be more than the tokenizer has entries.
    Raises `MissingDependency` without xgrammar.
    """

    def __init__(self, sampling: Sampling, tokenizer: Any, vocab_size: int) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise MissingDependency(
                "completions that follow a JSON schema need the `xgrammar` library; pip install xgrammar"
            ) from error
        self._sampling = sampling
        tokens = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=list(sampling.eos_ids)
        )
        assert sampling.json_schema is not None
        compiler = xgrammar.GrammarCompiler(tokens, max_threads=1)
        self._compiled = compiler.compile_json_schema(sampling.json_schema, any_whitespace=False)
        # Some special tokens count as the text they are written as, which no JSON may be made of.
        special = [number for number in tokenizer.all_special_ids if number < vocab_size]
        self._forbidden = torch.tensor(sorted(set(special) - set(sampling.eos_ids)), dtype=torch.int64)

    def is_of(self, sampling: Sampling) -> bool:
        """Whether it is the grammar that `sampling` asks for."""
        return (self._sampling.json_schema, self._sampling.eos_ids) == (sampling.json_schema, sampling.eos_ids)

    def writing(self, count: int) -> Writing:
        """The state of `count` sequences, all at their start."""
        return Writing(self._compiled, self._forbidden, count)


class Writing:
    """How far each sequence of a batch has come."""

    def __init__(self, compiled: CompiledGrammar, forbidden: Tensor, count: int) -> None:
        import xgrammar

        self._matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(count)]
        self._forbidden = forbidden
        self._bits: Tensor | None = None

    def mask(self, last: Tensor | None, scores: Tensor) -> Tensor:
        """Scores `[B, V]` with minus infinity where a token may not follow; call once for each position, in order.

        Args: last: tokens `[B]` drawn at the position before; None at the first. Sequences that have ended are left alone.
        """
        import xgrammar

        if last is not None:
            for matcher, token in zip(self._matchers, last.tolist(), strict=True):
                if not matcher.is_terminated():
                    assert matcher.accept_token(token), token
        if self._bits is None:
            self._bits = xgrammar.allocate_token_bitmask(*scores.shape)
        writing = [row for row, matcher in enumerate(self._matchers) if not matcher.is_terminated()]
        for row in writing:
            self._matchers[row].fill_next_token_bitmask(self._bits, row)
        if not writing:
            return scores
        masked = scores.clone()
        masked[torch.tensor(writing)[:, None], self._forbidden] = float("-inf")
        xgrammar.apply_token_bitmask_inplace(masked, self._bits.to(scores.device), indices=writing)
        return masked
