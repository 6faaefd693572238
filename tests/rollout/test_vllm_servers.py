"""Two real vLLM servers behind a token, started once: what they sample, who may enter, and what is left when they die."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from unisd_megatron.batch import Completion
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.rollout.pool import NoServerLeft, ServerPool
from unisd_megatron.rollout.server import Server, ServerError
from unisd_megatron.weights.tiny import byte_tokenizer
from vllm_servers import Running, running

pytest.importorskip("vllm")
# The first test waits for the servers: a minute on two idle cores, several on busy ones.
pytestmark = pytest.mark.timeout(600)

TOKEN = "a-token-of-this-test"
NEVER = 299  # an end-of-sequence id that the model does not draw
WARM = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=16, eos_ids=(NEVER,))
OPINIONS = {
    "repetition_penalty": 1.9,
    "top_k": 3,
    "top_p": 0.5,
    "temperature": 0.3,
    "do_sample": True,
    "max_new_tokens": 5,
    "eos_token_id": list(range(150)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with heads of 32 channels, vLLM's least on a CPU, and with generation settings that must not act."""
    folder = tmp_path_factory.mktemp("served") / "model"
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.12 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
        model.lm_head.weight[NEVER] = 0  # below hundreds of others at every position
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(OPINIONS))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[list[Running]]:
    with running(folder, folder.parent, 2, token=TOKEN, transfer=False) as servers:
        yield servers


@pytest.fixture
def clients(pair: list[Running]) -> Iterator[list[Server]]:
    made = [one.client() for one in pair]
    yield made
    for one in made:
        one.close()


def requests(count: int) -> list[Request]:
    """Ragged prompts of any ids; every third one shares its first block with the others."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(0, 300, (40,), generator=generator).tolist()
    made = []
    for i in range(count):
        length = int(torch.randint(1, 60, (), generator=generator))
        prompt = torch.randint(0, 300, (length,), generator=generator).tolist()
        made.append(Request(f"q{i}", tuple(shared + prompt if i % 3 == 0 else prompt), sequence_seed(42, 0, i)))
    return made


@torch.no_grad()
def log_probs(model: PreTrainedModel, request: Request, completion: Completion, sampling: Sampling) -> Tensor:
    """Of the completion's tokens, under the distribution that the settings define, written down from their definitions."""
    tokens = request.prompt + completion.token_ids
    logits = model(torch.tensor([tokens])).logits[0, len(request.prompt) - 1 : -1].double()
    out = []
    for place, row in enumerate(logits):
        seen = torch.tensor(sorted(set(tokens[: len(request.prompt) + place])))
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        probs = torch.softmax(row / (sampling.temperature or 1.0), -1)
        if sampling.temperature:
            probs = torch.where(probs >= sampling.min_p * probs.max(), probs, 0)
            order = probs.argsort(descending=True)[: sampling.top_k or None]
            kept = probs[order] / probs[order].sum()
            order = order[: int((kept.cumsum(0) < sampling.top_p).sum()) + 1]
            probs = torch.zeros_like(probs).index_put((order,), probs[order] / probs[order].sum())
        out.append(probs[completion.token_ids[place]].log())
    return torch.stack(out)


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [one.token_ids for one in completions]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_completions_are_the_seeds_not_the_servers(clients: list[Server]) -> None:
    pools = [ServerPool(clients[:1], concurrency=3), ServerPool(clients[1:]), ServerPool(clients, concurrency=7)]
    first, second, both = (pool.generate(requests(30), WARM, clients[0].weight_version()) for pool in pools)
    assert len(set(tokens_of(first))) == 30
    assert_same(second, first)
    assert_same(both, first)
    assert_same(list(reversed(pools[2].generate(requests(30)[::-1], WARM))), first)


@pytest.mark.parametrize(
    "sampling",
    [
        WARM,
        Sampling(0.7, 0.9, 0, 16, (NEVER,)),
        Sampling(1.2, 0.9, 40, 16, (NEVER,), min_p=0.02, repetition_penalty=1.3),
        Sampling(0.0, 0.9, 5, 16, (NEVER,)),
    ],
    ids=["temperature", "top_p", "all", "greedy"],
)
def test_log_probs_are_those_of_the_sampling_distribution(
    clients: list[Server], model: PreTrainedModel, sampling: Sampling
) -> None:
    for request, completion in zip(requests(20), ServerPool(clients).generate(requests(20), sampling), strict=True):
        found = torch.tensor(completion.log_probs, dtype=torch.float64)
        assert float((found - log_probs(model, request, completion, sampling)).abs().max()) <= 1e-5
        assert (len(completion.token_ids), completion.finish_reason) == (16, "length")  # whatever the checkpoint wants


