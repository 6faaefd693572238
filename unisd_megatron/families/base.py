"""What a model family states: its dimensions and switches, and its weight map. No Megatron here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unisd_megatron.errors import ConfigError
from unisd_megatron.families.mapping import Mapping

VOCAB_DIVISOR = 128
"""The vocabulary is padded to a multiple of this whatever the layout, so that a checkpoint loads at any TP."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: frequency i of d/2 is `base ** (-2 i / d) / linear_factor`, or what Llama-3.1's scaling makes of it."""

    base: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None


@dataclass(frozen=True)
class LocalAttention:
    """Layers that look back a fixed number of tokens, among others that see everything."""

    window: int  # keys that a query sees, its own among them
    rope: Rope  # of the local layers
    layers: tuple[bool, ...]  # True where local


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of every feed-forward block."""

    count: int
    per_token: int
    renormalized: bool  # the weights of a token's experts sum to 1; else they are their shares of the softmax over all


@dataclass(frozen=True)
class Arch:
    """Dimensions and switches of a decoder-only transformer."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of one expert, where there are experts
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    linear_bias: bool = False  # on the output projection of attention and in the feed-forward block
    qk_norm: bool = False  # RMSNorm over the head dimension of queries and keys
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gate
    zero_centered_norms: bool = False  # norms multiply by 1 + weight
    sandwich_norms: bool = False  # norms behind attention and feed-forward too, before the residual is added
    embedding_scale: float | None = None  # rounded to the weights' dtype, then multiplied
    attention_scale: float | None = None  # of the logits; None: head_dim ** -0.5
    local: LocalAttention | None = None
    experts: Experts | None = None

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR

    def check_layout(self, tensor: int, pipeline: int, name: str, expert: int = 1, ends: int = 0) -> None:
        """Raises `ConfigError` where a layout does not divide the model `name`.

        Args: pipeline: stages, virtual ones too; ends: places of layers that embedding and loss take
        (`Layout.pipeline_ends`).
        """
        if min(tensor, pipeline, expert) < 1:
            sizes = f"tensor-parallel {tensor} x pipeline-parallel {pipeline} x expert-parallel {expert}"
            raise ConfigError(f"{sizes} is no layout; all are at least 1")
        if expert > 1 and (self.experts is None or self.experts.count % expert):
            held = "no experts" if self.experts is None else f"{self.experts.count} experts, which it does not divide"
            raise ConfigError(f"expert-parallel {expert}: {name} has {held}")
        for count, what in (
            (self.num_attention_heads, "attention heads"),
            (self.num_query_groups, "key/value heads"),
            (self.padded_vocab_size, "rows of the padded vocabulary"),
            (self.ffn_hidden_size, "feed-forward channels"),
        ):
            if count % tensor:
                fits = [str(t) for t in range(1, count + 1) if count % t == 0][:8]
                raise ConfigError(
                    f"tensor-parallel {tensor} does not divide the {count} {what} of {name}; use {', '.join(fits)}"
                )
        if pipeline not in self.pipeline_sizes(ends):
            fits = [str(size) for size in self.pipeline_sizes(ends)]
            counted = f" and {ends} more places (--account-for-...-in-pipeline-split)" if ends else ""
            hint = "; --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split make it fit"
            raise ConfigError(
                f"pipeline-parallel {pipeline} does not divide the {self.num_layers} layers{counted} of {name}; use "
                f"{', '.join(fits)}{hint if not ends and pipeline in self.pipeline_sizes(2) else ''}"
            )

    def pipeline_sizes(self, ends: int = 0) -> list[int]:
        """The numbers of stages, virtual ones too, that have equally many places, each with a layer among them."""
        places = self.num_layers + ends
        return [count for count in range(1, self.num_layers + 1) if places % count == 0 and (not ends or places > count)]


class Family(ABC):
    """One model family: one file, one line in `FAMILIES`."""

    name: ClassVar[str]  # what `--family` calls it
    model_type: ClassVar[str]  # `model_type` in config.json

    @abstractmethod
    def arch(self, config: AbstractMapping[str, Any]) -> Arch:
        """Dimensions from a Hugging Face `config.json`; `ConfigError` for a feature this family file does not cover."""

    @abstractmethod
    def mappings(self, arch: Arch) -> list[Mapping]:
        """Every parameter, in the order of the layers."""

    @abstractmethod
    def tiny_config(self) -> dict[str, Any]:
        """A `config.json` of a tiny model with the family's features switched on, for tests and demos."""
