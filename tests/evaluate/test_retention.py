"""What a model reads in a given completion, against the definitions in fp64; perplexities against hand-computed ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unisd_megatron.data import Record, Task, Verdict
from unisd_megatron.evaluate import retention
from unisd_megatron.evaluate.reading import choose
from unisd_megatron.evaluate.run import TOO_LONG, ask, each_sample
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.tiny import EOS_ID, byte_tokenizer, write_tiny

HERE = Axis()
GRID = Grid(HERE, HERE, HERE, HERE, HERE, HERE, HERE, HERE, HERE, torch.device("cpu"))
TEXTS = [
    retention.Text("short", 0, (5, 6, 7), (8,)),
    retention.Text("ended", 0, (9, 10), (11, 12, 13, EOS_ID)),
    retention.Text("long", 1, tuple(range(20, 60)), tuple(range(30, 50))),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        write_tiny("qwen2", folder / str(seed), seed=seed)
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="module")
def engines(folders: list[Path]) -> list[TransformersEngine]:
    return [TransformersEngine(folder, GRID, torch.float32) for folder in folders]


def exact(folder: Path, text: retention.Text) -> Tensor:
    """Log-probs `[T, V]` of the completion's positions in fp64, from one plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([[*text.prompt, *text.completion]])).logits[0]
    return torch.log_softmax(logits.double(), -1)[len(text.prompt) - 1 : -1]


def test_log_probs_and_jsd_are_those_of_the_definitions(folders: list[Path], engines: list[TransformersEngine]) -> None:
    base, model = folders
    found = retention.measured(TEXTS, retention.compare(engines[0], engines[1]), HERE)
    for text, one in zip(TEXTS, found, strict=True):
        p, q = exact(base, text), exact(model, text)
        ids = torch.tensor(text.completion)[:, None]
        middle = ((p.exp() + q.exp()) / 2).log()
        jsd = ((p.exp() * (p - middle)).sum() + (q.exp() * (q - middle)).sum()) / 2
        assert (one["id"], one["sample"], one["tokens"]) == (text.id, text.sample, len(text.completion))
        assert one["log_prob"] == pytest.approx(float(p.gather(1, ids).sum()), abs=1e-4)
        assert one["own_log_prob"] == pytest.approx(float(q.gather(1, ids).sum()), abs=1e-4)
        assert one["jsd"] == pytest.approx(float(jsd), abs=1e-5)
        assert one["jsd"] > 0.01 * one["tokens"]


def test_fit_reads_the_reference_under_the_model(folders: list[Path], engines: list[TransformersEngine]) -> None:
    (one,) = retention.measured(TEXTS[2:], retention.fit(engines[1]), HERE)
    expected = exact(folders[1], TEXTS[2]).gather(1, torch.tensor(TEXTS[2].completion)[:, None]).sum()
    assert one["log_prob"] == pytest.approx(float(expected), abs=1e-4)


def test_a_model_is_no_distance_from_itself(engines: list[TransformersEngine]) -> None:
    found = retention.perplexities(retention.measured(TEXTS, retention.compare(engines[0], engines[0]), HERE))
    assert found["jsd"] == 0.0
    assert found["ppl_corpus"] == found["own_ppl_corpus"]


def test_perplexities_over_the_corpus_and_over_completions() -> None:
    """One completion of 1 token at probability 1/2 and one of 3 tokens at 1/8 each: 2^(10/4), and (2 + 8) / 2."""
    rows = [
        {"tokens": 1, "log_prob": -math.log(2), "own_log_prob": 0.0, "jsd": 0.1},
        {"tokens": 3, "log_prob": -3 * math.log(8), "own_log_prob": 0.0, "jsd": 0.9},
    ]
    found = retention.perplexities(rows)
    assert found["ppl_corpus"] == pytest.approx(2**2.5, rel=1e-12)
    assert found["ppl_mean"] == pytest.approx(5.0, rel=1e-12)
    assert found["jsd"] == pytest.approx(0.25, rel=1e-12)
    assert found["jsd_mean_over_completions"] == pytest.approx(0.2, rel=1e-12)
    assert found["own_ppl_corpus"] == 1.0


def test_a_sampled_end_of_sequence_counts_and_the_released_text_has_none() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("ab", add_special_tokens=False)
    rows = [
        {"id": "q", "sample": 0, "completion": "ab", "token_ids": [*ids, EOS_ID]},
        {"id": "q", "sample": 1, "completion": "", "token_ids": []},
        {"id": "q", "sample": 2, "completion": "", "token_ids": [EOS_ID]},
    ]
    prompts = {"q": (5, 6)}
    corrected = retention.completions(rows, prompts, None)
    assert [(one.sample, one.completion) for one in corrected] == [(0, (*ids, EOS_ID)), (2, (EOS_ID,))]
    released = retention.completions(rows, prompts, tokenizer)
    assert [(one.sample, one.completion) for one in released] == [(0, tuple(ids))]


class Letters(Task):
    """Questions whose options are of different lengths; B is right."""

    name = "letters"
    hub_id = None

    def parse(self, row: object, index: int) -> Record:
        raise NotImplementedError

    def question(self, record: Record) -> str:
        return record.fields["question"]

    def reference(self, record: Record) -> str:
        return "Answer: B"

    def options(self, record: Record) -> dict[str, str]:
        return {letter: f"Answer: {letter}" + "!" * i for i, letter in enumerate("ABC")}

    def judge(self, record: Record, completion: str) -> Verdict:
        right = completion.startswith("Answer: B")
        return Verdict(right, None if right else "wrong option")


def test_the_likeliest_option_is_chosen(folders: list[Path], engines: list[TransformersEngine]) -> None:
    task, tokenizer = Letters(), byte_tokenizer()
    records = [Record(f"q{i}", {"question": f"{'Well, ' * i}which?"}) for i in range(6)]
    records.append(Record("longest", {"question": "x" * 200}))
    asked = each_sample(ask(task, records, tokenizer))
    answers = choose(asked, engines[0], tokenizer, Judge(task, records[0]), HERE, max_prompt_length=100)
    for one, found in zip(asked[:-1], answers, strict=False):
        sums = {}
        for letter, text in task.options(one.question.record).items():
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            read = exact(folders[0], retention.Text("", 0, one.question.token_ids, ids))
            sums[letter] = float(read.gather(1, torch.tensor(ids)[:, None]).sum())
        best = max(sums, key=sums.__getitem__)
        assert found.options == pytest.approx(sums, abs=1e-3)
        assert found.completion == task.options(one.question.record)[best]
        assert (found.correct, found.failure) == ((True, None) if best == "B" else (False, "wrong option"))
    assert (answers[-1].failure, answers[-1].options, answers[-1].token_ids) == (TOO_LONG, None, ())
