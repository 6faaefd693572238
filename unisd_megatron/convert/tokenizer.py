"""The tokenizer beside a checkpoint: loaded without running code of the folder's, or refused with the reason."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from unisd_megatron.convert.source import Source
from unisd_megatron.errors import ConfigError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(source: Source) -> bool:
    """Whether there is a tokenizer beside the checkpoint."""
    return any((source.path / name).is_file() for name in _FILES)


def load_tokenizer(source: Source) -> Any:
    """The folder's tokenizer; `ConfigError` if there is none or it has ids that the model lacks."""
    if not has_tokenizer(source):
        raise ConfigError(f"{source.path}: no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a broken file
        raise ConfigError(f"{source.path}: its tokenizer cannot be loaded ({str(error)[:200]})") from error
    if len(tokenizer) > source.arch.vocab_size:
        raise ConfigError(
            f"{source.path}: the tokenizer has {len(tokenizer)} entries and the model only {source.arch.vocab_size}"
        )
    return tokenizer
