"""Settings of what `unisd prepare` computes once, before training. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from unisd_megatron.setting import setting


@dataclass(frozen=True)
class Caches:
    """What is computed once, before training, by `unisd prepare`; whatever of this shaped a cache is part of its name."""

    cache_dir: str = setting("cache", "folder of prepared negatives, instructions and embeddings")
    cache_seed: int = setting(42, "seed of what a model writes into a cache")
    cache_temperature: float = setting(0.7, "sampling temperature of what a model writes into a cache")
    cache_engine: Literal["transformers", "vllm"] = setting("transformers", "engine that writes into a cache")
    negatives_per_example: int = setting(4, "wrong solutions asked for, for each example")
    negative_tries: int = setting(3, "times that each is drawn, at most, until one is usable and fails the answer check")
    negative_max_length: int = setting(1024, "tokens of a generated wrong solution")
    num_demos: int = setting(5, "solved examples that an instruction is induced from")
    induction_max_length: int = setting(256, "tokens of an induced instruction")
    retrieval_model: str = setting("sentence-transformers/all-MiniLM-L6-v2", "embeds questions; a folder or hub id")


NEGATIVE_CACHE = frozenset({"negatives_per_example", "negative_tries", "negative_max_length"})
INDUCTION_CACHE = frozenset({"num_demos", "induction_max_length"})
EMBEDDING_CACHE = frozenset({"retrieval_model"})
WRITTEN_CACHE = frozenset({"cache_seed", "cache_temperature", "cache_engine"})
"""Settings of one kind of cache; the last are of what a model writes: negatives and instructions."""

CacheKind = Literal["negatives", "induction", "embeddings"]
CACHE_SETTINGS: Mapping[CacheKind, frozenset[str]] = {
    "negatives": NEGATIVE_CACHE | WRITTEN_CACHE,
    "induction": INDUCTION_CACHE | WRITTEN_CACHE,
    "embeddings": EMBEDDING_CACHE,
}
"""Settings that shape each kind of cache."""
