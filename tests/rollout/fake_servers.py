"""Rollout servers that answer as vLLM does, or fail in every way that can be had over a socket."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unisd_megatron.batch import Completion
from unisd_megatron.rollout.engine import Request, Sampling
from unisd_megatron.rollout.pool import ServerPool
from unisd_megatron.rollout.server import Server

EOS = 1
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=6, eos_ids=(EOS,))
PATIENT_S = 60.0  # for servers that answer


def requests(count: int) -> list[Request]:
    return [Request(f"q{i}", (5, i, 7), 1000 + i) for i in range(count)]


def sampled(prompt: list[int], seed: int) -> Completion:
    """What a server with the right weights answers: a function of the prompt and the seed."""
    digest = hashlib.sha256(f"{prompt}{seed}".encode()).digest()
    tokens = [2 + byte % 90 for byte in digest[: SAMPLING.max_tokens]]
    ended = digest[-1] % 2 == 1
    tokens = [*tokens[:3], EOS] if ended else tokens
    return Completion(tuple(tokens), tuple(-digest[i] / 64 for i in range(len(tokens))), "stop" if ended else "length")


EXPECTED = [sampled(list(one.prompt), one.seed) for one in requests(200)]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    one = sampled(body["prompt"], body["seed"])
    choice = {
        "index": 0,
        "text": "",
        "token_ids": list(one.token_ids),
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": list(one.log_probs)},
        "finish_reason": one.finish_reason,
    }
    return {"object": "text_completion", "choices": [choice]}


class Fake(ThreadingHTTPServer):
    """A server whose `complete(handler, body)` a test may exchange for a failure."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.complete: Callable[[Handler, dict[str, Any]], None] = lambda handler, body: handler.say(answer(body))
        self.healthy = True
        self.version: Any = "v7"
        self.asked: list[list[int]] = []  # prompts
        self.opened = threading.Event()  # ends whatever hangs
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def client(self, timeout_s: float = PATIENT_S) -> Server:
        return Server(self.url, None, timeout_s)

    def end(self) -> None:
        self.opened.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Fake
    protocol_version = "HTTP/1.0"  # one connection and one thread per call, so that none is left

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.say({}, 200 if self.server.healthy else 503)
        elif self.path == "/weight_info":
            self.say({"weight_version": self.server.version})
        else:
            self.say({"world_size": 0, "data": [{"max_model_len": None}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/v1/completions":
            self.server.asked.append(body["prompt"])
            self.server.complete(self, body)
        else:
            self.say({})

    def say(self, thing: Any, status: int = 200) -> None:
        content = thing if isinstance(thing, bytes) else json.dumps(thing).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def die(handler: Handler, body: dict[str, Any]) -> None:
    """Closes the connection in the middle of the answer, as a killed process does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choi')
    handler.close_connection = True


def hang(handler: Handler, body: dict[str, Any]) -> None:
    handler.server.opened.wait(20)
    handler.close_connection = True


def trickle(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.opened.wait(0.05):
        handler.wfile.write(b" ")


def refuse(handler: Handler, body: dict[str, Any]) -> None:
    handler.say({"error": {"message": "maximum context length is 4"}}, 400)


def pool_of(*fakes: Fake, timeout_s: float = PATIENT_S, **options: int) -> ServerPool:
    return ServerPool([fake.client(timeout_s) for fake in fakes], **{"concurrency": 8} | options)


def changed(**what: Any) -> Callable[[Handler, dict[str, Any]], None]:
    """A completion of six tokens with other fields."""

    def complete(handler: Handler, body: dict[str, Any]) -> None:
        right = {
            "token_ids": [9, 8, 7, 6, 5, 4],
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [-0.5] * 6},
            "finish_reason": "length",
        }
        handler.say({"choices": [right | what]})

    return complete
