"""Clients of rollout servers, where a server fails in every way that can be had over a socket; no vLLM.

What the real one answers is tested in test_vllm_servers.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fake_servers import (
    EOS,
    EXPECTED,
    PATIENT_S,
    SAMPLING,
    Fake,
    Handler,
    answer,
    changed,
    die,
    hang,
    pool_of,
    refuse,
    requests,
    trickle,
)
from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.rollout import servers
from unisd_megatron.rollout.engine import Request, common_prefixes
from unisd_megatron.rollout.pool import NoServerLeft, ServerPool
from unisd_megatron.rollout.server import Server, ServerError, probe
from unisd_megatron.rollout.servers import ServerEngine
from world import World


@pytest.fixture
def fakes() -> Iterator[list[Fake]]:
    threads = set(threading.enumerate())
    made = [Fake() for _ in range(3)]
    yield made
    for fake in made:
        fake.end()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, "threads outlived their pool"


@pytest.fixture
def fake(fakes: list[Fake]) -> Fake:
    return fakes[0]


GARBAGE = {
    "no JSON": lambda handler, body: handler.say(b"<html>"),
    "not UTF-8": lambda handler, body: handler.say(b'{"choices": "\xff"}'),
    "nested without end": lambda handler, body: handler.say(b"[" * 200_000),
    "a list": lambda handler, body: handler.say([1]),
    "no choices": lambda handler, body: handler.say({"choices": []}),
    "two choices": lambda handler, body: handler.say({"choices": answer(body)["choices"] * 2}),
    "choice without fields": lambda handler, body: handler.say({"choices": [{}]}),
    "another prompt": changed(prompt_token_ids=[5, 7]),
    "text for tokens": changed(token_ids="abcdef"),
    "a float among the tokens": changed(token_ids=[9, 8, 7, 6, 5, 4.0]),
    "true among the tokens": changed(token_ids=[9, 8, 7, 6, 5, True]),
    "a negative token": changed(token_ids=[9, 8, 7, 6, 5, -4]),
    "no tokens": changed(token_ids=[], logprobs={"token_logprobs": []}),
    "too many tokens": changed(token_ids=[9] * 7, logprobs={"token_logprobs": [-0.5] * 7}),
    "no log-probs": changed(logprobs=None),
    "too few log-probs": changed(logprobs={"token_logprobs": [-0.5] * 5}),
    "a log-prob that is null": changed(logprobs={"token_logprobs": [-0.5] * 5 + [None]}),
    "a log-prob that is NaN": changed(logprobs={"token_logprobs": [-0.5] * 5 + [float("nan")]}),
    "a log-prob of minus infinity": changed(logprobs={"token_logprobs": [-0.5] * 5 + [float("-inf")]}),
    "a log-prob above zero": changed(logprobs={"token_logprobs": [-0.5] * 5 + [0.01]}),
    "stop without an end": changed(finish_reason="stop"),
    "length with an end": changed(token_ids=[9, 8, 7, 6, 5, EOS]),
    "tokens behind the end": changed(token_ids=[9, 8, EOS, 6, 5, EOS], finish_reason="stop"),
    "cut too early": changed(token_ids=[9, 8], logprobs={"token_logprobs": [-0.5] * 2}),
    "aborted": changed(finish_reason="abort"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_called_garbage(fake: Fake, what: str) -> None:
    fake.complete = GARBAGE[what]
    with pytest.raises(ServerError) as caught:
        fake.client().complete(requests(1)[0], SAMPLING)
    assert str(caught.value).startswith(f"{fake.url}/v1/completions answered garbage: ")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    fake.complete = changed()  # the same answer without the fault
    assert fake.client().complete(requests(1)[0], SAMPLING).token_ids == (9, 8, 7, 6, 5, 4)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [(die, ""), (hang, "no answer within 0.4 s"), (trickle, "no answer within 0.4 s"), (refuse, "400 {")],
)
def test_a_server_that_fails_says_where_in_bounded_time(fake: Fake, behaviour: Any, words: str) -> None:
    fake.complete = behaviour
    with pytest.raises(ServerError) as caught:
        fake.client(0.4).complete(requests(1)[0], SAMPLING)
    assert str(caught.value).startswith(f"{fake.url}/v1/completions: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_control_calls_check_their_answers(fake: Fake) -> None:
    server = fake.client()
    assert server.healthy() and server.weight_version() == "v7"
    fake.healthy, fake.version = False, 7
    assert not server.healthy()
    garbled = (server.weight_version, server.world_size, server.max_model_len, server.reset_prefix_cache)
    for call in (*garbled, lambda: server.call("checksum")):
        with pytest.raises(ServerError, match="answered garbage"):
            call()
    fake.end()
    assert not server.healthy()
    with pytest.raises(ServerError, match=f"{fake.url}/weight_info: .*refused"):
        server.weight_version()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://user:secret@a:1", "http://a:b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        Server(url, None, 1.0)


def test_completions_come_in_order_from_all_servers(fakes: list[Fake]) -> None:
    pool = pool_of(*fakes)
    assert pool.generate(requests(60), SAMPLING, "v7") == EXPECTED[:60]
    assert all(len(one.asked) >= 10 for one in fakes)
    assert sum(len(one.asked) for one in fakes) == 60
    assert pool.generate([], SAMPLING, "v7") == []


def after(count: int, behaviour: Any, *, healthy: bool = False) -> Callable[[Handler, dict[str, Any]], None]:
    """Answers `count` requests, and then fails like this."""

    def complete(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.server.asked) <= count:
            handler.say(answer(body))
        else:
            handler.server.healthy = healthy
            behaviour(handler, body)

    return complete


@pytest.mark.parametrize(
    ("behaviour", "version"), [(die, None), (die, "v7"), (hang, "v7"), (GARBAGE["no JSON"], "v7")], ids=lambda x: str(x)[:14]
)
def test_a_server_lost_in_the_middle_of_a_batch_loses_no_sample(fakes: list[Fake], behaviour: Any, version: str | None) -> None:
    fakes[1].complete = after(5, behaviour)
    pool = pool_of(*fakes, timeout_s=2.0 if behaviour is hang else PATIENT_S)
    assert pool.generate(requests(60), SAMPLING, version) == EXPECTED[:60]
    assert [one.url for one in pool.lost] == [fakes[1].url]
    assert [one.url for one in pool.live] == [fakes[0].url, fakes[2].url]
    asked = len(fakes[1].asked)
    assert pool.generate(requests(60), SAMPLING, version) == EXPECTED[:60]
    assert len(fakes[1].asked) == asked  # lost until it is admitted


def test_a_healthy_server_may_fail_once_but_not_three_times_in_a_row(fakes: list[Fake]) -> None:
    def every_third(handler: Handler, body: dict[str, Any]) -> None:
        (die if len(handler.server.asked) % 3 == 0 else lambda h, b: h.say(answer(b)))(handler, body)

    fakes[0].complete = every_third
    pool = pool_of(fakes[0], fakes[1], concurrency=1)
    assert pool.generate(requests(30), SAMPLING, "v7") == EXPECTED[:30]
    assert not pool.lost and len(fakes[0].asked) > 3
    fakes[0].complete = after(0, GARBAGE["no JSON"], healthy=True)
    fakes[0].asked.clear()
    pool = pool_of(fakes[0], fakes[1], concurrency=1)
    assert pool.generate(requests(30), SAMPLING, "v7") == EXPECTED[:30]
    assert [one.url for one in pool.lost] == [fakes[0].url] and len(fakes[0].asked) == 3


def test_completions_of_other_weights_are_thrown_away(fakes: list[Fake]) -> None:
    fakes[2].version = "default"
    fakes[2].complete = changed()  # what a restarted server samples is well-formed, and wrong
    pool = pool_of(*fakes)
    assert pool.generate(requests(60), SAMPLING, "v7") == EXPECTED[:60]
    assert fakes[2].asked and [one.url for one in pool.lost] == [fakes[2].url]
    fakes[0].version = fakes[1].version = "v8"
    with pytest.raises(NoServerLeft, match=f"{fakes[2].url}: holds weights 'default' where 'v7' were sent"):
        pool.generate(requests(10), SAMPLING, "v7")


def test_a_server_comes_back_only_when_it_is_admitted(fakes: list[Fake]) -> None:
    fakes[0].complete = after(2, die)
    pool = pool_of(fakes[0], fakes[1])
    assert pool.generate(requests(20), SAMPLING, "v7") == EXPECTED[:20]
    assert pool.revive() == []  # it is not healthy yet
    fakes[0].healthy, fakes[0].complete = True, fakes[1].complete
    fakes[0].asked.clear()
    (back,) = pool.revive()
    assert back.url == fakes[0].url and back in pool.lost
    pool.generate(requests(20), SAMPLING, "v7")
    assert not fakes[0].asked  # it may hold any weights
    pool.admit(back)
    assert not pool.lost and pool.generate(requests(20), SAMPLING, "v7") == EXPECTED[:20]
    assert fakes[0].asked


@pytest.mark.parametrize("behaviour", [die, hang])
def test_with_none_left_it_stops_and_names_them_all(fakes: list[Fake], behaviour: Any) -> None:
    for one in fakes:
        one.complete = after(3, behaviour)
    pool = pool_of(*fakes, attempts=9, timeout_s=0.5 if behaviour is hang else PATIENT_S)
    with pytest.raises(NoServerLeft) as caught:
        pool.generate(requests(200), SAMPLING, "v7")
    line = str(caught.value)
    assert "\n" not in line and all(f"{one.url}/v1/completions: " in line for one in fakes)
    asked = sum(len(one.asked) for one in fakes)
    with pytest.raises(NoServerLeft):
        pool.generate(requests(1), SAMPLING, "v7")
    assert sum(len(one.asked) for one in fakes) == asked


def test_a_request_that_every_server_refuses_is_named(fakes: list[Fake]) -> None:
    def all_but_one(handler: Handler, body: dict[str, Any]) -> None:
        (refuse if body["prompt"] == [5, 11, 7] else lambda h, b: h.say(answer(b)))(handler, body)

    for one in fakes:
        one.complete = all_but_one
    pool = pool_of(*fakes)
    with pytest.raises(ServerError, match=r"request q11 failed 3 times; http.*maximum context length"):
        pool.generate(requests(40), SAMPLING, "v7")
    assert all([5, 11, 7] in one.asked for one in fakes)  # three servers, not one of them three times
    assert not pool.lost


def test_batches_of_the_background_come_one_after_the_other(fakes: list[Fake]) -> None:
    pool = pool_of(*fakes)
    futures = [pool.submit(requests(200)[start : start + 20], SAMPLING, "v7") for start in (0, 20, 40)]
    assert [future.result(20) for future in futures] == [EXPECTED[:20], EXPECTED[20:40], EXPECTED[40:60]]
    for one in fakes:
        one.complete = after(0, die)
    with pytest.raises(NoServerLeft):
        pool.submit(requests(9), SAMPLING, "v7").result(20)
    pool.close()


def test_closing_ends_a_batch_under_way(fake: Fake) -> None:
    busy = threading.Event()

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        busy.set()
        time.sleep(0.1)
        handler.say(answer(body))

    fake.complete = slow
    pool = pool_of(fake, concurrency=2)
    future = pool.submit(requests(200), SAMPLING, "v7")
    assert busy.wait(10)
    pool.close()
    with pytest.raises(ServerError, match="pool of vLLM servers is closed"):
        future.result(0)
    assert len(fake.asked) < 20
    with pytest.raises(ServerError, match="pool of vLLM servers is closed"):
        pool.generate(requests(1), SAMPLING, "v7")


def test_a_pool_needs_servers_of_different_names() -> None:
    for urls in ([], ["http://a:1", "http://b:1", "http://a:1/"]):
        with pytest.raises(ConfigError, match="name one or more, each once"):
            ServerPool([Server(url, None, 1.0) for url in urls])


def drop(handler: Handler, body: dict[str, Any]) -> None:
    """Closes the connection without an answer."""
    handler.close_connection = True


def test_requests_that_fail_side_by_side_are_one_failure(fakes: list[Fake]) -> None:
    """A hiccup of the network drops all connections at once; the server behind it is well."""
    together = threading.Barrier(6)

    def hiccup(handler: Handler, body: dict[str, Any]) -> None:
        fakes[0].complete = hiccup if len(fakes[0].asked) < 6 else lambda h, b: h.say(answer(b))
        together.wait(10)
        drop(handler, body)

    fakes[0].complete = hiccup
    pool = pool_of(fakes[0], concurrency=6)
    assert pool.generate(requests(6), SAMPLING, "v7") == EXPECTED[:6]
    assert not pool.lost and len(fakes[0].asked) == 12


def test_losses_and_returns_are_told_once(fakes: list[Fake]) -> None:
    told: list[str] = []
    pool = ServerPool([one.client() for one in fakes[:2]], tell=told.append)
    away, other = pool.live
    pool.lose(other, "holds no weights of this run yet", tell=False)
    pool.admit(other)
    assert told == []  # as every server begins
    fakes[0].complete = after(2, die)
    pool.generate(requests(20), SAMPLING, "v7")
    assert len(told) == 1 and told[0].startswith(f"a vLLM server gets no prompts: {fakes[0].url}/v1/completions: ")
    pool.lose(away, "still away")
    pool.lose(away, "still away")
    pool.admit(away)
    assert told[1:] == ["a vLLM server gets no prompts: still away", f"{fakes[0].url} has the current weights and gets prompts"]


def test_a_cache_is_reset_again_until_it_is(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([{"success": False}, {"success": False}, {"success": True}])
    monkeypatch.setattr(Handler, "do_POST", lambda handler: handler.say(next(said)))
    fake.client().reset_prefix_cache(patience_s=10)
    monkeypatch.setattr(Handler, "do_POST", lambda handler: handler.say({"success": False}))
    with pytest.raises(ServerError, match="the cache was not reset"):
        fake.client().reset_prefix_cache(patience_s=0.3)


def cached(count: Any) -> Callable[[Handler, dict[str, Any]], None]:
    """An answer by a server whose cache had so many of the prompt's tokens."""
    usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": count}}
    return lambda handler, body: handler.say(answer(body) | {"usage": usage})


