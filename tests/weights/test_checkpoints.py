"""Checkpoints survive import and export bit for bit, compute the same logits, and are complete or not there."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from unisd_megatron.batch import View
from unisd_megatron.cli import main
from unisd_megatron.config import Layout
from unisd_megatron.convert import checkpoints
from unisd_megatron.convert.checkpoints import import_folder
from unisd_megatron.convert.source import load_stage, open_source
from unisd_megatron.errors import CheckFailed, CheckpointError
from unisd_megatron.losses import token_log_probs
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import schedule, start
from unisd_megatron.weights.hf import HfFolder, new_folder, save_folder
from unisd_megatron.weights.tiny import write_tiny
from world import World

pytestmark = pytest.mark.usefixtures("no_queue_for_later_workers")

FAMILIES = ("qwen2", "llama")
KINDS = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16", "float16")]
TEMPERATURE = 0.7


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A tiny Hugging Face folder of every family in every dtype."""
    root = tmp_path_factory.mktemp("checkpoints")
    out = {}
    for family, dtype in KINDS:
        folder = out[family, dtype] = root / f"{family}-{dtype}"
        if dtype == "float32":
            write_tiny(family, folder, seed=3)
        else:
            shutil.copytree(out[family, "float32"], folder)
            AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return out


@pytest.fixture(scope="session")
def imported(folders: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 qwen2 folder as a Megatron checkpoint; copied by those who damage it."""
    target = tmp_path_factory.mktemp("imported") / "megatron"
    assert main(["convert", "import", "--model_name", str(folders["qwen2", "float32"]), "--output_dir", str(target)]) == 0
    return target


def tensors_of(folder: Path) -> dict[str, Tensor]:
    stored = HfFolder(folder)
    return {name: stored.tensor(name) for name in stored.names()}


def assert_equal(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])] == []


def greedy_text(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode("Q:347+285\nA:")])
    return str(tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=24)[0]))


@pytest.mark.parametrize(("family", "dtype"), KINDS)
def test_import_then_export_changes_nothing(
    folders: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, dtype: str
) -> None:
    folder, megatron, exported = folders[family, dtype], tmp_path / "new" / "megatron", tmp_path / "new" / "exported"
    assert main(["convert", "import", "--model_name", str(folder), "--output_dir", str(megatron)]) == 0
    assert main(["convert", "export", "--model_name", str(megatron), "--output_dir", str(exported)]) == 0
    assert_equal(exported, folder)
    assert {tensor.dtype for tensor in tensors_of(exported).values()} == {getattr(torch, dtype)}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    config, original = (json.loads((one / "config.json").read_text()) for one in (exported, folder))
    assert config == original
    assert greedy_text(exported) == greedy_text(folder)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["exported", "megatron"]
    for against in (megatron, exported):
        assert main(["verify", "--model_name", str(folder), "--against", str(against)]) == 0
        count = len(tensors_of(folder))
        assert f"{count} of {count} tensors equal bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["megatron", "Hugging Face"])
def test_verify_names_a_tensor_that_differs(
    folders: dict[tuple[str, str], Path], imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    original, name = folders["qwen2", "float32"], "model.layers.2.mlp.up_proj.weight"
    changed = tmp_path / "changed"
    shutil.copytree(original, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors[name][3, 5] += 2**-10
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    against = imported if kind == "megatron" else original
    assert main(["verify", "--model_name", str(changed), "--against", str(against)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["9.766e-04", name, "(1", "of", str(tensors[name].numel()), "entries)"]
    assert f"{len(tensors) - 1} of {len(tensors)} tensors equal" in "\n".join(lines)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.bias", "model.norm.weight"])
def test_a_missing_tensor_is_named_on_every_rank_before_they_meet(
    folders: dict[tuple[str, str], Path], tmp_path: Path, name: str
) -> None:
    tensors = tensors_of(folders["qwen2", "float32"])
    del tensors[name]
    save_folder(tmp_path / "lacking", folders["qwen2", "float32"], tensors.items())
    with pytest.raises(CheckpointError, match=f"lacking: tensor {name} is missing"):
        open_source(str(tmp_path / "lacking"), Layout(1, 2))


def import_on_ranks(rank: int, group: Any, folder: str, target: Path, layout: Layout) -> None:
    import_folder(folder, target, layout)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(4, 1), Layout(1, 4)], ids=["tp2 pp2", "tp4", "pp4"])
def test_what_several_ranks_import_one_process_exports(
    world: World, folders: dict[tuple[str, str], Path], tmp_path: Path, family: str, layout: Layout
) -> None:
    folder, megatron, exported = folders[family, "float32"], tmp_path / "megatron", tmp_path / "exported"
    world.run(4, import_on_ranks, str(folder), megatron, layout)
    assert len({path.name.split("_")[2] for path in (megatron / "shards").glob("*.distcp")}) == 4  # every rank wrote its part
    assert main(["convert", "export", "--model_name", str(megatron), "--output_dir", str(exported)]) == 0
    assert_equal(exported, folder)


def cut(shards: Path) -> None:
    file = max(shards.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose(shards: Path) -> None:
    max(shards.glob("*.distcp"), key=lambda path: path.stat().st_size).unlink()


def forget(shards: Path) -> None:
    (shards / "metadata.json").unlink()


def scribble(shards: Path) -> None:
    (shards / "metadata.json").write_text("not JSON")


def deepen(shards: Path) -> None:
    config = json.loads((shards.parent / "config.json").read_text())
    config = {**config, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (shards.parent / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut, lose, forget, scribble, deepen])
def test_a_damaged_megatron_checkpoint_is_refused(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    shutil.copytree(imported, tmp_path / "damaged")
    damage(tmp_path / "damaged" / "shards")
    capsys.readouterr()
    assert main(["convert", "export", "--model_name", str(tmp_path / "damaged"), "--output_dir", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unisd: ") and str(tmp_path / "damaged") in line
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_files_have_an_index_and_read_back_equal(
    folders: dict[tuple[str, str], Path], tmp_path: Path, family: str
) -> None:
    source, limit = folders[family, "float32"], 70_000
    tensors = tensors_of(source)
    save_folder(tmp_path / "small", source, tensors.items(), shard_bytes=limit)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 5
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
        assert {name for name, of in index["weight_map"].items() if of == file.name} == held.keys()
    assert_equal(tmp_path / "small", source)
    assert greedy_text(tmp_path / "small") == greedy_text(source)


def test_a_failure_in_the_middle_leaves_no_folder_and_blocks_nothing(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = folders["qwen2", "float32"]
    tensors = list(tensors_of(source).items())

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from tensors[:7]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        save_folder(tmp_path / "target", source, broken(), shard_bytes=70_000)
    assert not (tmp_path / "target").exists()
    save_folder(tmp_path / "target", source, iter(tensors))
    assert_equal(tmp_path / "target", source)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert sorted(path.name for path in (tmp_path / "target").glob("*safetensors*")) == ["model.safetensors"]


def test_a_write_that_fails_without_a_name_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckFailed, match=r"new\.\w+\.partial: could not be written \(No space left"),
        new_folder(tmp_path / "new"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_pickles_of_the_hub_are_fetched_where_they_are_allowed(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["qwen2", "float32"]
    asked: list[bool] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append("pytorch_model*.bin" in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for allowed in (False, True):
        assert open_source("owner/name", allow_pickle=allowed).path == folder
    assert asked == [False, True]


def import_on_a_full_disk(rank: int, group: Any, folder: str, target: Path) -> str:
    def full(*words: Any) -> None:
        if rank == 0:
            raise OSError(errno.ENOSPC, "No space left on device", "config.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "copy_companions", full)
        with pytest.raises(CheckFailed) as met:
            import_folder(folder, target, Layout(2))
    return str(met.value)


def test_what_stops_rank_0_alone_stops_every_rank(world: World, folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    said = world.run(2, import_on_a_full_disk, str(folders["qwen2", "float32"]), tmp_path / "new")
    assert said == ["config.json: could not be written (No space left on device)"] * 2
    assert list(tmp_path.iterdir()) == []


LENGTH = 600  # beyond the 256 positions from which llama's frequencies are scaled


def prompts() -> Tensor:
    return torch.randint(0, 300, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def read_on_ranks(rank: int, group: Any, folder: str, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """`(logits [2, LENGTH, 300], log-probs of the next tokens [2, LENGTH - 1])` on the last stage's first rank, else None."""
    platform = platforms.choose()
    with start.world(platform, layout, seed=1) as grid:
        source = open_source(folder, layout)
        model = load_stage(source, layout, platform, grid)
        tokens = prompts()
        everywhere = torch.cartesian_prod(torch.arange(2), torch.arange(LENGTH))
        heard = schedule.score(model.chunks, [View(tokens, everywhere)], lambda _, rows: rows @ model.head_weight().t(), grid)
        if not grid.is_last_stage:
            return None
        shard = heard[0].unflatten(0, (2, LENGTH))
        log_probs = token_log_probs(
            shard[:, :-1], tokens[:, 1:], temperature=TEMPERATURE, vocab_size=300, group=grid.tensor.group
        )
        parts = [torch.empty_like(shard) for _ in range(grid.tensor.size)]
        dist.all_gather(parts, shard.contiguous(), group=grid.tensor.group)
        return (torch.cat(parts, -1)[..., :300], log_probs) if grid.tensor.rank == 0 else None


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_beyond_the_original_context(
    world: World, folders: dict[tuple[str, str], Path], family: str
) -> None:
    folder = folders[family, "float32"]
    said = world.run(4, read_on_ranks, str(folder), Layout(2, 2, sequence_parallel=True))
    ((logits, log_probs),) = [one for one in said if one is not None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(prompts()).logits
    assert float((logits - expected).abs().max()) <= 1e-4
    reference = torch.log_softmax(expected[:, :-1].double() / TEMPERATURE, -1).gather(2, prompts()[:, 1:, None])[..., 0]
    assert float((log_probs - reference).abs().max()) <= 1e-5


def test_the_frequency_scaling_of_llama_can_be_told_from_none(folders: dict[tuple[str, str], Path]) -> None:
    """Else the test above would not see a Megatron model that ignores it."""
    folder = folders["llama", "float32"]
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    with torch.no_grad():
        scaled = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(prompts()).logits
        ignored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_parameters=plain)(prompts()).logits
    assert float((scaled - ignored)[:, 300:].abs().max()) > 0.1