def test_only_the_given_ids_end_a_completion(clients: list[Server]) -> None:
    pool = ServerPool(clients)
    endless = pool.generate(requests(12), WARM)
    ends = (endless[0].token_ids[4], endless[1].token_ids[15])
    found = pool.generate(requests(12), Sampling(0.7, 1.0, 0, 16, ends))
    for one, whole in zip(found, endless, strict=True):
        place = next((i for i, token in enumerate(whole.token_ids) if token in ends), None)
        assert one.token_ids == whole.token_ids[: 16 if place is None else place + 1]
        assert one.finish_reason == ("length" if place is None else "stop")
        assert one.log_probs == pytest.approx(whole.log_probs[: len(one.token_ids)], abs=1e-5)
    assert {one.token_ids[-1] for one in found if one.finish_reason == "stop"} == set(ends)


def test_a_server_without_room_for_the_completion_is_told_so(clients: list[Server]) -> None:
    assert clients[0].max_model_len() == 512
    assert len(clients[0].complete(Request("fits", (5,) * 496, 1), WARM).token_ids) == 16
    with pytest.raises(ServerError, match=r"cut after 12 tokens; is the server's --max_model_len less than 500 \+ 16 tokens"):
        clients[0].complete(Request("long", (5,) * 500, 1), WARM)
    with pytest.raises(ServerError, match="/v1/completions: 400 .*512"):
        clients[0].complete(Request("longer", (5,) * 600, 1), WARM)
    assert clients[0].healthy()


def test_the_control_calls(clients: list[Server]) -> None:
    server = clients[0]
    assert server.world_size() == 1
    assert isinstance(server.weight_version(), str)
    assert server.call("check_health") == [None]
    with pytest.raises(ServerError, match="/collective_rpc: 500 .*no attribute 'no_such_method'"):
        server.call("no_such_method")
    with pytest.raises(ServerError, match="/init_weight_transfer_engine: 500 .*not configured"):
        server.init_weight_transfer({})  # this one was started without the plug-in
    server.pause()
    server.reset_prefix_cache()
    server.resume()
    assert server.complete(requests(1)[0], WARM).finish_reason == "length"


def generated_tokens(server: Server) -> float:
    """How many tokens the server has sampled since its start, by its own count."""
    said = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).text
    (count,) = (line for line in said.splitlines() if line.startswith("vllm:generation_tokens_total"))
    return float(count.split()[-1])


def test_closing_the_pool_ends_what_the_server_samples(clients: list[Server]) -> None:
    server, pool = clients[0], ServerPool(clients[:1])
    before = generated_tokens(server)
    future = pool.submit(requests(16), Sampling(0.7, 1.0, 0, 400, (NEVER,)))
    with pytest.raises(ServerError, match="requests are still running"):
        for _ in range(2000):
            server.reset_prefix_cache()
    pool.close()
    with pytest.raises(ServerError, match="closed"):
        future.result(0)
    server.pause()
    server.reset_prefix_cache()
    server.resume()
    assert 0 < generated_tokens(server) - before < 16 * 400


CONTROL = ["pause", "resume", "start_weight_update", "update_weights", "init_weight_transfer_engine", "collective_rpc"]


def test_nobody_enters_without_the_token(pair: list[Running], clients: list[Server]) -> None:
    for path in [*CONTROL, "reset_prefix_cache", "v1/completions", "sleep", "abort_requests"]:
        assert httpx.post(f"{pair[0].url}/{path}", json={}, trust_env=False).status_code == 401
    for path in ["weight_info", "metrics", "v1/models", "openapi.json", "server_info", "health/"]:
        assert httpx.get(f"{pair[0].url}/{path}", trust_env=False).status_code == 401
    stranger = Server(pair[0].url, "another-token", 30)
    assert stranger.healthy()
    with pytest.raises(ServerError, match="401, the server asks for another token"):
        stranger.pause()
    assert clients[0].complete(requests(1)[0], WARM).token_ids


class Watched(Server):
    """Says when it has answered some completions."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        super().__init__(url, token, timeout_s)
        self.answered, self.some = 0, threading.Event()

    def complete(self, request: Request, sampling: Sampling) -> Completion:
        completion = super().complete(request, sampling)
        self.answered += 1
        if self.answered == 5:
            self.some.set()
        return completion


def test_a_killed_server_loses_no_sample_and_the_last_one_stops_the_run(pair: list[Running]) -> None:
    """Last in this file: it leaves no server alive."""
    doomed, survivor = (Watched(one.url, one.token, 120) for one in pair)
    long = Sampling(0.7, 1.0, 0, 48, (NEVER,))
    version = survivor.weight_version()
    expected = ServerPool([survivor]).generate(requests(64), long, version)
    doomed.some.clear()
    pool = ServerPool([doomed, survivor], concurrency=16)
    future = pool.submit(requests(64), long, version)
    assert doomed.some.wait(120)
    pair[0].kill()
    assert_same(future.result(240), expected)
    assert pool.lost == {doomed} and pool.live == [survivor] and pool.revive() == []
    survivor.answered = 0
    survivor.some.clear()
    future = pool.submit(requests(64), long, version)
    assert survivor.some.wait(120)
    pair[1].kill()
    with pytest.raises(NoServerLeft) as caught:
        future.result(240)
    assert all(one.url in str(caught.value) for one in pair)
    pool.close()
