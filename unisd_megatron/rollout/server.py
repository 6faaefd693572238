"""One vLLM server as its client sees it: completions in token ids, and the control endpoints of a weight update.

The endpoints are those of vLLM 0.32 with `VLLM_SERVER_DEV_MODE=1` (`tools/serve_vllm.py` starts such a server). What comes
back is another program's word: every answer is checked, every call ends in bounded time, and whatever goes wrong is a
`ServerError`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import httpx

from unisd_megatron.batch import Completion
from unisd_megatron.errors import CheckFailed, ConfigError, UnisdError
from unisd_megatron.rollout.engine import Request, Sampling

HEALTH_TIMEOUT_S = 5.0
LARGEST_ANSWER = 256 << 20  # bytes; some 10 million tokens
PROBE_ATTEMPTS = 3
ROUNDING = 1e-4  # a log-prob may exceed 0 by this much


class ServerError(UnisdError):
    """A server could not be reached, refused, took too long, or answered garbage; the message begins with the URL."""


class WrongToken(ServerError):
    """The server is there and does not let us in."""


class Server:
    """A vLLM server. Safe to use from several threads; each call opens a connection of its own.

    Args: url: `http://host:port`; token: sent as `Authorization: Bearer`, None where the server asks for none; timeout_s: of
    every call as a whole, a completion and a weight update included. Proxies and credentials of the environment (`HTTP_PROXY`,
    `.netrc`) are not used. `ConfigError` for a URL that cannot be one.
    """

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"vLLM server {url!r}: not a URL ({error}); http://host:port would be one") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise ConfigError(f"vLLM server {url!r}: write http://host:port; the token comes from the environment")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            # vLLM closes a connection that was idle for a while or had an error without a word; the next call on it would fail.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
            verify=parsed.scheme == "https",  # certificates take long to load and plain HTTP has none
        )

    def __repr__(self) -> str:
        return f"Server({self.url})"

    def close(self) -> None:
        """Closes the connections; the server goes on."""
        self._client.close()

    def healthy(self) -> bool:
        """Whether the server says that its engine is alive, within 5 seconds."""
        try:
            self._exchange("GET", "/health", timeout_s=min(HEALTH_TIMEOUT_S, self.timeout_s))
        except ServerError:
            return False
        return True

    def world_size(self) -> int:
        """How many workers take part in a weight transfer (TP x PP x DP of the server)."""
        size = self._field("GET", "/get_world_size", "world_size")
        if type(size) is not int or size < 1:
            raise self._garbage("/get_world_size", f"world_size {size!r}")
        return size

    def max_model_len(self) -> int:
        """The most tokens of a prompt with its completion; vLLM cuts what is longer instead of refusing it."""
        models = self._field("GET", "/v1/models", "data")
        try:
            longest = models[0]["max_model_len"]
        except (IndexError, KeyError, TypeError) as error:
            raise self._garbage("/v1/models", _excerpt(models)) from error
        if type(longest) is not int:
            raise self._garbage("/v1/models", f"max_model_len {longest!r}")
        return longest

    def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        """Every worker joins the transfer group that `info` describes; returns when all have, so join it meanwhile."""
        self._json("POST", "/init_weight_transfer_engine", {"init_info": dict(info)})

    def start_weight_update(self) -> None:
        """Opens an update; `update_weights` may follow any number of times."""
        self._json("POST", "/start_weight_update")

    def update_weights(self, info: Mapping[str, Any]) -> None:
        """The workers receive the tensors that `info` describes; returns when they have, so send them meanwhile."""
        self._json("POST", "/update_weights", {"update_info": dict(info)})

    def finish_weight_update(self, version: str) -> None:
        """Closes the update; from here on the server reports `version`. Cached keys and values stay: reset them."""
        self._json("POST", "/finish_weight_update", {"weight_version": version})

    def weight_version(self) -> str | None:
        """The version named by the last finished update; whatever vLLM starts with before the first."""
        version = self._field("GET", "/weight_info", "weight_version")
        if version is not None and not isinstance(version, str):
            raise self._garbage("/weight_info", f"weight_version {version!r}")
        return version

    def reset_prefix_cache(self, patience_s: float = 0.0) -> None:
        """Forgets the keys and values of earlier prompts. `ServerError` if the server could not, for so long: a request was
        running, or what a finished one held is still being freed."""
        deadline = time.monotonic() + patience_s
        while self._field("POST", "/reset_prefix_cache", "success") is not True:
            if time.monotonic() >= deadline:
                raise ServerError(f"{self.url}/reset_prefix_cache: the cache was not reset; requests are still running")
            time.sleep(0.2)

    def pause(self, *, abort: bool = False) -> None:
        """Takes no more requests to work; returns when those under way are done, or have been ended. Later ones wait for
        `resume`."""
        self._json("POST", "/pause", params={"mode": "abort" if abort else "wait"})

    def resume(self) -> None:
        """Works on requests again."""
        self._json("POST", "/resume")

    def abort(self) -> None:
        """Ends every request under way, whoever sent it; takes at most 5 seconds."""
        self._exchange("POST", "/abort_requests", {}, timeout_s=min(HEALTH_TIMEOUT_S, self.timeout_s))

    def call(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every worker with JSON arguments and returns each worker's result, by rank.

        vLLM passes on objects, lists and null as they are; every other result (a number, a bool) arrives as its `str`.
        """
        body = {"method": method, "args": list(args), "timeout": self.timeout_s}
        results = self._field("POST", "/collective_rpc", "results", body)
        if not isinstance(results, list) or not results:
            raise self._garbage("/collective_rpc", f"results of {method}: {_excerpt(results)}")
        return results

    def complete(self, request: Request, sampling: Sampling) -> Completion:
        """Samples one completion. It ends at the first of `sampling.eos_ids` and at no other id, or after `max_tokens`.

        The log-probs are those of the distribution that was sampled from (after penalty, temperature, top-k, top-p and
        min-p) on a server with `--logprobs-mode processed_logprobs`; at temperature 0 those of the model.
        """
        return self._completion(request, sampling)[0]

    def complete_counting(self, request: Request, sampling: Sampling) -> tuple[Completion, int]:
        """`complete`, and how many tokens of the prompt were in the server's cache before.

        `ServerError` where the server does not say (vLLM does with `--enable-prompt-tokens-details`).
        """
        completion, answer = self._completion(request, sampling)
        usage = answer.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if type(cached) is not int:
            raise ServerError(
                f"{self.url}/v1/completions does not say what of a prompt was cached: {_excerpt(usage)}; start the server with "
                "tools/serve_vllm.py, or with --enable-prompt-tokens-details"
            )
        return completion, cached

    def _completion(self, request: Request, sampling: Sampling) -> tuple[Completion, dict[str, Any]]:
        """A completion, and the whole answer that it is from."""
        answer = self._json("POST", "/v1/completions", _body(request, sampling))
        try:
            return _completion(answer, request, sampling), answer
        except ValueError as error:
            raise self._garbage("/v1/completions", str(error)) from error

    def _garbage(self, path: str, what: str) -> ServerError:
        return ServerError(f"{self.url}{path} answered garbage: {what}")

    def _field(self, method: str, path: str, name: str, body: Mapping[str, Any] | None = None) -> Any:
        answer = self._json(method, path, body)
        if not isinstance(answer, dict) or name not in answer:
            raise self._garbage(path, f"no {name} in {_excerpt(answer)}")
        return answer[name]

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> Any:
        content = self._exchange(method, path, body, params)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._garbage(path, f"not JSON: {_excerpt(content)}") from error

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        where, limit_s = f"{self.url}{path}", timeout_s or self.timeout_s
        deadline, content = time.monotonic() + limit_s, bytearray()
        try:
            with self._client.stream(method, path, json=body, params=params, timeout=limit_s) as response:
                # httpx bounds the wait for each piece; a server that sends a byte now and then would hold us for ever.
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer does not end")
                    if len(content) > LARGEST_ANSWER:
                        raise self._garbage(path, f"more than {LARGEST_ANSWER} bytes")
        except httpx.TimeoutException as error:
            raise ServerError(f"{where}: no answer within {limit_s:g} s") from error
        except httpx.HTTPError as error:
            raise ServerError(f"{where}: {_excerpt(error) or type(error).__name__}") from error
        if response.status_code in (401, 403):
            status = response.status_code
            raise WrongToken(f"{where}: {status}, the server asks for another token; set UNISD_SERVER_TOKEN to the server's")
        if response.status_code != 200:
            raise ServerError(f"{where}: {response.status_code} {_excerpt(bytes(content))}")
        return bytes(content)


