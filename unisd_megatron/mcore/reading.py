"""The parameters of a distributed checkpoint, whole and one at a time, in one process: for what needs no model in memory.

Reads what this program writes (model keys behind `student.`) and Megatron-LM's own checkpoints (no prefix), with layers
stacked in one tensor or apart. Nothing is unpickled but tensors, weights only, and of the metadata nothing but records.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckpointError
from unisd_megatron.families import Arch
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import skeleton
from unisd_megatron.mcore.platform import Platform

_OF_A_MODEL = ("embedding.", "decoder.", "output_layer.")
_FORMS: tuple[dict[str, bool], ...] = ({}, {"non_homogeneous_layers": True}, {"singleton_local_shards": True})
"""How layers may lie in a checkpoint: stacked, each by itself, each by itself with gates apart."""
_LOCAL_NORM, _TRANSFORMER_ENGINE_NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
"""Keys of the norm before experts: Megatron's local modules write the dense one's, Transformer Engine's keep the module's."""

_METADATA_ROOMS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_METADATA_CLASSES = {
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}


class _Metadata(pickle.Unpickler):
    """Reads `.metadata`: the plain records that describe a checkpoint, and nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if module.startswith(_METADATA_ROOMS) and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """What a distributed checkpoint holds. Raises `CheckpointError` for one that is incomplete, or not to be trusted."""
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: not a complete Megatron checkpoint ({name} is missing)")
    try:
        backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/metadata.json: not JSON that names a sharded_backend") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{folder}/metadata.json: sharded_backend {backend!r} is not read; only torch_dist is")
    try:
        found = _Metadata(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except Exception as error:  # a broken pickle may raise anything
        raise CheckpointError(f"{folder}/.metadata: not the metadata of a checkpoint ({str(error)[:150]})") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{folder}/.metadata: not the metadata of a checkpoint")
    return found


class ModelReader:
    """The model in a distributed checkpoint.

    Args: folder: holds `metadata.json`; arch: what it should be. Needs process groups of one process.
    Raises `CheckpointError` where a parameter is missing, has another shape, or is not one of the model's.
    """

    def __init__(self, folder: Path, arch: Arch, platform: Platform, grid: Grid) -> None:
        self._folder = folder
        self._metadata = read_metadata(folder)
        self._held = {
            name: one for name, one in self._metadata.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)
        }
        self._vocab_size = arch.vocab_size
        self._prefix = "student." if any(name.startswith("student.") for name in self._held) else ""
        stage = skeleton.empty_stage(arch, Layout(), platform, grid)
        self._shapes = {name: parameter.shape for name, parameter in stage.named_shards()}
        forms = [form for how in _FORMS for form in _spellings(self._form(stage, how))]
        # The form of which most is there: the complaint is then about what is really missing.
        self._described = max(forms, key=lambda form: sum(piece.key in self._held for piece in _pieces(form)))
        self._check()

    def _form(self, stage: Any, how: dict[str, bool]) -> dict[str, skeleton.Described]:
        state = stage.sharded_state_dict(prefix=self._prefix, metadata=skeleton.checkpoint_metadata(**how))
        return skeleton.parameters(stage, state, self._prefix)

    def _check(self) -> None:
        expected = {piece.key: piece for piece in _pieces(self._described)}
        for key, piece in expected.items():
            if key not in self._held:
                raise CheckpointError(f"{self._folder}: tensor {key} is missing; config.json has a model with it")
            stored, wanted = tuple(self._held[key].size), tuple(piece.global_shape)
            if piece.allow_shape_mismatch:  # the padding of the vocabulary is free
                stored, wanted = (min(stored[0], self._vocab_size), *stored[1:]), (self._vocab_size, *wanted[1:])
            if stored != wanted:
                raise CheckpointError(f"{self._folder}: {key} is {stored}; config.json says {wanted}")
        for key in self._held:
            if key.startswith(tuple(self._prefix + part for part in _OF_A_MODEL)) and key not in expected:
                raise CheckpointError(f"{self._folder}: tensor {key} is not one of the model in config.json")
        self._check_files()

    def _check_files(self) -> None:
        sizes: dict[Path, int] = {}
        for index, info in self._metadata.storage_data.items():
            file = self._folder / info.relative_path
            if file not in sizes:
                sizes[file] = file.stat().st_size if file.is_file() else -1
            if index.fqn in self._held and sizes[file] < info.offset + info.length:
                how = "missing" if sizes[file] < 0 else "cut short"
                raise CheckpointError(f"{file}: {how}; tensor {index.fqn} lies there")

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a parameter is stored, by canonical name."""
        found = [self._held[piece.key].properties.dtype for piece in _leaves(self._described[name])]
        return functools.reduce(torch.promote_types, found)

    def dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of the model's parameters."""
        return frozenset(self.dtype_of(name) for name in self._described)

    def parameter(self, name: str) -> Tensor:
        """A parameter as one tensor-parallel rank has it, by canonical name, in its stored dtype, on the CPU."""
        return skeleton.whole(self._described[name], self._read)

    def _read(self, piece: ShardedTensor) -> Tensor:
        held = self._held[piece.key]
        sizes = torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
        wanted = ChunkStorageMetadata(torch.Size(piece.global_offset), sizes)
        items = create_read_items_for_chunk_list(piece.key, held, [wanted])
        if len(items) == 1 and items[0].lengths == sizes:
            return self._load(items[0]).view(piece.local_shape)
        out = torch.zeros(sizes, dtype=held.properties.dtype)
        for item in items:
            part = out
            for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
                part = part.narrow(axis, start, length)
            part.copy_(self._load(item))
        return out.view(piece.local_shape)

    def _load(self, item: ReadItem) -> Tensor:
        info = self._metadata.storage_data[item.storage_index]
        file = self._folder / info.relative_path
        try:
            with file.open("rb") as stream:
                reader = FileSystemReader(self._folder)
                content = torch.load(reader._slice_file(stream, info), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            # An UnpicklingError is a page of advice to switch the check off.
            reason = "no saved tensor" if isinstance(error, pickle.UnpicklingError | EOFError) else str(error)[:150]
            raise CheckpointError(f"{file}: cannot be read at tensor {item.storage_index.fqn} ({reason})") from error
        for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            content = content.narrow(axis, start, length)
        return content


def _spellings(form: dict[str, skeleton.Described]) -> Iterator[dict[str, skeleton.Described]]:
    yield form
    yield {
        name: dataclasses.replace(one, key=one.key.replace(_LOCAL_NORM, _TRANSFORMER_ENGINE_NORM)) for name, one in form.items()
    }


def _pieces(form: dict[str, skeleton.Described]) -> Iterator[ShardedTensor]:
    for described in form.values():
        yield from _leaves(described)


def _leaves(described: skeleton.Described) -> list[ShardedTensor]:
    assert described.data is not None  # on the meta device
    return skeleton.pieces(described, described.data)
