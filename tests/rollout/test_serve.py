"""Who gets into a rollout server, and what `serve_vllm` refuses before vLLM is loaded."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unisd_megatron.errors import ConfigError
from unisd_megatron.rollout import serve
from unisd_megatron.rollout.guard import RequireToken


def knock(monkeypatch: pytest.MonkeyPatch, token: str, *headers: tuple[str, str], **scope: Any) -> list[dict[str, Any]]:
    """What the guard sends for a request; `{"type": "inside"}` where it lets it in."""
    monkeypatch.setenv("UNISD_SERVER_TOKEN", token)
    sent: list[dict[str, Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"type": "inside"})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    full = {"type": "http", "method": "GET", "path": "/pause", "headers": raw} | scope
    asyncio.run(RequireToken(inside)(full, None, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize(
    ("headers", "scope"),
    [
        ([], {}),
        ([("authorization", "Bearer wrong")], {}),
        ([("authorization", "Bearer secre")], {}),
        ([("authorization", "secret")], {}),
        ([("authorization", "Bearer secret"), ("authorization", "Bearer wrong")], {}),
        ([], {"method": "OPTIONS"}),
        ([], {"method": "POST", "path": "/health"}),
        ([], {"path": "/health/../pause"}),
        ([], {"path": "/v1/health"}),
        ([], {"type": "websocket"}),
    ],
)
def test_without_the_token_nobody_enters(monkeypatch: pytest.MonkeyPatch, headers: Any, scope: Any) -> None:
    sent = knock(monkeypatch, "secret", *headers, **scope)
    if scope.get("type") == "websocket":
        assert sent == [{"type": "websocket.close", "code": 1008}]
    else:
        assert [sent[0]["status"], *json.loads(sent[1]["body"])] == [401, "error"]


def test_with_the_token_everything_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    token = ("Authorization", "Bearer secret")
    for headers, scope in [
        ([token], {}),
        ([token], {"type": "websocket"}),
        ([], {"path": "/health"}),
        ([], {"type": "lifespan"}),
    ]:
        assert knock(monkeypatch, "secret", *headers, **scope) == [{"type": "inside"}]


@pytest.mark.parametrize(
    ("token", "words"), [("", "is not set"), ("two words", "without spaces"), ("naïve", "printable ASCII")]
)
def test_a_guard_without_a_usable_token_does_not_stand_there(monkeypatch: pytest.MonkeyPatch, token: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        knock(monkeypatch, token)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "8000"], "required: --model"),
        (["--model", "absent"], "--model absent: no such folder"),
        (["--model", ".", "--host", "0.0.0.0"], "set UNISD_SERVER_TOKEN"),
        (["--model", ".", "--host", "somewhere.example"], "set UNISD_SERVER_TOKEN"),
        (["--model", ".", "--port", "0"], "--port 0: 1 to 65535"),
        (["--model", ".", "--host", "::1", "--port", "{taken}"], ""),
        (["--model", ".", "--port", "{taken}"], "in use on 127.0.0.1"),
        (["--model", ".", "--dtype", "float16"], "--dtype"),
        (["--model", ".", "--tensor_parallel_size", "0"], "1 or more"),
        (["--model", ".", "--max-num-seqs", "3"], "--max-num-seqs 3"),
        (["--model", ".", "--", "--trust-remote-code"], "never run"),
        (["--model", ".", "--", "--trust_remote=1"], "never run"),
        (["--model", ".", "--", "--config", "file.yaml"], "not passed on"),
        (["--model", ".", "--", "--max-num-seqs", "3", "--host=0.0.0.0"], "--host is set by serve_vllm"),
        (["--model", ".", "--", "-tp", "2"], "-tp: write the flag out"),
        (["--model", ".", "--", "-q", "fp8"], "-q: write the flag out"),
        (["--model", ".", "--", "-qfp8"], "-qfp8: write the flag out"),
        (["--model", ".", "--", "-dp=2"], "-dp=2: write the flag out"),
        (["--model", ".", "--", "-sc", "{}"], "-sc: write the flag out"),
        (["--model", ".", "--", "--seed", "-1", "--api-key", "secret"], "--api-key is set by serve_vllm"),
        (["--model", ".", "--", "--hf-overrides.rope_theta=1"], "--hf-overrides is set by serve_vllm"),
        (["--model", ".", "--", "--no-enable-prompt-tokens-details"], "--enable-prompt-tokens-details is set"),
        (["--model", ".", "--", "--weight_transfer_config.backend", "nccl"], "--weight-transfer-config is set"),
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNISD_SERVER_TOKEN", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the last thing that is looked at
    Path("config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main([word.replace("{taken}", port) for word in flags]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith("serve_vllm: ")
    assert words in said.err
    if not words:
        assert "vLLM is not installed" in said.err or "cannot listen" in said.err


def test_the_script_is_that_program(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "serve_vllm.py"
    done = subprocess.run([sys.executable, script, "--model", tmp_path / "no"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "no such folder" in done.stderr


def test_a_token_opens_the_way_to_other_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("UNISD_SERVER_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    monkeypatch.setitem(sys.modules, "torch", None)  # not reached
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert serve.main(["--model", str(tmp_path), "--host", "0.0.0.0", "--port", port]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