def probe(server: Server, request: Request, sampling: Sampling, most: int) -> Completion:
    """A completion by a cache that had at most so many tokens of the prompt. A dropped connection costs an attempt only.

    Raises `CheckFailed` for a cache that had more, `ServerError` when no attempt succeeds.
    """
    for attempt in range(PROBE_ATTEMPTS):
        try:
            completion, cached = server.complete_counting(request, sampling)
        except ServerError:
            if attempt + 1 == PROBE_ATTEMPTS or not server.healthy():
                raise
            time.sleep(0.5)
        else:
            if cached > most and attempt == 0:  # an earlier attempt has left its own prompt there
                raise CheckFailed(
                    f"{server.url} had {cached} tokens of a prompt in its cache right after it was told to drop it; its caches "
                    "are stale"
                )
            break
    return completion


def _body(request: Request, sampling: Sampling) -> dict[str, Any]:
    if sampling.json_schema is not None:
        raise ConfigError("structured answers come from an engine in the training processes, not from a vLLM server")
    return {
        "prompt": list(request.prompt),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": request.seed,
        # vLLM's own idea of an end (tokenizer, generation_config.json) is off; these ids alone end a completion.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.eos_ids),
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }


def _completion(answer: Any, request: Request, sampling: Sampling) -> Completion:
    """The completion in a server's answer; `ValueError` says what makes it none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"not one choice in {_excerpt(answer)}")
    choice = choices[0]
    if choice.get("prompt_token_ids") != list(request.prompt):
        raise ValueError(f"prompt_token_ids are not the prompt: {_excerpt(choice.get('prompt_token_ids'))}")
    token_ids = choice.get("token_ids")
    if not isinstance(token_ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in token_ids):
        raise ValueError(f"token_ids {_excerpt(token_ids)}")
    if not 1 <= len(token_ids) <= sampling.max_tokens:
        raise ValueError(f"{len(token_ids)} tokens where 1 to {sampling.max_tokens} were asked for")
    holder = choice.get("logprobs")
    log_probs = holder.get("token_logprobs") if isinstance(holder, dict) else None
    if not isinstance(log_probs, list) or len(log_probs) != len(token_ids):
        raise ValueError(f"log-probs of {len(token_ids)} tokens: {_excerpt(log_probs)}")
    for place, value in enumerate(log_probs):
        if type(value) not in (float, int) or not math.isfinite(value) or value > ROUNDING:
            raise ValueError(f"log-prob {_excerpt(value)} of token {place}")
    reason = _finish_reason(choice, token_ids, len(request.prompt), sampling)
    return Completion(tuple(token_ids), tuple(map(float, log_probs)), reason)


def _finish_reason(choice: Mapping[str, Any], token_ids: list[int], prompt_tokens: int, sampling: Sampling) -> str:
    reason = choice.get("finish_reason")
    ends = [place for place, token in enumerate(token_ids) if token in sampling.eos_ids]
    if reason == "stop" and ends == [len(token_ids) - 1]:
        return "stop"
    if reason == "length" and not ends and len(token_ids) == sampling.max_tokens:
        return "length"
    if reason == "length" and not ends:
        needed = f"{prompt_tokens} + {sampling.max_tokens} tokens"
        raise ValueError(f"cut after {len(token_ids)} tokens; is the server's --max_model_len less than {needed}?")
    places = f"end-of-sequence ids at {ends[:4]}" if ends else "no end-of-sequence id"
    raise ValueError(f"finish_reason {_excerpt(reason)} after {len(token_ids)} of {sampling.max_tokens} tokens, {places}")


def _excerpt(thing: Any) -> str:
    """At most 300 characters of it, on one line."""
    text = thing.decode("utf-8", "replace") if isinstance(thing, bytes) else str(thing)
    line = " ".join(text[:2000].split())
    return line if len(line) <= 300 else line[:297] + "..."
