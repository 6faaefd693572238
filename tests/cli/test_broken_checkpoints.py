"""Checkpoints with a fault: one line that names the file and the tensor, status 2, and nothing written."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from test_requests import Desk
from unisd_megatron.cli import main
from unisd_megatron.weights.files import write_files
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import write_tiny

IMPORT = ["convert", "import", "--model_name", "model", "--output_dir", "out"]
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: a tied model in one file; `many`: the same in several with an index."""
    root = tmp_path_factory.mktemp("whole")
    write_tiny("qwen2", root / "one", seed=0)
    shutil.copytree(root / "one", root / "many")
    (root / "many/model.safetensors").unlink()
    write_files(root / "many", load_file(root / "one/model.safetensors").items(), None, 200_000)
    return root


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capfd)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def content(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def header(change: Callable[[str], str]) -> Damage:
    def edit(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode()).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return content(edit)


def norm(**changes: Any) -> Damage:
    """Changes what the header states of one tensor."""

    def change(text: str) -> str:
        held = json.loads(text)
        held[NORM] |= changes
        return json.dumps(held)

    return header(change)


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def weight_map(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def double(folder: Path) -> None:
    """The last file holds a tensor of the first one's too."""
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor}, last)


def pickled(held: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(held, folder / "pytorch_model.bin")

    return damage


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("went off"),)


ALLOWED = "--allow-pickle"
FAULTS: dict[str, tuple[str, Damage, list[str]]] = {
    "cut short": ("one", content(lambda data: data[:-100_000]), ["model.safetensors", "cut short in tensor model."]),
    "cut short in its header": ("one", content(lambda data: data[:500]), ["model.safetensors", "in its header, 500 bytes"]),
    "empty": ("one", content(lambda data: b""), ["model.safetensors", "0 bytes"]),
    "bytes too many": ("one", content(lambda data: data + b"more"), ["model.safetensors", "4 bytes behind the last tensor"]),
    "another format": ("one", content(lambda data: b"version https://git-lfs.github.com/spec/v1"), ["model.safetensors"]),
    "a name twice in a file": (
        "one",
        header(lambda text: text.rstrip()[:-1] + ', "model.norm.weight": {"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'),
        ["model.safetensors", f"tensor {NORM} is there twice"],
    ),
    "ranges that overlap": ("one", header(lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,')), ["begin"]),
    "bytes that are not the shape": (
        "one",
        header(lambda text: re.sub(r'"shape":\[\d+\]', '"shape":[7]', text, count=1)),
        ["model.safetensors", "tensor model.layers.0.", "(7,)"],
    ),
    "a dtype that is a list": ("one", norm(dtype=["F32"]), ["model.safetensors", NORM, "dtype"]),
    "a shape that is not whole": ("one", norm(shape=[256.0]), ["model.safetensors", NORM, "shape"]),
    "offsets that are null": ("one", norm(data_offsets=[None, None]), ["model.safetensors", NORM, "data_offsets"]),
    "a header too deep": (
        "one",
        content(lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000),
        ["model.safetensors", "not a safetensors file"],
    ),
    "a config too deep": (
        "one",
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        ["model/config.json", "not JSON"],
    ),
    "a shape that is not the model's": (
        "one",
        tensors(lambda held: held.update({UP: held[UP].t().contiguous()})),
        ["model/model.safetensors", UP, "config.json says ("],
    ),
    "a tensor missing": ("one", tensors(lambda held: held.pop(NORM)), ["model", f"tensor {NORM} is missing"]),
    "a tensor too many": (
        "one",
        tensors(lambda held: held.update({"model.layers.4.mlp.up_proj.weight": held[UP].clone()})),
        ["model.safetensors", "model.layers.4.mlp.up_proj.weight", "not one of the model"],
    ),
    "an adapter": (
        "one",
        tensors(lambda held: held.update({f"{UP}.lora_A.weight": held[NORM].clone()})),
        ["lora_A", "merge adapters"],
    ),
    "packed weights": (
        "one",
        tensors(lambda held: held.update({"model.layers.1.mlp.up_proj.qweight": torch.zeros(8, dtype=torch.int32)})),
        ["qweight", "quantised weights"],
    ),
    "a config of quantised weights": ("one", config(quantization_config={"quant_method": "awq"}), ["config.json", "quantised"]),
    "whole numbers": ("one", tensors(lambda held: held.update({UP: held[UP].to(torch.int8)})), ["safetensors", UP, "I8"]),
    "two dtypes that become one tensor": (
        "one",
        tensors(lambda held: held.update({UP: held[UP].bfloat16()})),
        ["model.safetensors", f"{UP} is bfloat16 and model.layers.1.mlp.gate_proj.weight float32"],
    ),
    "eight-bit floats": ("one", tensors(lambda held: held.update({UP: held[UP].to(torch.float8_e4m3fn)})), [UP, "F8_E4M3"]),
    "a head that is not the tied embedding": (
        "one",
        tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1})),
        ["model.safetensors", "lm_head.weight", "ties"],
    ),
    "another architecture": ("one", config(model_type="mamba"), ["model/config.json", "'mamba'", "qwen2", "llama"]),
    "heads that do not divide": ("one", config(num_key_value_heads=3, head_dim=8), ["config.json", "3 key/value heads"]),
    "no weights": ("one", lambda folder: (folder / "model.safetensors").unlink(), ["model", "no model.safetensors"]),
    "a shard missing": ("many", lambda folder: min(folder.glob("*.safetensors")).unlink(), ["model-00001-of-", "missing"]),
    "a shard cut short": (
        "many",
        lambda folder: resize(min(folder.glob("*.safetensors")), -1000),
        ["model-00001-of-", "cut short in tensor"],
    ),
    "an index that names what is not there": (
        "many",
        weight_map(lambda names: names.update({NORM: names["model.embed_tokens.weight"]})),
        ["model-0000", f"tensor {NORM} is missing, though the index"],
    ),
    "an index that leaves the folder": (
        "many",
        weight_map(lambda names: names.update({NORM: "../model.safetensors"})),
        ["../model.safetensors", "missing"],
    ),
    "a tensor in two files": ("many", double, ["safetensors", "is in model-00001-of-"]),
    "a file beside an index of others": (
        "many",
        lambda folder: shutil.copy(max(folder.glob("*.safetensors")), folder / "model.safetensors"),
        ["model/model.safetensors", "model.safetensors.index.json beside it", "stale"],
    ),
    "pickled weights": ("one", pickled({}), ["pytorch_model.bin", "pickled", ALLOWED]),
    "a pickle that does something": ("one", pickled({NORM: Bomb()}), ["pytorch_model.bin", "weights only"]),
    "a pickle of something else": ("one", pickled([1, 2]), ["pytorch_model.bin", "named tensors"]),
    "a pickle cut short": (
        "one",
        lambda folder: (pickled({NORM: torch.ones(64)})(folder), resize(folder / "pytorch_model.bin", -300)),
        ["pytorch_model.bin", "weights only"],
    ),
}


