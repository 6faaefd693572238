"""vLLM servers as the rollout engine: rank 0 talks to them over HTTP, each pipeline stage sends its own weights to them.

For every server and stage there is a `Link` between the stage's sender (its first rank of replica 0) and the server's workers.
Rank 0 drives: it announces a bucket to all servers, the stage that holds it sends it, and who did not take it is lost until it
comes back and has been given everything. Nobody gets a prompt before it holds the current weights.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from unisd_megatron.batch import Completion
from unisd_megatron.errors import CheckFailed, ConfigError, UnisdError
from unisd_megatron.exchange import all_gather_json, broadcast_json
from unisd_megatron.grid import Grid
from unisd_megatron.rollout.engine import Request, Sampling, Weights, common_prefixes
from unisd_megatron.rollout.guard import server_token
from unisd_megatron.rollout.link import Link, address_towards, checksum
from unisd_megatron.rollout.pool import NoServerLeft, ServerPool
from unisd_megatron.rollout.server import Server, ServerError, WrongToken, probe

REQUESTS_PER_SERVER = 128  # under way at once; vLLM batches them
RESET_PATIENCE_S = 10.0
HEARTBEAT_S = 60.0  # the other ranks would not wait for rank 0 longer than their process group's timeout


class ServerEngine:
    """Args: urls: of the servers, all with the run's model; timeout_s: until a silent server counts as lost; max_model_len:
    the longest prompt and completion together, tokens. Every method is collective over the world.
    """

    def __init__(self, urls: Sequence[str], grid: Grid, *, timeout_s: float, max_model_len: int) -> None:
        self._grid, self._timeout_s, self._version, self._label = grid, timeout_s, 0, ""
        self._drives = grid.world.rank == 0
        self._brings = grid.expert_data.rank == 0  # replica 0, and the ranks with the experts that it lacks
        self._sends = grid.data_context.rank == 0 and grid.tensor.rank == 0
        self._links: dict[str, Link] = {}  # by URL, on senders
        self._pending: list[tuple[int, Future[list[Completion]]]] = []  # on rank 0, with the version that samples it
        self._run = secrets.token_hex(4)  # so that a server which still holds another run's weights is not taken for ours
        self.notes = ["the ports that weights go through ask for nothing: private network only"]  # for the user, on rank 0
        self.tell: Callable[[str], None] = self.notes.append  # hears of servers that are lost and come back, on rank 0
        self._generation = 0  # counts syncs in which a server joined
        self._joined: dict[str, int] = {}
        self._members: list[str] = []
        self._pool = self._open_pool(urls) if self._drives else None
        self._on_driver(lambda pool: self._greet(pool, max_model_len))

    def _open_pool(self, urls: Sequence[str]) -> ServerPool:
        servers = [Server(url, server_token(), self._timeout_s) for url in urls]
        return ServerPool(servers, concurrency=REQUESTS_PER_SERVER * len(servers), tell=lambda line: self.tell(line))

    def _greet(self, pool: ServerPool, max_model_len: int) -> None:
        """Who is there, and lets us in: one that asks for another token is a mistake, one that is away may come."""
        for server in pool.live:
            try:
                server.weight_version()
            except WrongToken as error:
                raise ConfigError(str(error)) from error
            except ServerError as error:
                pool.lose(server, str(error))
            else:
                pool.lose(server, f"{server.url}: holds no weights of this run yet", tell=False)
            stranger = Server(server.url, None, self._timeout_s)
            with contextlib.suppress(ServerError):
                stranger.weight_version()
                self.notes.append(f"{server.url} asks for no token: whoever reaches it can exchange its weights")
            stranger.close()
        self._check_room(pool, max_model_len)

    def _check_room(self, pool: ServerPool, needed: int) -> None:
        """vLLM would cut completions that do not fit, without a word."""
        for server in pool.revive():
            with contextlib.suppress(ServerError):
                if (room := server.max_model_len()) < needed:
                    raise NoServerLeft(
                        f"{server.url} takes {room} tokens and this run has up to {needed}; raise --max_model_len"
                    )

    def _name(self) -> str:
        """Of the weights that were sent last, as servers report them."""
        return f"{self._run}-{self._version}{self._label}"

    def refresh(self, weights: Weights, step: int) -> None:
        """See `RolloutEngine.refresh`. Lost servers that answer again are taken back in."""

        def await_pending(pool: ServerPool) -> None:
            wait([future for _, future in self._pending])  # what is being sampled keeps its weights

        self._on_driver(await_pending)
        self._version, self._label = step, weights.label
        if self._brings:
            self._send(weights)
        self._members = self._on_driver(self._finish)

    def _send(self, weights: Weights) -> None:
        """The ranks that bring the buckets together; of them, the senders carry them."""
        urls: list[str] = self._meet() if self._sends else []
        if self._sends:
            failed = self._together(urls, _start_anew, lambda url: None)
            urls = [url for url in urls if url not in failed]
        for number in range(len(weights)):
            flat = weights.flat(number)  # a collective of the stage's ranks that bring it
            if self._sends:
                urls = self._carry(weights, number, flat, urls)

    def _meet(self) -> list[str]:
        """The servers that take part in this sync, links to all of them open. Collective over the senders."""
        axis = self._grid.pipeline
        plan: list[tuple[str, int]] = []
        if self._pool is not None:
            known = [server for server in self._pool.live if server.url in self._links]
            plan = [(server.url, 0) for server in known]
            for server in self._pool.revive():
                try:
                    plan.append((server.url, server.world_size()))
                except ServerError as error:
                    self._lose({server.url: str(error)})
        plan = [(url, workers) for url, workers in broadcast_json(plan, 0, axis)]
        known_urls = {url for url, workers in plan if not workers}
        for url in self._links.keys() - known_urls:
            self._links.pop(url).close()
        ports, unreachable = {}, {}
        for url, workers in plan:
            if not workers:
                continue
            try:
                address = address_towards(url)
                self._links[url] = Link(address, 0, 0, 1 + workers, self._backend, self._timeout_s)
                ports[url] = [address, self._links[url].port]
            except (OSError, RuntimeError) as error:
                unreachable[url] = f"{url}: no address of ours to send weights from ({error})"
        senders = all_gather_json(ports, axis)
        for faults in all_gather_json(unreachable, axis):
            self._lose(faults)
            plan = [(url, workers) for url, workers in plan if url not in faults]
        joining = [url for url, workers in plan if workers]
        self._generation += bool(joining)
        self._joined |= dict.fromkeys(joining, self._generation)
        failed = self._together(
            joining,
            lambda server: server.init_weight_transfer(
                {
                    "senders": [one[server.url] for one in senders],
                    "backend": self._backend,
                    "timeout_s": self._timeout_s,
                }
            ),
            lambda url: self._links[url].open(),
        )
        return [url for url, _ in plan if url not in failed]

    @property
    def _backend(self) -> str:
        return "nccl" if self._grid.device.type == "cuda" else "gloo"

    def _carry(self, weights: Weights, number: int, flat: Tensor | None, urls: list[str]) -> list[str]:
        """One bucket to the servers; those that took it. Collective over the senders."""
        names, shapes, dtype = weights.contents(number)
        sums: list[int] = []
        if flat is not None:
            parts = flat.split([_count(shape) for shape in shapes])
            sums = [checksum(part) for part in parts]
        stage = weights.stage(number)
        sums = broadcast_json(sums, stage, self._grid.pipeline)
        update = {"names": names, "shapes": shapes, "dtype": dtype, "checksums": sums, "source": stage}
        update["last"] = number == len(weights) - 1
        failed = self._together(
            urls,
            lambda server: server.update_weights(update),
            lambda url: self._links[url].carry(flat) if flat is not None else None,
        )
        return [url for url in urls if url not in failed]

    def _together(self, urls: Sequence[str], ask: Callable[[Server], None], do: Callable[[str], None]) -> set[str]:
        """Rank 0 asks every server while each sender does its part; those with which anything failed, which now are lost."""
        faults: dict[str, str] = {}
        done = {}
        with ThreadPoolExecutor(max(2 * len(urls), 1)) as threads:
            asked = {url: threads.submit(ask, self._server(url)) for url in urls} if self._drives else {}
            for url in urls:
                done[url] = threads.submit(do, url)  # side by side, so that one that hangs costs the others no time
            for url, future in done.items():
                try:
                    future.result()
                except (RuntimeError, OSError) as error:  # torch's: the other end is gone, or did not come
                    faults[url] = f"{url}: weights could not be sent ({str(error).splitlines()[0][:200]})"
            for url, future in asked.items():
                try:
                    future.result()
                except ServerError as error:
                    faults[url] = str(error)
        every = all_gather_json(faults, self._grid.pipeline)
        merged = {url: said for one in reversed(every) for url, said in one.items()}
        self._lose(merged)
        return set(merged)

    def _lose(self, faults: dict[str, str]) -> None:
        for url, said in faults.items():
            link = self._links.pop(url, None)
            if link is not None:
                link.close()
            if self._pool is not None:
                self._pool.lose(self._server(url), said)

    def _server(self, url: str) -> Server:
        assert self._pool is not None
        return next(server for server in [*self._pool.live, *self._pool.lost] if server.url == url)

    def _finish(self, pool: ServerPool) -> list[str]:
        """Closes the update on every server that took all of it, and puts those to work."""
        for url in list(self._links):
            server = self._server(url)
            try:
                server.finish_weight_update(self._name())
                server.reset_prefix_cache(RESET_PATIENCE_S)
                server.resume()
                pool.admit(server)
            except ServerError as error:
                self._lose({url: str(error)})
        if not pool.live:
            raise NoServerLeft("no vLLM server took the weights; " + "; ".join(pool.errors))
        return [self._member(server.url) for server in pool.live]

    def serving(self) -> int | None:
        """How many servers get prompts; known on rank 0."""
        return None if self._pool is None else len(self._pool.live)

    def members(self) -> list[str]:
        """See `RolloutEngine.members`: the servers that took the last weights; one that was away has a new name."""
        return self._members

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """See `RolloutEngine.fingerprints`: of every worker of every live server, the same on all ranks."""

        def ask(pool: ServerPool) -> dict[str, dict[str, str]]:
            return {
                self._member(url): {f"{name} (worker {i})": one for i, said in enumerate(workers) for name, one in said.items()}
                for url, workers in self._call_all(pool, "unisd_fingerprints").items()
            }

        return self._on_driver(ask)

    def parts(self, wanted: dict[str, list[int]]) -> dict[str, list[tuple[str, int]]]:
        """See `RolloutEngine.parts`."""

        def ask(pool: ServerPool) -> dict[str, list[tuple[str, int]]]:
            said = self._call_all(pool, "unisd_parts", wanted)
            return {url: [(name, one) for worker in workers for name, one in worker.items()] for url, workers in said.items()}

        return self._on_driver(ask)

    def _call_all(self, pool: ServerPool, method: str, *args: Any) -> dict[str, list[dict[str, Any]]]:
        """What the workers of each live server answer, by URL; a server that does not is lost."""
        found: dict[str, list[dict[str, Any]]] = {}
        for server in pool.live:
            try:
                said = server.call(method, *args)
                if not all(isinstance(worker, dict) for worker in said):
                    raise ServerError(f"{server.url}/collective_rpc answered garbage: {method} is {str(said)[:200]}")
                found[server.url] = said
            except ServerError as error:
                self._lose({server.url: str(error)})
        return found

    def _member(self, url: str) -> str:
        return f"{url} #{self._joined[url]}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine.generate`."""
        return self._completions(lambda pool: (self._version, pool.generate(requests, sampling, self._name())))

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See `RolloutEngine.probe`."""
        possible = common_prefixes(requests)

        def ask(pool: ServerPool) -> list[list[Any]]:
            said = []
            for server in pool.live:
                try:
                    with ThreadPoolExecutor(len(requests)) as threads:
                        answers = threads.map(lambda one, most: probe(server, one, sampling, most), requests, possible)  # noqa: B023
                        said.append([_plain(answer) for answer in answers])
                except ServerError as error:
                    self._lose({server.url: str(error)})
            if not said:
                raise NoServerLeft("no vLLM server is left; " + "; ".join(pool.errors))
            return said

        return [[_completion(plain, self._version) for plain in one] for one in self._on_driver(ask)]

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Asks for completions that `collect` returns, batch by batch in this order, while the caller does something else."""
        if self._pool is not None:
            self._pending.append((self._version, self._pool.submit(requests, sampling, self._name())))

    def collect(self) -> list[Completion]:
        """The completions of the oldest `submit`; waits for them."""

        def take(pool: ServerPool) -> tuple[int, list[Completion]]:
            version, future = self._pending.pop(0)
            return version, future.result()

        return self._completions(take)

    def _completions(self, ask: Callable[[ServerPool], tuple[int, list[Completion]]]) -> list[Completion]:
        def plainly(pool: ServerPool) -> list[Any]:
            version, said = ask(pool)
            return [version, [_plain(one) for one in said]]

        version, plain = self._on_driver(plainly)
        return [_completion(one, version) for one in plain]

    def _on_driver(self, ask: Callable[[ServerPool], Any]) -> Any:
        """What rank 0 says, on every rank; `CheckFailed` (or `ConfigError`) on all of them if it fails there.

        The others hear from it every minute: they would take a silent rank for dead, however well its servers work.
        """
        if self._pool is None:
            while (said := broadcast_json(None, 0, self._grid.world)) is None:
                continue
        else:
            with ThreadPoolExecutor(1) as thread:
                future = thread.submit(_answer, ask, self._pool)
                while not wait([future], HEARTBEAT_S).done:
                    broadcast_json(None, 0, self._grid.world)
                said = broadcast_json(future.result(), 0, self._grid.world)
        if "request" in said:
            raise ConfigError(said["request"])
        if "error" in said:
            raise CheckFailed(f"{said['error']}; the last checkpoint is untouched")
        return said["value"]

    def rest(self) -> None:
        """Servers have memory of their own."""

    def close(self) -> None:
        """Ends what is under way; the servers go on."""
        if self._pool is not None:
            self._pool.close()
            for server in [*self._pool.live, *self._pool.lost]:
                server.close()
        for link in self._links.values():
            link.close()
        self._links = {}


def _start_anew(server: Server) -> None:
    """Opens an update. What was broken off does not bar it: an update (of a trainer that was killed, of a sender that failed),
    requests that nobody waits for any more.
    """
    server.pause(abort=True)
    server.call("unisd_abandon")
    server.start_weight_update()


def _answer(ask: Callable[[ServerPool], Any], pool: ServerPool) -> dict[str, Any]:
    try:
        return {"value": ask(pool)}
    except ConfigError as error:
        return {"request": str(error)}
    except UnisdError as error:
        return {"error": str(error)}


def _plain(one: Completion) -> list[Any]:
    return [list(one.token_ids), list(one.log_probs), one.finish_reason]


def _completion(plain: Sequence[Any], version: int) -> Completion:
    ids, log_probs, reason = plain
    return Completion(tuple(ids), tuple(log_probs), reason, version)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
