"""The order of examples: a pure function of the seed and the optimizer step, so that a resumed run repeats itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

from unisd_megatron.errors import ConfigError, DataError


class Sampler:
    """Which examples make up the batch of each optimizer step, with prompts of similar length in a batch.

    The epochs follow each other in one endless sequence of indices, in which the batch of step `s` stands at
    `s * batch_size`. Each epoch is a permutation of all examples:

        head | sorted batches, in random order | tail

    The head completes the batch that the tail of the epoch before began, so nothing is ever dropped (and that one batch
    may meet an example in both epochs). In between, the shuffled indices are cut into windows, each window is sorted
    by length and cut into batches: the padding of a sort, most of the randomness of a shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 16) -> None:
        """`lengths`: of each example's prompt, in any unit; `window`: how many batches are sorted together."""
        if not lengths:
            raise DataError("no example to draw batches from; the data set is empty")
        if batch_size < 1 or window < 1:
            raise ConfigError(f"batch size {batch_size} and window {window} must both be at least 1")
        self._lengths = tuple(lengths)
        self.batch_size = batch_size
        self._seed = seed
        self._window = window
        self._known: dict[int, list[int]] = {}  # epoch -> its permutation; only saves time

    def batch(self, step: int) -> list[int]:
        """The indices of the `batch_size` examples of the 0-based optimizer step."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps count from 0")
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(place // len(self._lengths))[place % len(self._lengths)] for place in places]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._known:
            if len(self._known) == 2:  # a batch at the border of two epochs reads both
                del self._known[max(self._known, key=lambda known: abs(known - epoch))]
            self._known[epoch] = self._permutation(epoch)
        return self._known[epoch]

    def _permutation(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self._seed}:{epoch}")
        indices = list(range(len(self._lengths)))
        rng.shuffle(indices)
        head = min(-epoch * len(indices) % self.batch_size, len(indices))
        tail = (len(indices) - head) % self.batch_size
        batches = self._sorted_batches(indices[head : len(indices) - tail])
        rng.shuffle(batches)
        return [*indices[:head], *(index for batch in batches for index in batch), *indices[len(indices) - tail :]]

    def _sorted_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Batches of similar lengths, from a whole number of batches in shuffled order (which decides between equals)."""
        batches = []
        reach = self._window * self.batch_size
        for first in range(0, len(indices), reach):
            window = sorted(indices[first : first + reach], key=self._lengths.__getitem__)
            batches += [window[start : start + self.batch_size] for start in range(0, len(window), self.batch_size)]
        return batches
