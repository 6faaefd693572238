"""Completions under a JSON schema: every one that ends is JSON of it, drawn as the model would among what may follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unisd_megatron.grid import Axis, Grid
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.tiny import EOS_ID, PAD_ID, byte_tokenizer, write_tiny

pytest.importorskip("xgrammar")
ALONE = Grid(*[Axis()] * 9, torch.device("cpu"))
TEXT = {"type": "string", "minLength": 1, "maxLength": 12}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"reasoning": TEXT, "answer": TEXT},
        "required": ["reasoning", "answer"],
        "additionalProperties": False,
    }
)
STRUCTURED = Sampling(0.7, 1.0, 0, 200, (EOS_ID,), json_schema=SCHEMA)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """A random model whose vocabulary is wider than its byte tokenizer."""
    folder: Path = tmp_path_factory.mktemp("structured") / "tiny"
    write_tiny("qwen2", folder, seed=3)
    return TransformersEngine(folder, ALONE, torch.float32, batch_size=5, tokenizer=byte_tokenizer())


def requests(count: int) -> list[Request]:
    tokenizer = byte_tokenizer()
    return [Request(f"q{i}", tuple(tokenizer.encode("Q" * (i % 7 + 1))), sequence_seed(1, 0, i)) for i in range(count)]


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_even_a_random_model_writes_json_of_the_schema_and_ends(engine: TransformersEngine, temperature: float) -> None:
    tokenizer, sampling = byte_tokenizer(), Sampling(temperature, 1.0, 0, 200, (EOS_ID,), json_schema=SCHEMA)
    for one in engine.generate(requests(20), sampling):
        assert one.finish_reason == "stop" and one.token_ids[-1] == EOS_ID
        assert PAD_ID not in one.token_ids and max(one.token_ids) < len(tokenizer)
        found = json.loads(tokenizer.decode(one.token_ids[:-1]), strict=False)
        assert found.keys() == {"reasoning", "answer"}
        assert all(1 <= len(text) <= 12 for text in found.values())


def test_the_completion_of_a_request_is_its_own(engine: TransformersEngine) -> None:
    """Not of the batch: rows end at different places and each has a state of its own."""
    together = engine.generate(requests(12), STRUCTURED)
    alone = [engine.generate([one], STRUCTURED)[0] for one in requests(12)]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in together}) == 12


def test_log_probs_are_those_among_the_tokens_that_may_follow(engine: TransformersEngine) -> None:
    """Nothing but the brace may open the object, nothing but the end may follow it: both are certain."""
    for one in engine.generate(requests(6), STRUCTURED):
        assert one.log_probs[0] == one.log_probs[-1] == 0.0
        assert min(one.log_probs) < -1


def test_the_next_batch_may_be_free_again(engine: TransformersEngine) -> None:
    free = Sampling(0.7, 1.0, 0, 20, (EOS_ID,))
    before = engine.generate(requests(3), free)
    engine.generate(requests(3), STRUCTURED)
    assert [one.token_ids for one in engine.generate(requests(3), free)] == [one.token_ids for one in before]
    other = Sampling(30.0, 1.0, 0, 20, (EOS_ID,), json_schema='{"enum": ["red", "green"]}')
    said = {byte_tokenizer().decode(one.token_ids[:-1]) for one in engine.generate(requests(12), other)}
    assert said == {'"red"', '"green"'}


def test_a_completion_that_is_too_long_is_cut(engine: TransformersEngine) -> None:
    (one,) = engine.generate(requests(1), Sampling(0.7, 1.0, 0, 9, (EOS_ID,), json_schema=SCHEMA))
    assert (one.finish_reason, len(one.token_ids)) == ("length", 9)
