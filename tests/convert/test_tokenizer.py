"""Tokenizers: fast ones, sentencepiece models whose class is code that is not run, and what must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from unisd_megatron.cli import main
from unisd_megatron.convert.source import Source
from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data.tokens import encode_prompt
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import family_of
from unisd_megatron.weights.hf import read_config
from unisd_megatron.weights.tiny import write_tiny

LINES = [
    "Hello world, the quick brown fox 12345",
    "def f(x):\n    return x",
    "Größe 人人生而自由 Все люди",
    "user assistant system",
]
TEXTS = ["Hello fox", "  two spaces, tab\tand\nnewline ", "Größe und 人人; 🙂 beyond the corpus", "x" * 40]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant"
)
SIZE = 330


def settings(first_added: int) -> dict[str, Any]:
    added = {0: "<unk>", 1: "<s>", 2: "</s>", first_added: "<|im_start|>", first_added + 1: "<|im_end|>"}
    return {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm3.InternLM3Tokenizer", None]},
        "tokenizer_class": "InternLM3Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in added.items()},
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    write_tiny("internlm3", folder, seed=0)
    return folder


def foreign(tiny: Path, folder: Path, first_added: int = SIZE, **training: Any) -> Path:
    """A model folder whose tokenizer is a sentencepiece model and a class in a file that must not be run."""
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "corpus").write_text("\n".join(LINES * 50))
    how = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SIZE,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **{**how, **training},
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(first_added)))
    (folder / "tokenization_internlm3.py").write_text("raise SystemExit('this code was run')\n")
    return folder


def load(folder: Path, vocab_size: int = 384) -> Any:
    """The tokenizer beside a model with that many rows; its weights do not matter here."""
    config = read_config(folder)
    return load_tokenizer(Source(folder, family_of(config).arch({**config, "vocab_size": vocab_size}), [], None, torch.float32))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_gives_its_own_ids_without_the_class(tiny: Path, tmp_path: Path, prefix: bool) -> None:
    folder = foreign(tiny, tmp_path / "model", add_dummy_prefix=prefix)
    tokenizer, model = load(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in TEXTS:
        ids = model.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == model.decode(ids)
        turn, answer = model.encode(f"user\n{text}"), model.encode("assistant")
        # One BOS, from the template; every piece between special tokens by itself, as the class would.
        assert list(encode_prompt(tokenizer, text)) == [1, SIZE, *turn, SIZE + 1, *model.encode("\n"), SIZE, *answer]


@pytest.mark.parametrize(
    ("training", "first_added", "word"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, SIZE, "'a\\n"),
        ({}, SIZE + 20, "'<|im_start|>'"),  # ids that leave a hole, which a rebuilt tokenizer would close
    ],
    ids=["another normalizer", "a hole in the ids"],
)
def test_one_that_gives_other_ids_is_refused(
    tiny: Path, tmp_path: Path, training: dict[str, Any], first_added: int, word: str
) -> None:
    folder = foreign(tiny, tmp_path / "model", first_added, **training)
    with pytest.raises(ConfigError, match="InternLM3Tokenizer is code, which is not run") as refusal:
        load(folder)
    assert word in str(refusal.value) and "trust_remote_code=True" in str(refusal.value)


def test_code_alone_is_refused_and_a_fast_tokenizer_beside_it_is_enough(tiny: Path, tmp_path: Path) -> None:
    folder = foreign(tiny, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenization_internlm3.InternLM3Tokenizer.*not run"):
        load(folder)
    shutil.copy(tiny / "tokenizer.json", folder)
    assert load(folder).encode("ab", add_special_tokens=False) == AutoTokenizer.from_pretrained(tiny).encode("ab")


def test_the_model_may_have_more_rows_than_the_tokenizer_has_ids_and_not_fewer(tiny: Path, tmp_path: Path) -> None:
    folder = foreign(tiny, tmp_path / "model")
    assert max(load(folder, SIZE + 2).get_vocab().values()) == SIZE + 1
    with pytest.raises(ConfigError, match=f"has {SIZE + 2} entries and the model only {SIZE + 1}"):
        load(folder, SIZE + 1)


def give_rows(folder: Path, count: int) -> None:
    """Another vocabulary for the model of a folder."""
    held = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.ones(count, held[name].shape[1])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**read_config(folder), "vocab_size": count}))


def test_a_model_narrower_than_its_tokenizer_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny("llama", tmp_path / "model", seed=0)
    give_rows(tmp_path / "model", 200)
    capsys.readouterr()
    assert main(["convert", "import", "--model_name", str(tmp_path / "model"), "--output_dir", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the tokenizer has 258 entries and the model only 200" in line
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_conversion_takes_the_tokenizer_along_and_runs_none_of_it(tiny: Path, tmp_path: Path) -> None:
    folder = foreign(tiny, tmp_path / "model")
    give_rows(folder, SIZE + 2)
    assert main(["convert", "import", "--model_name", str(folder), "--output_dir", str(tmp_path / "megatron")]) == 0
    assert main(["convert", "export", "--model_name", str(tmp_path / "megatron"), "--output_dir", str(tmp_path / "back")]) == 0
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenization_internlm3.py", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert load(tmp_path / "back").encode("Hello") == load(folder).encode("Hello")
