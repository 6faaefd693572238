"""`verify`: a Hugging Face checkpoint against another of the same model, tensors bit for bit and logits position by position.

`transformers` computes with the weights of the one, Megatron with the other's; neither ever holds more than a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unisd_megatron.config import Layout
from unisd_megatron.convert.checkpoints import require_one_process, world
from unisd_megatron.convert.readers import Heard, read_with_megatron, read_with_transformers
from unisd_megatron.convert.source import Source, open_source
from unisd_megatron.convert.tokenizer import has_tokenizer, load_tokenizer
from unisd_megatron.convert.weights import FolderWeights, Weights, weights_of
from unisd_megatron.data.tokens import encode_prompt
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.platform import Platform

LOGITS_TOLERANCE = 1e-4
"""Largest accepted difference of fp32 logits between `transformers` and Megatron."""
ROUNDINGS = 4.0
"""In bf16 the two may differ by this many times what bf16 costs `transformers` itself (its bf16 against its fp32 logits)."""
GROWTH = 8.0
"""A layer counts as the one where a difference begins if it multiplies it by this."""
TEXTS = (
    "Question: A farmer has 347 apples and buys 285 more. How many apples does she have?\nAnswer: 347 + 285 = 632.\n",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Alle Menschen sind frei und gleich an Würde geboren. 人人生而自由。 Все люди рождаются свободными. 🙂\n",
)
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TensorDifference:
    """One tensor: how many of its entries differ bit for bit, and by how much at most (inf where a shape or nan differs).

    dtypes: the two, where they are not the same; entries are then those whose values differ.
    """

    name: str
    entries: int
    largest: float
    total: int
    dtypes: str = ""

    @property
    def is_none(self) -> bool:
        return not self.entries and not self.dtypes

    def describe(self) -> str:
        """The difference, for people."""
        if not self.entries:
            return f"same values  {self.name} ({self.dtypes})"
        dtypes = f", {self.dtypes}" if self.dtypes else ""
        return f"{self.largest:12.3e}  {self.name} ({self.entries} of {self.total} entries{dtypes})"


@dataclass(frozen=True)
class Reading:
    """Logits in one dtype.

    positions: the largest difference at each position, over prompts and vocabulary; layers: the largest difference of hidden
    states, as a part of their largest value, behind the embedding and then behind each layer; begins: number of the decoder
    layer, from 0, at which the difference grows by `GROWTH`, None if it nowhere does.
    """

    dtype: torch.dtype
    positions: list[float]
    layers: list[float]
    tolerance: float

    @property
    def holds(self) -> bool:
        return all(one <= self.tolerance for one in self.positions)  # a nan does not hold

    @property
    def begins(self) -> int | None:
        for number, (before, after) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if not after <= GROWTH * max(before, self._rounding):
                return number
        return None

    @property
    def _rounding(self) -> float:
        return GROWTH * torch.finfo(self.dtype).eps

    @property
    def _beginning(self) -> str:
        if not self.layers[0] <= self._rounding:
            return "begins at the embedding"
        if self.begins is not None:
            return f"grows first at decoder layer {self.begins}"
        return "grows at no one layer" if self.holds else "begins behind the last layer: at the final norm or the head"

    def describe(self) -> str:
        """The verdict's numbers, for people."""
        worst = max(range(len(self.positions)), key=lambda i: (math.isnan(self.positions[i]), self.positions[i]))
        dtype = str(self.dtype).removeprefix("torch.")
        return "\n".join(
            (
                f"logits in {dtype}: largest difference {self.positions[worst]:.3e} (at most {self.tolerance:.3g}), "
                f"at position {worst}; {self._beginning}",
                "  by position: " + " ".join(f"{value:.0e}" for value in self.positions),
                "  hidden states behind the embedding and each layer, relative: "
                + " ".join(f"{value:.0e}" for value in self.layers),
            )
        )


