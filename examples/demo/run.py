"""The demo: a tiny model teaches itself to add. Base checkpoint in, better checkpoint out, both scored on held-out questions.

    python examples/demo/run.py --seed 0        # `make demo SEED=0` sets everything up first; ENGINE=vllm or vllm-server

Two processes on the CPU (tensor parallel 2) train UniSD* for 100 steps; see demo.yaml. The exported Hugging Face folder
is loaded by `transformers` and scored again, and must give the accuracy that the run itself reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENGINES = ("transformers", "vllm", "vllm-server")


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the demo.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what samples the completions")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/demo-seed<SEED>, with the engine's name")
    args = parser.parse_args()
    suffix = "" if args.engine == "transformers" else f"-{args.engine}"
    output = args.output_dir or ROOT / "runs" / f"demo-seed{args.seed}{suffix}"
    if output.exists():
        print(f"{output}: exists already; remove it, or choose another seed (make demo SEED=n)", file=sys.stderr)
        return 2
    began = time.time()
    with engine_flags(args.engine) as flags:
        launch("train", "--config", HERE / "demo.yaml", "--seed", args.seed, "--output_dir", output, *flags, processes=2)
    minutes = (time.time() - began) / 60
    before, after = (
        score(HERE / "model", output / "scores" / "before"),
        score(output / "hf", output / "scores" / "after"),
    )
    curve = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    draw(output, curve)
    print(f"\nheld-out accuracy: {100 * before:.1f} % before, {100 * after:.1f} % after ({minutes:.1f} minutes of training)")
    print(f"checkpoint: {output / 'hf'}\ncurve:      {output / 'curve.png'}")
    if abs(curve[-1]["accuracy"] - after) > 1e-9:
        print(f"the run reported {curve[-1]['accuracy']:.4f}, the exported folder scores {after:.4f}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def engine_flags(engine: str) -> Iterator[list[str]]:
    """What `train` must be told about the engine; a server runs as long as the block."""
    if engine == "transformers":
        yield []
    elif engine == "vllm":
        yield ["--use_vllm", "--vllm_kv_cache_gib", "0.25"]
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        words = ["--model", HERE / "model", "--port", port, "--dtype", "float32", "--max_model_len", 256]
        more = ["--block-size", 32, "--kv-cache-memory-bytes", 256 << 20]
        command = [sys.executable, ROOT / "tools" / "serve_vllm.py", *words, "--", *more]
        server = subprocess.Popen([str(word) for word in command], cwd=ROOT, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}", server)
            yield ["--use_vllm", "--vllm_mode", "server", "--vllm_server_urls", f"http://127.0.0.1:{port}"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers; ends the demo if it ends or takes five minutes."""
    deadline = time.time() + 300
    while time.time() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    sys.exit(f"the vLLM server at {url} did not start")


def launch(*words: object, processes: int = 1) -> None:
    """Runs a `unisd` subcommand under torchrun; ends the demo with its exit status if it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "-m", "unisd_megatron", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        sys.exit(done.returncode)


def score(model: Path, output: Path) -> float:
    """Greedy accuracy of a checkpoint folder on the 300 held-out questions, by `transformers` alone."""
    output.parent.mkdir(parents=True, exist_ok=True)
    launch("evaluate", "--dataset", "addition", "--model_name", model, "--max_completion_length", 40, "--output_dir", output)
    return float(json.loads((output / "result.json").read_text())["accuracy"])


def draw(output: Path, curve: list[dict[str, float]]) -> None:
    """Accuracy and loss over steps, as `curve.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot([p["step"] for p in curve], [100 * p["accuracy"] for p in curve], marker="o", color="tab:blue")
    top.set(ylabel="held-out accuracy, %", ylim=(0, 100), title="UniSD*, TP=2 on two CPU processes")
    bottom.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="tab:gray", label="loss")
    bottom.plot(
        [r["step"] for r in rows], [r["divergence/mean"] for r in rows], color="tab:orange", label="KL(teacher || student)"
    )
    bottom.set(xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
    bottom.legend()
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(output / "curve.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
