"""Text becomes ids once: special tokens exactly once, nothing cut, and what is dropped is counted."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, Qwen2Tokenizer

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, auxiliary
from unisd_megatron.data.example import Example
from unisd_megatron.data.tokens import encode_examples, encode_prompt
from unisd_megatron.errors import DataError
from unisd_megatron.families import FAMILIES
from unisd_megatron.weights.tiny import EOS, EOS_ID, PAD, PAD_ID, byte_tokenizer, write_tiny

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    "Q:347+285\nA:",
    " leading, trailing \n\n",
    "it 's n't , clean . up ? no !",
    "tabs\tand\r\nreturns \x00 \x1f \x7f",
    "naïve café, Größe, 数学, חשבון, e\u0301, 👩‍🔬",
    f"the model's own {EOS} and {PAD} in a question",
    "",
]


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer as a user meets it: from the folder of a tiny model."""
    folder = tmp_path_factory.mktemp("tokens") / request.param
    write_tiny(request.param, folder, seed=0)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def greeting(tmp_path: Path) -> Callable[..., Any]:
    """A tokenizer that puts a special token (id 0) before whatever it encodes, as Llama's do; saved and loaded."""

    def make(template: str | None, **options: Any) -> Any:
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = PAD
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{PAD} $A", special_tokens=[(PAD, PAD_ID)])
        if options:
            tokenizer.backend_tokenizer.enable_truncation(**options)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    return make


def plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def arbitrary(seed: int) -> str:
    rng = random.Random(seed)
    planes = [(1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 200)))


@pytest.mark.parametrize("number", range(len(TEXTS) + 20))
def test_any_text_comes_back_unchanged(written: Any, number: int) -> None:
    text = [*TEXTS, *map(arbitrary, range(20))][number]
    if isinstance(written, Qwen2Tokenizer):  # reads text in Unicode's composed form, whatever it is loaded from
        text = unicodedata.normalize("NFC", text)
    ids = encode_prompt(written, text)
    assert written.decode(ids, skip_special_tokens=False) == text
    assert len(ids) == len(text.replace(EOS, "x").replace(PAD, "x").encode())


def test_the_written_tokenizer_fits_its_model(written: Any) -> None:
    assert len(written) == 258
    assert (written.pad_token_id, written.eos_token_id) == (PAD_ID, EOS_ID)
    assert sorted(written.get_vocab().values()) == list(range(258))


def test_without_a_template_the_text_is_read_as_it_is(written: Any, greeting: Callable[..., Any]) -> None:
    assert encode_prompt(written, "1+1?") == plain(written, "1+1?")
    tokenizer = greeting(None)
    assert encode_prompt(tokenizer, "1+1?") == (PAD_ID, *plain(tokenizer, "1+1?"))


def test_a_template_adds_special_tokens_exactly_once(greeting: Callable[..., Any]) -> None:
    tokenizer = greeting(TEMPLATE)
    expected = [PAD_ID, *plain(tokenizer, "<user>1+1?"), EOS_ID, *plain(tokenizer, "<assistant>")]
    assert list(encode_prompt(tokenizer, "1+1?")) == expected
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(rendered)[:2] == [PAD_ID, PAD_ID]  # the obvious way doubles it


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_nothing_is_cut_whatever_the_tokenizer_says(greeting: Callable[..., Any], template: str | None) -> None:
    tokenizer = greeting(template, max_length=8)
    assert tokenizer.backend_tokenizer.truncation is not None
    tokenizer.model_max_length = 8
    text = "0123456789" * 30
    ids = encode_prompt(tokenizer, text)
    assert text in tokenizer.decode(ids) and len(ids) > 300


def example(name: str, **lengths: int) -> Example:
    """An example whose views have that many characters."""
    texts = {view: (view + "." * size)[:size] for view, size in lengths.items()}
    return Example(
        id=name,
        prompt=texts["prompt"],
        teacher=texts["teacher"],
        auxiliary=(texts["first"], texts["second"]) if "first" in texts else (),
        negative=texts.get("negative"),
    )


LONGEST = {"prompt": 12, "teacher": 20, "first": 17, "second": 20, "negative": 19}


def test_every_view_is_encoded_under_its_name(written: Any) -> None:
    full, short = example("full", **LONGEST), example("short", prompt=5, teacher=6)
    (one, other), dropped = encode_examples(written, [full, short], 20)
    assert (one.id, other.id, dropped) == ("full", "short", 0)
    texts = {STUDENT: full.prompt, TEACHER: full.teacher, NEGATIVE: full.negative}
    texts |= {auxiliary(k): text for k, text in enumerate(full.auxiliary)}
    assert {name: written.decode(ids) for name, ids in one.views.items()} == texts
    assert other.views.keys() == {STUDENT, TEACHER}


@pytest.mark.parametrize("view", LONGEST)
def test_an_example_with_any_view_too_long_is_dropped_and_counted(written: Any, view: str) -> None:
    kept, dropped = encode_examples(
        written, [example("a", **LONGEST), example("b", **LONGEST | {view: 21}), example("c", **LONGEST)], 20
    )
    assert ([one.id for one in kept], dropped) == (["a", "c"], 1)


def test_nothing_left_is_an_error_that_names_the_longest(written: Any) -> None:
    examples = [example("a", **LONGEST), example("b", **LONGEST | {"second": 33})]
    with pytest.raises(DataError, match=r"all 2 examples .*--max_prompt_length 19 .*longest has 33 tokens"):
        encode_examples(written, examples, 19)
