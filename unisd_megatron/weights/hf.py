"""Hugging Face folders: safetensors in and out, one tensor in memory at a time beyond the file being written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unisd_megatron.errors import CheckpointError, ConfigError

_COMPANIONS = """
    config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json
    merges.txt added_tokens.json chat_template.jinja tokenizer.model
"""


class HfFolder:
    """A checkpoint folder: `config.json` and safetensors, read lazily by tensor name."""

    def __init__(self, path: str | Path) -> None:
        """Raises `CheckpointError` for a folder that is missing, incomplete, or has no safetensors."""
        self.path = Path(path)
        self.config = read_config(self.path)
        self._files = self._locate()

    def _locate(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{index}: no weight_map")
            files = {name: self.path / file for name, file in names.items()}
        elif (self.path / "model.safetensors").is_file():
            single = self.path / "model.safetensors"
            with _open(single) as stream:
                files = dict.fromkeys(stream.keys(), single)
        else:
            raise CheckpointError(
                f"{self.path}: no model.safetensors or model.safetensors.index.json (only safetensors are read)"
            )
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise CheckpointError(f"{file}: the index names this file and it is missing")
            with _open(file):
                pass
        return files

    def names(self) -> list[str]:
        return list(self._files)

    def require(self, names: Iterable[str]) -> None:
        """Raises `CheckpointError` for the first name that is not held."""
        for name in names:
            if name not in self._files:
                raise CheckpointError(f"{self.path}: tensor {name} is missing")

    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights, read from a file's header; the config may state another."""
        name = next(iter(self._files))
        with _open(self._files[name]) as stream:
            stored = stream.get_slice(name).get_dtype()
        known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        if stored not in known:
            raise CheckpointError(f"{self._files[name]}: weights of dtype {stored}; float32, bfloat16 and float16 are read")
        return known[stored]

    def tensor(self, name: str) -> Tensor:
        """The full tensor in its stored dtype, on the CPU; `CheckpointError` names a missing one."""
        self.require([name])
        with _open(self._files[name]) as stream:
            try:
                return stream.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self._files[name]}: tensor {name} is missing, though the index names it here"
                ) from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` names the file if it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder; `CheckpointError` if it is missing or broken."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; give a Hugging Face checkpoint folder or a hub id")
    return read_json(path / "config.json")


def resolve_folder(model_name: str) -> Path:
    """The local folder of a checkpoint: the folder itself, or the snapshot of a hub id (downloaded if need be)."""
    path = Path(model_name)
    if path.is_dir():
        return path
    if path.is_absolute() or model_name.startswith(".") or model_name.count("/") != 1:
        raise CheckpointError(f"{model_name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: not a valid id
        raise CheckpointError(f"{model_name}: no such folder, and the hub does not give it ({type(error).__name__})") from error


def eos_ids(path: Path) -> tuple[int, ...]:
    """The end-of-sequence set: `generation_config.json`'s, else `config.json`'s; `ConfigError` if neither has one."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            value = read_json(path / name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (int(value),)
    raise ConfigError(f"{path}: no eos_token_id in generation_config.json or config.json; completions could never end")


def require_new_folder(target: Path) -> None:
    """Raises `CheckpointError` if `target` exists or could not be created."""
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another folder")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{target}: cannot be created, because {parent} is not a folder that can be written to")


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copies configuration and tokenizer files, everything that is not weights; config.json then states `dtype`."""
    for name in _COMPANIONS.split():
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if dtype is not None:
        config = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_folder(
    target: Path,
    source: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes a checkpoint folder from a stream of HF-named tensors; tokenizer and configs are copied from `source`.

    Complete or not there: everything is written to `target` + ".partial" and renamed at the end. Raises
    `CheckpointError` if `target` exists.
    """
    require_new_folder(target)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    copy_companions(source, partial, dtype)
    _write_shards(partial, tensors, dtype, shard_bytes)
    os.replace(partial, target)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int) -> None:
    pending: dict[str, Tensor] = {}
    held, total = 0, 0
    files: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        nonlocal held
        file = folder / f"shard-{len(files)}"
        save_file(pending, file, metadata={"format": "pt"})
        files.append((file, list(pending)))
        pending.clear()
        held = 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
        pending[name] = tensor
        held, total = held + size, total + size
    flush()
    if len(files) == 1:
        os.replace(files[0][0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.replace(file, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