def test_a_probe_sees_a_cache_that_was_kept(fake: Fake) -> None:
    (one,) = requests(1)
    fake.complete = cached(2)
    assert probe(fake.client(), one, SAMPLING, most=2) == EXPECTED[0]  # another probe's
    with pytest.raises(CheckFailed, match=f"{fake.url} had 2 tokens of a prompt in its cache right after"):
        probe(fake.client(), one, SAMPLING, most=1)
    fake.complete = lambda handler, body: handler.say(answer(body))
    with pytest.raises(ServerError, match="does not say what of a prompt was cached"):
        probe(fake.client(), one, SAMPLING, most=1)


def test_a_dropped_connection_is_no_reason_to_lose_a_server(fake: Fake) -> None:
    def once(handler: Handler, body: dict[str, Any]) -> None:
        (drop if len(handler.server.asked) == 1 else cached(3))(handler, body)

    fake.complete = once  # what the first attempt left in the cache is not held against the second
    assert probe(fake.client(), requests(1)[0], SAMPLING, most=0) == EXPECTED[0]
    fake.complete, fake.healthy = drop, False
    fake.asked.clear()
    with pytest.raises(ServerError):
        probe(fake.client(), requests(1)[0], SAMPLING, most=0)
    assert len(fake.asked) == 1
    fake.healthy = True
    with pytest.raises(ServerError):
        probe(fake.client(), requests(1)[0], SAMPLING, most=0)
    assert len(fake.asked) == 4


