"""Chromium without a window, asked through a pipe (DevTools protocol): what a page asks for, and what it complains of."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
NOWHERE = ("--proxy-server=127.0.0.1:9", "--disable-component-update", "--remote-debugging-pipe")


def find() -> str | None:
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Browser:
    """One page at a time; everything but files goes through a proxy that is not there."""

    def __init__(self, program: str, folder: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [program, *FLAGS, *NOWHERE, f"--user-data-dir={folder}"]
        words = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command]
        self._process = subprocess.Popen(
            words, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._last = b"", 0

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(self, page: Path) -> tuple[list[str], list[str], str]:
        """`(what was requested, what was complained of, the title)`, half a second after all has been loaded."""
        target = self._call("Target.createTarget", {"url": "about:blank"})[0]["targetId"]
        session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})[0]["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self._call(f"{domain}.enable", {}, session)
        events = self._call("Page.navigate", {"url": page.absolute().as_uri()}, session)[1]
        while not any(one.get("method") == "Page.loadEventFired" for one in events):
            events.append(self._receive())
        time.sleep(0.5)
        answer, more = self._call("Runtime.evaluate", {"expression": "document.title"}, session)
        requests, complaints = [], []
        for one in [*events, *more]:
            said = one.get("params", {})
            if one.get("method") == "Network.requestWillBeSent":
                requests.append(said["request"]["url"])
            elif one.get("method") == "Log.entryAdded":
                complaints.append(said["entry"]["text"])
            elif one.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                complaints.append(json.dumps(said))
        return requests, complaints, answer["result"]["value"]

    def _call(
        self, method: str, about: dict[str, Any], session: str | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The answer, and the events that came before it."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": about} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        events = []
        while (one := self._receive()).get("id") != self._last:
            events.append(one)
        assert "error" not in one, one
        return one["result"], events

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 2**16)
            assert part, "the browser ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
