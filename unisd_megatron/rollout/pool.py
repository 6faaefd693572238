"""Several vLLM servers as one: completions in the order of the requests, whatever happens to the servers meanwhile.

A completion is decided by its prompt, its seed and the weights, not by the server that samples it; so a request may be
posted again elsewhere. A server that fails is lost until the caller has given it the current weights and admits it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from unisd_megatron.batch import Completion
from unisd_megatron.errors import ConfigError, UnisdError
from unisd_megatron.rollout.engine import Request, Sampling
from unisd_megatron.rollout.server import Server, ServerError

FAILURES_IN_A_ROW = 3  # of a server that still calls itself healthy, before it is lost


class NoServerLeft(UnisdError):
    """Every server is lost; the message has the last error of each."""


@dataclass
class _State:
    """What the pool knows of a server. The pool's lock guards it; `checking` is held while its health is asked for."""

    outstanding: int = 0
    failures: int = 0  # in a row; requests that failed side by side are one
    counted_at: float = 0.0  # when the last failure was
    last_error: str | None = None
    lost: bool = False
    told: bool = True  # whether anybody heard that it is lost
    checking: threading.Lock = field(default_factory=threading.Lock)


class ServerPool:
    """Spreads requests over servers.

    Args: servers: with the same model; attempts: posts of one request in total; concurrency: requests under way at once, over
    all servers (vLLM batches those it has); tell: hears, from any thread, of every server that is lost and that comes back.
    `ConfigError` for no servers or one named twice.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        attempts: int = 3,
        concurrency: int = 64,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        urls = [server.url for server in servers]
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError(f"vLLM servers {urls}: name one or more, each once")
        self._states = {server: _State() for server in servers}
        self._attempts, self._concurrency, self._tell = attempts, concurrency, tell
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._background = ThreadPoolExecutor(1, "rollout")

    @property
    def live(self) -> list[Server]:
        """The servers that get requests."""
        with self._lock:
            return [server for server, state in self._states.items() if not state.lost]

    @property
    def lost(self) -> set[Server]:
        """The servers that failed and were not admitted since."""
        with self._lock:
            return {server for server, state in self._states.items() if state.lost}

    @property
    def errors(self) -> list[str]:
        """The last error of each lost server."""
        with self._lock:
            return [str(state.last_error) for state in self._states.values() if state.lost]

    def revive(self) -> list[Server]:
        """The lost servers that answer again. They may hold any weights: update them, then `admit` them."""
        lost = self.lost
        return [server for server in self._states if server in lost and server.healthy()]

    def admit(self, server: Server) -> None:
        """Puts a server back to work; it holds the current weights."""
        with self._lock:
            state = self._states[server]
            back, state.lost, state.failures, state.last_error = state.lost and state.told, False, 0, None
        if back:
            self._tell(f"{server.url} has the current weights and gets prompts")

    def lose(self, server: Server, error: str, *, tell: bool = True) -> None:
        """Gives a server no more requests; `error` says why and names it."""
        with self._lock:
            state = self._states[server]
            news = tell and (state.lost, state.last_error) != (True, error)
            state.lost, state.last_error, state.told = True, error, tell
        if news:
            self._tell(f"a vLLM server gets no prompts: {error}")

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, expected_version: str | None = None
    ) -> list[Completion]:
        """One completion per request, in order.

        With `expected_version`, a completion counts only once its server has confirmed after it that this is the version it
        holds; what came from a server that restarted, or was lost before it could confirm, is sampled again elsewhere. None
        where the weights never change.

        Raises `NoServerLeft`, or `ServerError` for a request that failed `attempts` times; no thread of the batch is left.
        """
        kept: dict[int, Completion] = {}
        left = list(range(len(requests)))
        while left:
            found = self._sample(left, requests, sampling)
            used = {server for server, _ in found.values()}
            confirmed = used if expected_version is None else {s for s in used if self._confirms(s, expected_version)}
            kept |= {i: completion for i, (server, completion) in found.items() if server in confirmed}
            left = [i for i in left if i not in kept]  # their servers are lost now, so this ends
        return [kept[i] for i in range(len(requests))]

    def submit(
        self, requests: Sequence[Request], sampling: Sampling, expected_version: str | None = None
    ) -> Future[list[Completion]]:
        """`generate` in a thread of the pool's own, one batch after the other."""
        return self._background.submit(self.generate, list(requests), sampling, expected_version)

    def close(self) -> None:
        """Ends the batches under way and returns when no thread of the pool is left; the servers go on.

        A batch's future raises `ServerError`. A server that hangs keeps this waiting until its requests time out.
        """
        self._closed.set()
        while busy := self._busy():  # again and again: a request that was still on its way is not ended by the first call
            for server in busy:
                with contextlib.suppress(ServerError):
                    server.abort()
            time.sleep(0.05)
        self._background.shutdown(wait=True, cancel_futures=True)

    def _busy(self) -> list[Server]:
        with self._lock:
            return [server for server, state in self._states.items() if state.outstanding and not state.lost]

    def _sample(
        self, indices: Iterable[int], requests: Sequence[Request], sampling: Sampling
    ) -> dict[int, tuple[Server, Completion]]:
        """A completion of each of these requests and the server it came from."""
        stop = threading.Event()
        with ThreadPoolExecutor(self._concurrency, "completion") as executor:
            futures = {executor.submit(self._complete, requests[i], sampling, stop): i for i in indices}
            try:
                return {futures[done]: done.result() for done in as_completed(futures)}
            except BaseException:
                stop.set()
                executor.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for those under way
                raise

    def _complete(self, request: Request, sampling: Sampling, stop: threading.Event) -> tuple[Server, Completion]:
        tried: list[Server] = []
        while not stop.is_set() and not self._closed.is_set():
            server, began = self._take(tried), time.monotonic()
            try:
                completion = server.complete(request, sampling)
            except ServerError as error:
                tried.append(server)
                self._failed(server, error, began)
                if len(tried) >= self._attempts and self.live:
                    raise ServerError(f"request {request.example_id} failed {len(tried)} times; {error}") from error
            else:
                with self._lock:
                    self._states[server].failures = 0
                return server, completion
            finally:
                with self._lock:
                    self._states[server].outstanding -= 1
        raise ServerError("generation was stopped: the pool of vLLM servers is closed")

    def _take(self, tried: Sequence[Server]) -> Server:
        """The live server for a request's next attempt: not tried yet, not under suspicion, with the least to do."""
        with self._lock:
            live = [server for server, state in self._states.items() if not state.lost]
            if not live:
                said = "; ".join(str(state.last_error) for state in self._states.values())
                raise NoServerLeft(f"no vLLM server is left; {said}")

            def rank(server: Server) -> tuple[bool, bool, int]:
                state = self._states[server]
                return server in tried, state.checking.locked(), state.outstanding

            server = min(live, key=rank)
            self._states[server].outstanding += 1
            return server

    def _failed(self, server: Server, error: ServerError, began: float) -> None:
        """Counts a failed request; the server is lost if it is not healthy any more or failed too often in a row."""
        state = self._states[server]
        with self._lock:
            if began >= state.counted_at:  # else it was under way when another one failed: most likely of the same cause
                state.failures += 1
                state.counted_at = time.monotonic()
            state.last_error = str(error)
            too_often = state.failures >= FAILURES_IN_A_ROW
        # One question for all the requests that failed at once; the others wait for what it finds.
        with state.checking:
            if not state.lost and (too_often or not server.healthy()):
                self.lose(server, str(error))

    def _confirms(self, server: Server, expected: str) -> bool:
        """Whether the server still holds this version; if not it is lost."""
        if server in self.lost:
            return False
        try:
            version = server.weight_version()
        except ServerError as error:
            self.lose(server, str(error))
            return False
        if version != expected:
            self.lose(server, f"{server.url}: holds weights {version!r} where {expected!r} were sent; was it restarted?")
        return version == expected
