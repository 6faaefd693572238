"""A token in front of a vLLM server.

vLLM's own `--api-key` guards `/v1` only; who may reach the port can then still pause the engine and exchange its weights.
Loaded by vLLM (`--middleware unisd_megatron.rollout.guard.RequireToken`), so nothing heavy is imported here.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from unisd_megatron.errors import ConfigError

TOKEN_VARIABLE = "UNISD_SERVER_TOKEN"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def server_token() -> str | None:
    """The token that servers ask for and clients send, None if the environment has none; `ConfigError` if it cannot be one."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return None
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(f"{TOKEN_VARIABLE}: a token is printable ASCII without spaces, as `openssl rand -hex 32` prints one")
    return token


class RequireToken:
    """ASGI middleware: answers 401 to everything but `GET /health` unless `Authorization: Bearer` carries the token.

    `ConfigError` if the environment has no token: a guard without one would let everybody in.
    """

    def __init__(self, app: App) -> None:
        token = server_token()
        if token is None:
            raise ConfigError(f"{TOKEN_VARIABLE} is not set; the server would be open to everyone who reaches its port")
        self._app = app
        self._expected = f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _asks_for_health(scope) or self._has_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    def _has_token(self, scope: Message) -> bool:
        sent = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(sent) == 1 and hmac.compare_digest(sent[0], self._expected)


def _asks_for_health(scope: Message) -> bool:
    return scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health"


async def _refuse(send: Send) -> None:
    body = json.dumps({"error": f"this server asks for its token: Authorization: Bearer <{TOKEN_VARIABLE}>"}).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
