"""Distributed checkpoints, tensor by tensor: what `store.py` does with a model in memory, without one.

What is written is what `dist_checkpointing.save` writes of the same model, under any layout; what is read may have been
written under any layout, by this program or by Megatron-LM.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from unisd_megatron.errors import CheckFailed
from unisd_megatron.mcore import skeleton
from unisd_megatron.mcore.model import Stage
from unisd_megatron.mcore.store import STUDENT
from unisd_megatron.mcore.writing import explained

Produce = Callable[[str], Tensor]


def save(folder: Path, stage: Stage, dtypes: Callable[[str], torch.dtype], produce: Produce) -> None:
    """Writes the checkpoint of a model that is not there. Collective over all ranks; one parameter at a time is in memory.

    Args: folder: existing and empty; stage: of `skeleton.empty_stage`; dtypes and produce: of a canonical name, the dtype and
    this rank's shard, asked for when its turn comes.
    Raises `CheckFailed`, on every rank, where a rank could not write; what `produce` raises comes through on its rank.
    """
    prefix = f"{STUDENT}."
    state = stage.sharded_state_dict(prefix=prefix, metadata=skeleton.checkpoint_metadata())
    table = _Table(stage, state, prefix, dtypes, produce)
    with explained(folder):
        dist_checkpointing.save({STUDENT: state}, str(folder), sharded_strategy=_Streaming(table))


class _Table:
    """This rank's part of the checkpoint: every piece, in the order of the parameters, and where its content comes from."""

    def __init__(
        self, stage: Stage, state: dict[str, Any], prefix: str, dtypes: Callable[[str], torch.dtype], produce: Produce
    ) -> None:
        self._described = skeleton.parameters(stage, state, prefix)
        self._produce = produce
        self._last: tuple[str, Tensor] | None = None
        self.items: list[WriteItem] = []
        self._source: dict[MetadataIndex, tuple[str, int] | ShardedObject] = {}
        shapes = {name: parameter.shape for name, parameter in stage.named_shards()}
        for name, described in self._described.items():
            value = torch.empty(shapes[name], dtype=dtypes(name), device="meta")
            for number, piece in enumerate(skeleton.pieces(described, value)):
                if is_main_replica(piece.replica_id):
                    self._add(_tensor_item(piece), (name, number))
        self.add_objects(skeleton.objects(state))

    def add_objects(self, objects: Iterable[ShardedObject]) -> None:
        """Those of this rank that it does not have yet."""
        for one in objects:
            item = WriteItem(MetadataIndex(one.unique_key), WriteItemType.BYTE_IO)
            if is_main_replica(one.replica_id) and item.index not in self._source:
                self._add(item, one)

    def _add(self, item: WriteItem, source: tuple[str, int] | ShardedObject) -> None:
        self.items.append(item)
        self._source[item.index] = source

    def content(self, item: WriteItem) -> Tensor | bytes:
        """What is written for an item. Parts of one parameter come one after the other, and share its value."""
        source = self._source[item.index]
        if isinstance(source, ShardedObject):
            stream = io.BytesIO()
            torch.save([source.data], stream)
            return stream.getvalue()
        name, number = source
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._produce(name)
        assert item.tensor_data is not None
        piece = skeleton.pieces(self._described[name], self._last[1])[number].data
        piece = piece.contiguous()
        # torch.save writes all of the memory that a tensor is a view of: this one is of its own part only.
        part = torch.frombuffer(piece.view(-1).view(torch.uint8).numpy(), dtype=piece.dtype)
        return part.view(item.tensor_data.chunk.sizes)


def _tensor_item(piece: ShardedTensor) -> WriteItem:
    """A piece in the terms of `torch.distributed.checkpoint`: the axes that Megatron prepends (the layer) are of size 1."""
    sizes = torch.Size((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
    chunk = ChunkStorageMetadata(torch.Size(piece.global_offset), sizes)
    data = TensorWriteData(chunk, TensorProperties(piece.dtype), torch.Size(piece.global_shape))
    return WriteItem(MetadataIndex(piece.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _Streaming(TorchDistSaveShardedStrategy):
    """Writes in Megatron's format, asking for each tensor when its turn comes."""

    def __init__(self, table: _Table) -> None:
        super().__init__("torch_dist", 1)
        self._table = table

    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        # megatron-core 0.19 has one of its own, for what all ranks share.
        self._table.add_objects(one for one in nested_values(sharded_state_dict) if isinstance(one, ShardedObject))
        writer = _Writer(Path(checkpoint_dir), self._table)
        checkpoint.save({}, storage_writer=writer, planner=_Planner(self._table))


class _Planner(DefaultSavePlanner):
    def __init__(self, table: _Table) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._table = table

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(items=self._table.items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)  # without the removal of doubles: there are none


class _Writer(FileSystemWriter):
    """One file per rank. (The library's own writer keeps a tensor of every name until its file is closed.)"""

    def __init__(self, folder: Path, table: _Table) -> None:
        super().__init__(folder)
        self._table = table

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file_name = f"{plan.storage_data.prefix}0.distcp"
        results: list[WriteResult] = []
        with (Path(self.path) / file_name).open("wb") as file:
            for item in plan.items:
                start = file.tell()
                content = self._table.content(item)
                try:
                    _put(content, file)
                except (OSError, RuntimeError) as error:  # torch complains of the position, on top of the system's error
                    cause = error.__context__ if isinstance(error.__context__, OSError) else error
                    reason = cause.strerror if isinstance(cause, OSError) else str(cause).splitlines()[0]
                    raise CheckFailed(f"{file.name}: could not be written at tensor {item.index.fqn} ({reason})") from error
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(file_name, start, length)))
                del content
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _put(content: Tensor | bytes, file: Any) -> None:
    if isinstance(content, bytes):
        file.write(content)
    else:
        torch.save(content, file)
