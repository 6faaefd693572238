"""Hugging Face folders: what is in one, checked from its headers; a new one, written tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisd_megatron.errors import CheckFailed, CheckpointError, ConfigError
from unisd_megatron.validation import is_hub_id
from unisd_megatron.weights.files import DTYPES, Entry, read_header, read_tensor, write_files
from unisd_megatron.weights.pickles import locate_pickles, read_pickled

SHARD_BYTES = 5 * 10**9
"""Largest size of a written safetensors file (or one tensor), as in `transformers`."""

_COMPANIONS = """
    config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json
    merges.txt added_tokens.json chat_template.jinja chat_template.json tokenizer.model
"""
_TEMPLATES = "additional_chat_templates"
"""Where `transformers` keeps chat templates beyond the one that is the default."""


class HfFolder:
    """A checkpoint folder: `config.json` and safetensors, read lazily by tensor name.

    Args: allow_pickle: where there are no safetensors, read `pytorch_model.bin` (weights only, nothing of it is run).
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Raises `CheckpointError` for a folder that is missing, incomplete, or has no safetensors. Reads headers only."""
        self.path = Path(path)
        self.config = read_config(self.path)
        self._entries = self._locate(allow_pickle)

    def _locate(self, allow_pickle: bool) -> dict[str, Entry]:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            return _read_indexed(index, read_header)
        if single.is_file():
            return read_header(single)
        return locate_pickles(self.path, allow_pickle, _read_indexed)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def file(self, name: str) -> Path:
        return self._entry(name).file

    def dtype_of(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def require(self, names: Iterable[str]) -> None:
        """Raises `CheckpointError` for the first name that is not held, or not in a dtype that is read."""
        for name in names:
            entry = self._entry(name)
            if entry.dtype not in DTYPES:
                raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}; float32, bfloat16 and float16 are read")

    def refuse_others(self, names: Collection[str], tied: bool) -> None:
        """Raises `CheckpointError` for a tensor that the model would silently do without.

        Args: names: of the model's tensors; tied: a head that equals the embedding is no other.
        """
        for name, entry in self._entries.items():
            if name in names or name.endswith(_COMPUTED):
                continue
            if name == _HEAD and tied and _EMBEDDING in self._entries:
                if not torch.equal(self.tensor(_HEAD), self.tensor(_EMBEDDING)):
                    raise CheckpointError(f"{entry.file}: {_HEAD} is not {_EMBEDDING}, and config.json ties the two")
                continue
            raise CheckpointError(f"{entry.file}: tensor {name} is not one of the model in config.json{_advice(name)}")

    def tensor(self, name: str) -> Tensor:
        """The full tensor in its stored dtype, on the CPU; `CheckpointError` names a missing one."""
        entry = self._entry(name)
        return read_pickled(entry, name) if entry.pickled else read_tensor(entry)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self._entries[name]


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = ("rotary_emb.inv_freq",)
"""Tensors of older checkpoints that follow from the config."""


def _advice(name: str) -> str:
    if "lora_" in name:
        return "; merge adapters into the model first"
    if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx", "_scale", "_scale_inv", ".SCB", ".absmax", ".quant_state")):
        return "; quantised weights are not read, give the unquantised checkpoint"
    return ""


def _read_indexed(index: Path, read: Callable[[Path], dict[str, Entry]]) -> dict[str, Entry]:
    """All tensors of the files that an index names. Raises `CheckpointError` where the index and the files disagree."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    files, single = sorted(set(map(str, weight_map.values()))), index.name.removesuffix(".index.json")
    entries: dict[str, Entry] = {}
    for name in files:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file}: the index names this file and it is missing")
        held = read(file)
        for double in held.keys() & entries.keys():
            raise CheckpointError(f"{file}: tensor {double} is in {entries[double].file.name} too")
        entries |= held
    if files != [single] and (index.parent / single).is_file():  # transformers reads the file, others the index
        raise CheckpointError(
            f"{index.parent / single}: {index.name} beside it names other files; remove the one that is stale"
        )
    for name, file_name in weight_map.items():
        if name not in entries or entries[name].file.name != file_name:
            raise CheckpointError(f"{index.parent / file_name}: tensor {name} is missing, though the index names it here")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` names the file if it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder; `CheckpointError` if it is missing or broken."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json; give a Hugging Face checkpoint folder or a hub id")
    return read_json(path / "config.json")


def resolve_folder(model_name: str, *, allow_pickle: bool = False) -> Path:
    """The local folder of a checkpoint: the folder itself, or the snapshot of a hub id (downloaded if need be).

    Args: allow_pickle: `pytorch_model*.bin` is downloaded too.
    """
    path = Path(model_name)
    if path.is_dir():
        return path
    if not is_hub_id(model_name):
        raise CheckpointError(f"{model_name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [
        "*.json",
        "*.safetensors",
        "*.txt",
        "*.model",
        "*.jinja",
        "*.py",
        *(["pytorch_model*.bin"] if allow_pickle else []),
    ]
    try:
        return Path(snapshot_download(model_name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:  # ValueError: not a valid id
        raise CheckpointError(f"{model_name}: no such folder, and the hub does not give it ({type(error).__name__})") from error


def eos_ids(path: Path) -> tuple[int, ...]:
    """The end-of-sequence set: `generation_config.json`'s, else `config.json`'s; `ConfigError` if neither has one."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            value = read_json(path / name).get("eos_token_id")
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                if any(type(one) is not int for one in ids):
                    raise ConfigError(f"{path / name}: eos_token_id is {value!r}; expected a whole number or a list of them")
                return tuple(ids)
    raise ConfigError(f"{path}: no eos_token_id in generation_config.json or config.json; completions could never end")


def require_new_folder(target: Path) -> None:
    """Raises `CheckpointError` if `target` exists or could not be created."""
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another folder")
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{target}: cannot be created, because {parent} is not a folder that can be written to")


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copies configuration and tokenizer files, everything that is not weights; config.json then states `dtype`.

    Code that they name (InternLM3's tokenizer) is copied for others to trust or not; it is never run here.
    """
    names = [*_COMPANIONS.split(), *(path.name for path in source.glob("*.py"))]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for path in source.glob(f"{_TEMPLATES}/*.jinja"):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, target / _TEMPLATES / path.name)
    if dtype is not None:
        config = {key: value for key, value in read_config(source).items() if key != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_folder(
    target: Path,
    source: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint folder from a stream of HF-named tensors; tokenizer and configs are copied from `source`.

    One tensor at a time is in memory. Complete or not there, see `new_folder`. Raises `CheckpointError` if `target` exists,
    `CheckFailed` where the disk does not take it.
    """
    with new_folder(target) as partial:
        copy_companions(source, partial, dtype)
        write_files(partial, tensors, dtype, shard_bytes)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` if all goes well, and is removed if not.

    It is called `target`.<random>.partial, so that nothing that is there already, of a user or of another run, is in its way.
    Raises `CheckpointError` if `target` exists, `CheckFailed` where the disk does not take it.
    """
    require_new_folder(target)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:  # what libraries raise on purpose has none
            raise unwritable(error, partial) from error
        raise


def unwritable(error: OSError, folder: Path) -> CheckFailed:
    """The system's refusal in the words of this program. A copy that fails names both files; a write or a flush none."""
    return CheckFailed(f"{error.filename2 or error.filename or folder}: could not be written ({error.strerror})")