def resize(path: Path, by: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:by])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_is_written(desk: Desk, whole: Path, name: str) -> None:
    kind, damage, words = FAULTS[name]
    shutil.copytree(whole / kind, desk.folder / "model")
    damage(desk.folder / "model")
    allowed = [ALLOWED] if name.startswith("a pickle") else []
    desk.refused([*IMPORT, *allowed], *words)


@pytest.mark.parametrize("size", ["0", "-3"])
@pytest.mark.parametrize("name", ["tensor", "pipeline", "expert"])
def test_a_layout_of_no_ranks_is_refused(desk: Desk, whole: Path, name: str, size: str) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    desk.refused([*IMPORT, f"--{name}-model-parallel-size", size], f"{name}_model_parallel_size is {size}", "at least 1")


def test_zeros_where_shards_were_are_named_in_one_short_line(
    desk: Desk, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    assert main(IMPORT) == 0
    (shards,) = (desk.folder / "out/shards").glob("*.distcp")
    shards.write_bytes(bytes(shards.stat().st_size))
    capfd.readouterr()
    assert main(["convert", "export", "--model_name", "out", "--output_dir", "back"]) == 2
    assert capfd.readouterr().err.endswith("tensor student.embedding.word_embeddings.weight (no saved tensor)\n")
    assert sorted(path.name for path in desk.folder.iterdir()) == ["model", "out"]


def test_faults_are_found_before_a_run_starts_too(desk: Desk, whole: Path) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    FAULTS["a shape that is not the model's"][1](desk.folder / "model")
    words = ["model.safetensors", UP, "config.json says ("]
    desk.refused(["verify", "--model_name", "model", "--against", "model"], *words)
    train = ["train", "--mode", "vanilla", "--dataset", "addition", "--output_dir", "run", "--model_name", "model"]
    desk.refused(train, *words)


def test_what_is_no_fault_is_read(desk: Desk, whole: Path) -> None:
    """A tied head stored once more, a tensor that follows from the config, indexes, a harmless pickle."""
    many, one, pickle_folder = desk.folder / "many", desk.folder / "one", desk.folder / "pickle"
    shutil.copytree(whole / "many", many)
    for folder in (one, pickle_folder):
        shutil.copytree(whole / "one", folder)
    held = load_file(one / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "model.safetensors")}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    pickled(held)(pickle_folder)
    extra = {"lm_head.weight": held["model.embed_tokens.weight"].clone(), "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**held, **extra}, one / "model.safetensors")
    for folder in (many, one, pickle_folder):
        out, back = folder.with_name(f"{folder.name}-out"), folder.with_name(f"{folder.name}-back")
        assert main(["convert", "import", "--model_name", str(folder), "--output_dir", str(out), ALLOWED]) == 0
        assert main(["convert", "export", "--model_name", str(out), "--output_dir", str(back)]) == 0
        found = HfFolder(back)
        assert set(found.names()) == held.keys()
        assert all(torch.equal(found.tensor(name), tensor) for name, tensor in held.items())


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a write that fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_in_the_middle(desk: Desk, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    assert main(IMPORT) == 0
    export = ["convert", "export", "--model_name", "out", "--output_dir", "back"]
    half = (desk.folder / "model/model.safetensors").stat().st_size // 2
    cases = [([*IMPORT[:-1], "again"], ["again.", ".partial/shards/__0_0.distcp", "at tensor student.decoder.layers."])]
    cases += [(export, ["back.", ".partial/shard-0", "at tensor model.layers."]), ([*export, "--max_shard_size", "300KB"], [])]
    for words, expected in cases[:2]:
        before = desk.content()
        capfd.readouterr()
        with full_disk(half):
            assert main(words) == 1
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert [word for word in [*expected, "File too large"] if word not in line] == [], line
        assert desk.content() == before
    with full_disk(half):
        assert main(cases[2][0]) == 0  # smaller files fit
    assert len(HfFolder("back").names()) == len(HfFolder("model").names())


@pytest.mark.parametrize("size", [700, 3000, 30_000])
def test_a_disk_that_is_full_before_the_weights(desk: Desk, whole: Path, capfd: pytest.CaptureFixture[str], size: int) -> None:
    """What is blamed is the file that is written, not the one that is copied, and nothing is left: of `tiny` neither."""
    shutil.copytree(whole / "one", desk.folder / "model")
    for words in (IMPORT, ["tiny", "--family", "qwen2", "--output_dir", "out"]):
        before = desk.content()
        capfd.readouterr()
        with full_disk(size):
            assert main(words) == 1
        line = capfd.readouterr().err.splitlines()[-1]  # behind the progress of a library
        assert re.match(r"unisd: \S*out\.[0-9a-f]{8}\.partial\S*: could not be written .*File too large", line), line
        assert desk.content() == before


def test_a_folder_of_the_users_is_not_in_the_way(desk: Desk, whole: Path) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    desk.write("out.partial/notes.txt", "mine")
    assert main(IMPORT) == 0
    assert main(["tiny", "--family", "qwen2", "--output_dir", "tiny"]) == 0
    assert (desk.folder / "out.partial/notes.txt").read_text() == "mine"
    assert sorted(path.name for path in desk.folder.iterdir()) == ["model", "out", "out.partial", "tiny"]


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_that_torch_does_not_take_is_refused(desk: Desk, seed: str) -> None:
    desk.refused(["tiny", "--family", "qwen2", "--output_dir", "out", "--seed", seed], "--seed", seed)


SLOW = """
import signal, sys, time
from pathlib import Path
from unisd_megatron.cli import main
from unisd_megatron.mcore import streaming
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def wait(table, item):
    next(Path(".").glob(sys.argv[-1] + ".*.partial")).joinpath("begun").touch()
    time.sleep(60)
streaming._Table.content = wait
sys.exit(main(sys.argv[1:]))
"""


def test_an_import_that_is_stopped_leaves_nothing(desk: Desk, whole: Path) -> None:
    shutil.copytree(whole / "one", desk.folder / "model")
    before = desk.content()
    status = {signal.SIGTERM: 143, signal.SIGINT: 130}
    words = [sys.executable, "-c", SLOW, *IMPORT[:-1]]
    running = {one: subprocess.Popen([*words, one.name], stderr=subprocess.PIPE, text=True) for one in status}
    for number, process in running.items():
        while not list(desk.folder.glob(f"{number.name}.*.partial/begun")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert "could not be written" not in said
        assert process.returncode == status[number]
    assert desk.content() == before


def test_a_size_that_is_none_is_refused(desk: Desk) -> None:
    for size in ("0", "big", "5XB", "1e999GB", "nan"):
        desk.refused(["convert", "export", "--model_name", "m", "--output_dir", "o", "--max_shard_size", size], repr(size))
