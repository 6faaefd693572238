"""What must not be on a page that is shown to others: paths of this machine, its name, its user, addresses, secrets."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket

_PATH = re.compile(r"(?<![\w./:])/(?!dev/|proc/|sys/)(?:[^\s/:'\",;()\[\]]+/)+")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(\w+://)[^\s/@]+@")
_IPV4 = re.compile(r"\b(?!127\.)(?:\d{1,3}\.){3}\d{1,3}\b(?=:\d)")
_SHORTEST = 4  # characters of a name that is looked for; a shorter one is part of too many words


def scrub(text: str) -> str:
    """`text` with folders cut off file names, and names, addresses and secrets of this machine replaced."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 2 * _SHORTEST:
            text = text.replace(value, "[secret]")
    text = _CREDENTIALS.sub(r"\1[secret]@", text)
    text = _PATH.sub(".../", text)
    for word, shown in (*((host, "[host]") for host in _hosts()), (_user(), "[user]")):
        if len(word) >= _SHORTEST and word not in ("root", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown, text)
    return _IPV4.sub("[address]", text)


def _hosts() -> list[str]:
    full = socket.gethostname()
    return sorted({full, full.split(".")[0]}, key=len, reverse=True)


def _user() -> str:
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return ""