def test_what_prompts_share_may_be_cached() -> None:
    prompts = [(5, 6, 7, 8), (5, 6, 9), (1,), (5, 6, 7, 8)]
    assert common_prefixes([Request("q", one, 0) for one in prompts]) == [4, 2, 0, 4]
    assert common_prefixes([Request("q", (1, 2), 0)]) == [0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_is_a_wrong_request_not_a_lost_server(
    fakes: list[Fake], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.say({}, status))
    one = Axis()
    grid = Grid(one, one, one, one, one, one, one, one, one, torch.device("cpu"), False)
    with pytest.raises(ConfigError, match=f"{status}, the server asks for another token; set UNISD_SERVER_TOKEN"):
        ServerEngine([fakes[0].url], grid, timeout_s=5, max_model_len=9)


def answers_slowly(rank: int, group: Any, url: str) -> tuple[Any, int]:
    """What a rank hears from rank 0, and how many heartbeats came before it."""
    heard: list[Any] = []
    true, servers.HEARTBEAT_S = servers.HEARTBEAT_S, 0.05
    try:
        with start.world(platforms.choose(), Layout(), 1) as grid:
            engine = ServerEngine([url], grid, timeout_s=5, max_model_len=9)
            broadcast = servers.broadcast_json
            servers.broadcast_json = lambda *given: heard.append(broadcast(*given)) or heard[-1]  # type: ignore[func-returns-value]
            try:
                said = engine._on_driver(lambda pool: time.sleep(1) or 7)
            finally:
                servers.broadcast_json = broadcast
                engine.close()
    finally:
        servers.HEARTBEAT_S = true
    return said, heard.count(None)


def test_ranks_that_wait_for_servers_hear_that_the_driver_lives(world: World, fake: Fake) -> None:
    """They would give up after their process group's timeout, with the servers still at work."""
    for said, beats in world.run(2, answers_slowly, fake.url):
        assert said == 7 and beats >= 5
