"""The tokenizer beside a checkpoint: loaded without running code of the folder's, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from unisd_megatron.convert.source import Source
from unisd_megatron.errors import ConfigError, MissingDependency
from unisd_megatron.weights.hf import read_json

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBES = (
    "Hello world",
    " leading, and  two spaces",
    "a\n\n\tb\r\n  c ",
    "def f(x):\n    return x ** 2  # 12345 + 67.89\n",
    "Größe, naïve, Ω ≈ 3.14, 人人生而自由。 Все люди. 🙂 ﬁ ①",
)
"""Texts on which a rebuilt tokenizer must give the ids that sentencepiece gives."""


def has_tokenizer(source: Source) -> bool:
    """Whether there is a tokenizer beside the checkpoint."""
    return any((source.path / name).is_file() for name in _FILES)


def load_tokenizer(source: Source) -> Any:
    """The folder's tokenizer; `ConfigError` if there is none, it needs code of its own, or it has ids that the model lacks."""
    if not has_tokenizer(source):
        raise ConfigError(f"{source.path}: no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = _load(source.path)
    except (ConfigError, MissingDependency):
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions for a broken file
        raise ConfigError(f"{source.path}: its tokenizer cannot be loaded ({str(error)[:200]})") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= source.arch.vocab_size:
        raise ConfigError(f"{source.path}: the tokenizer has {highest + 1} entries and the model only {source.arch.vocab_size}")
    return tokenizer


def _load(path: Path) -> Any:
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    code = (config.get("auto_map") or {}).get("AutoTokenizer")
    if not code:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if (path / "tokenizer.json").is_file():  # says all that the code would
        return PreTrainedTokenizerFast.from_pretrained(path)
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path, config)
    raise ConfigError(f"{path}: its tokenizer is code ({code}), which is not run; {_ADVICE}")


_ADVICE = (
    "where you trust it, write a tokenizer.json once: AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True) and its "
    "converted fast tokenizer's save_pretrained"
)


def _from_sentencepiece(path: Path, config: dict[str, Any]) -> Any:
    """The tokenizer of a `tokenizer.model` whose class is code in the folder (InternLM3), if it can be shown to be the same.

    Such classes cut a text at special tokens and give sentencepiece each piece by itself; where the model puts a space before
    a text, it does so before each piece. `ConfigError` where ids are not sentencepiece's, or special tokens not the config's.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingDependency(f"{path}: a sentencepiece tokenizer; pip install sentencepiece protobuf") from error
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    prefixed = model.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = LlamaTokenizer.from_pretrained(path, add_prefix_space=prefixed)
    backend = tokenizer.backend_tokenizer
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    stated = {one["content"]: int(number) for number, one in (config.get("added_tokens_decoder") or {}).items()}
    wrong = [token for token in stated if added.get(token) != stated[token]]
    wrong += [
        text for text in _probes(list(added)) if tokenizer.encode(text, add_special_tokens=False) != _ids(model, added, text)
    ]
    if wrong:
        name = config.get("tokenizer_class")
        raise ConfigError(
            f"{path}: {name} is code, which is not run, and tokenizer.model alone gives other ids for {wrong[0]!r}; {_ADVICE}"
        )
    return tokenizer


def _probes(specials: list[str]) -> list[str]:
    between = ["".join(part) for part in zip(specials, _PROBES * 2, strict=False)]
    return [*_PROBES, *between, *(text + text for text in between), "".join(specials)]


def _ids(model: Any, added: dict[str, int], text: str) -> list[int]:
    """What sentencepiece gives for what lies between the special tokens."""
    cut = "(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")" if added else r"\Z(?!)"
    return [
        number for part in re.split(cut, text) if part for number in ([added[part]] if part in added else model.encode(part))
    ]
