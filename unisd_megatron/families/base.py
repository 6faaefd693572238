"""What a model family states: its dimensions, and how its Hugging Face tensors become Megatron shards. No Megatron here.

A `Mapping` knows both directions, so that import, export, weight sync and gradient comparison are one list. Megatron
names are those of the local layer spec, with global layer numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unisd_megatron.errors import ConfigError

VOCAB_DIVISOR = 128
"""The vocabulary is padded to a multiple of this whatever the layout, so that a checkpoint loads at any TP."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Arch:
    """Dimensions and switches of a decoder-only transformer."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    tied: bool

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of the query, key and value parts of one query group."""
        return self.num_attention_heads // self.num_query_groups * self.head_dim, self.head_dim, self.head_dim

    def check_layout(self, tensor: int, pipeline: int, name: str) -> None:
        """Raises `ConfigError` where a layout does not divide the model `name`; pipeline counts virtual stages too."""
        if min(tensor, pipeline) < 1:
            raise ConfigError(f"tensor-parallel {tensor} x pipeline-parallel {pipeline} is no layout; both are at least 1")
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
        if self.num_layers % pipeline:
            fits = [str(p) for p in range(1, self.num_layers + 1) if self.num_layers % p == 0]
            raise ConfigError(
                f"pipeline-parallel {pipeline} does not divide the {self.num_layers} layers of {name}; use {', '.join(fits)}"
            )


class Mapping(ABC):
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]

    @abstractmethod
    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        """This rank's shard of the Megatron parameter, from full tensors in the order of `hf`."""

    @abstractmethod
    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The full tensors in the order of `hf`, from the shards of all tensor-parallel ranks in order."""


@dataclass(frozen=True)
class Replicated(Mapping):
    """The same on every tensor-parallel rank (norms)."""

    megatron: str
    hf: tuple[str, ...]

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split(Mapping):
    """Cut along one dimension."""

    megatron: str
    hf: tuple[str, ...]
    dim: int

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), self.dim)]


@dataclass(frozen=True)
class Vocabulary(Mapping):
    """Rows are vocabulary entries, padded with zeros up to `padded`; the padding is trimmed on the way out."""

    megatron: str
    hf: tuple[str, ...]
    vocab_size: int
    padded: int

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        (full,) = tensors
        rows = self.padded // size
        part = full[rank * rows : (rank + 1) * rows]
        return torch.cat([part, part.new_zeros(rows - part.shape[0], full.shape[1])])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.vocab_size]]


@dataclass(frozen=True)
class GateUp(Mapping):
    """Gate and up projections: each rank holds its part of the gate above its part of the up projection."""

    megatron: str
    hf: tuple[str, ...]

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class QKV(Mapping):
    """Query, key and value rows, interleaved by query group: `[q of group 0, k 0, v 0, q of group 1, ...]`."""

    megatron: str
    hf: tuple[str, ...]
    groups: int
    rows: tuple[int, int, int]

    def shard(self, tensors: Sequence[Tensor], size: int, rank: int) -> Tensor:
        parts = [tensor.reshape(self.groups, rows, *tensor.shape[1:]) for tensor, rows in zip(tensors, self.rows, strict=True)]
        return torch.cat(parts, 1).chunk(size)[rank].flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        full = torch.cat(list(shards))
        grouped = full.reshape(self.groups, sum(self.rows), *full.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(self.rows, 1)]


class Family(ABC):
    """One model family: one file, one line in `FAMILIES`."""

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


def decoder_mappings(arch: Arch) -> list[Mapping]:
    """The weight map shared by Llama-shaped decoders (Llama, Qwen2)."""
    out: list[Mapping] = [
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), arch.vocab_size, arch.padded_vocab_size)
    ]
    for i in range(arch.num_layers):
        to, of = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = tuple(of + f"self_attn.{part}_proj." for part in "qkv")
        out += [
            Replicated(to + "input_layernorm.weight", (of + "input_layernorm.weight",)),
            *(
                QKV(
                    to + f"self_attention.linear_qkv.{kind}",
                    tuple(name + kind for name in qkv),
                    arch.num_query_groups,
                    arch.qkv_rows,
                )
                for kind in (("weight", "bias") if arch.qkv_bias else ("weight",))
            ),
            Split(to + "self_attention.linear_proj.weight", (of + "self_attn.o_proj.weight",), dim=1),
            Replicated(to + "pre_mlp_layernorm.weight", (of + "post_attention_layernorm.weight",)),
            GateUp(to + "mlp.linear_fc1.weight", (of + "mlp.gate_proj.weight", of + "mlp.up_proj.weight")),
            Split(to + "mlp.linear_fc2.weight", (of + "mlp.down_proj.weight",), dim=1),
        ]
    out.append(Replicated("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not arch.tied:
        out.append(Vocabulary("output_layer.weight", ("lm_head.weight",), arch.vocab_size, arch.padded_vocab_size))
    return out