class Verification:
    """Two checkpoints of one model, opened; what is compared is computed as `tensors` and `logits` are asked for.

    Raises `CheckpointError` where they are not of one model, `ConfigError` under torchrun.
    """

    def __init__(
        self, model_name: str, against: Path, *, config_from: str | None = None, allow_pickle: bool = False, length: int = 64
    ) -> None:
        require_one_process("verify")
        self._ours = open_source(model_name, allow_pickle=allow_pickle)
        if self._ours.is_megatron:
            raise CheckpointError(f"{model_name}: --model_name is the Hugging Face side; give the Megatron folder to --against")
        self._other = open_source(str(against), config_from=config_from, allow_pickle=allow_pickle)
        if self._ours.arch != self._other.arch:
            raise CheckpointError(f"{against}: another model than {model_name} (config.json differs)")
        if not 1 <= length <= self._ours.arch.max_position:
            raise ConfigError(f"--max_prompt_length is {length}; this model has {self._ours.arch.max_position} positions")
        self._prompts = _prompts(self._ours, length)

    def run(self, tolerance: float) -> Iterator[list[TensorDifference] | Reading]:
        """First all tensors; then logits in fp32 and, where the weights are bf16, in bf16 too."""
        with world(Layout()) as (platform, grid):
            theirs = weights_of(self._other, platform, grid)
            yield list(self._tensors(theirs))
            exact = read_with_transformers(self._ours, self._prompts, torch.float32)
            yield self._logits(theirs, exact, torch.float32, tolerance, platform, grid)
            if self._ours.dtype is torch.bfloat16:
                rounded = read_with_transformers(self._ours, self._prompts, torch.bfloat16)
                noise = float((rounded.logits - exact.logits).abs().max())
                del exact
                yield self._logits(theirs, rounded, torch.bfloat16, max(tolerance, ROUNDINGS * noise), platform, grid)

    def _tensors(self, theirs: Weights) -> Iterator[TensorDifference]:
        ours = FolderWeights(self._ours)
        for mapping in self._ours.mappings:
            for name, one, other in zip(mapping.hf, ours.tensors(mapping), theirs.tensors(mapping), strict=True):
                yield compare(name, one, other)

    def _logits(
        self, theirs: Weights, said: Heard, dtype: torch.dtype, tolerance: float, platform: Platform, grid: Grid
    ) -> Reading:
        rows, length = self._prompts.shape
        layers, positions = [0.0] * len(said.hidden), torch.zeros(length)

        def hear(number: int, states: Tensor) -> None:
            expected = said.hidden[number].float()
            layers[number] = float((states.float() - expected).abs().max() / expected.abs().max())

        def judge(block: slice, logits: Tensor) -> None:
            difference = (logits.float() - said.logits.flatten(0, 1)[block].float()).abs().amax(1)
            places = torch.arange(block.start, block.start + len(difference)) % length
            for place, value in zip(places.tolist(), difference, strict=True):
                positions[place] = torch.maximum(positions[place], value)  # keeps a nan

        read_with_megatron(self._other, theirs, self._prompts, dtype, platform, grid, hear, judge)
        return Reading(dtype, positions.tolist(), layers, tolerance)


def compare(name: str, one: Tensor, other: Tensor) -> TensorDifference:
    """Bit for bit where the dtype is the same, by value in the wider one otherwise; in blocks."""
    dtypes = f"{one.dtype} and {other.dtype}".replace("torch.", "") if one.dtype != other.dtype else ""
    if one.shape != other.shape:
        return TensorDifference(name, one.numel(), float("inf"), one.numel(), dtypes)
    entries, largest = 0, 0.0
    for a, b in zip(one.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True):
        bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
        differ = a.view(bits) != b.view(bits) if a.dtype == b.dtype else a.float() != b.float()
        count = int(differ.sum())
        if count:
            entries += count
            by = (a[differ].float() - b[differ].float()).abs().nan_to_num(float("inf"))
            largest = max(largest, float(by.max()))
    return TensorDifference(name, entries, largest, one.numel(), dtypes)


def _prompts(source: Source, length: int) -> Tensor:
    """int64 [B, length]: texts, each repeated to that length, and random ids from the whole vocabulary."""
    rows: list[list[int]] = []
    if has_tokenizer(source):
        tokenizer = load_tokenizer(source)
        rows = [list(encode_prompt(tokenizer, text)) for text in TEXTS]
    generator = torch.Generator().manual_seed(0)
    while len(rows) <= len(TEXTS):
        rows.append(torch.randint(0, source.arch.vocab_size, (length,), generator=generator).tolist())
    return torch.tensor([(row * (length // len(row) + 1))[:length] for row in rows])
