"""What we add inside vLLM's workers, through its plug-in seams: a weight-transfer engine, and fingerprints of live weights.

vLLM imports this module in every worker (`worker_extension_cls`), which registers the transfer engine `unisd`. Weights arrive
in checkpoint format, by reference from a trainer in the same process or over a `Link` from trainers elsewhere; loading, cutting
to tensor-parallel shards and repacking for kernels is vLLM's own layerwise reload, in the order start, update..., finish.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from unisd_megatron.rollout.link import Link, checksum, part_sums

BACKEND = "unisd"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """senders: `[address, port]` of each pipeline stage's sender, in order; none: weights come by reference."""

    senders: list[list[Any]] = field(default_factory=list)
    backend: str = "gloo"
    timeout_s: float = 300.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket. tensors: by reference; else sender `source` sends one row of `dtype` with the tensors end to end, and
    `checksums` has the sum of each.

    last: with this bucket every weight of the model must have come.
    """

    names: list[str]
    shapes: list[list[int]]
    dtype: str
    last: bool
    checksums: list[int] = field(default_factory=list)
    source: int = 0
    tensors: list[Tensor] | None = None


class UnisdTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives buckets; refuses a tensor whose bits are not those that were sent, and an update that leaves a weight out."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._links: list[Link] = []
        self._received: set[str] = set()  # HF names
        self._loaded: set[str] = set()  # the engine's names
        self._expected: set[str] = set()
        self._open = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        workers = self.parallel_config.world_size
        rank = 1 + self.parallel_config.rank
        for address, port in init_info.senders:
            link = Link(address, int(port), rank, 1 + workers, init_info.backend, init_info.timeout_s)
            link.open()
            self._links.append(link)

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _unpack_experts(self.model)
        if self._open:  # a broken-off update left layers half loaded
            finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._open = True
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded, self._received = set(), set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronizes an accelerator, which there is none of
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        tensors = update_info.tensors if update_info.tensors is not None else self._receive(update_info)
        pairs = list(zip(update_info.names, tensors, strict=True))
        if twice := self._received.intersection(update_info.names):
            raise ValueError(f"weight sync: {min(twice)} came twice")
        self._received.update(update_info.names)
        if self.model_config.hf_config.get_text_config().tie_word_embeddings:
            # A head packed for CPU kernels is a copy of its own, which vLLM loads by its own name.
            pairs += [(HEAD, tensor) for name, tensor in pairs if name == EMBEDDING and self.device.type == "cpu"]
        self._loaded |= set(self.model.load_weights(pairs))
        if update_info.last:  # here, because vLLM does not take another update after a failed `finish`
            if missing := self._expected - self._loaded:
                raise ValueError(f"weight sync: nothing came for the engine's {min(missing)} and {len(missing) - 1} more")
            if lacking := _incomplete(self.model):
                raise ValueError(f"weight sync: of the engine's {lacking[0]} came; {len(lacking) - 1} more lack something")

    def _receive(self, update_info: UpdateInfo) -> list[Tensor]:
        # A row of its own for each bucket: layers that are not complete yet keep views of it.
        sizes = [torch.Size(shape).numel() for shape in update_info.shapes]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, update_info.dtype), device=self.device)
        self._links[update_info.source].carry(flat)
        tensors = [part.view(shape) for part, shape in zip(flat.split(sizes), update_info.shapes, strict=True)]
        for name, tensor, expected in zip(update_info.names, tensors, update_info.checksums, strict=True):
            if checksum(tensor) != expected:
                raise ValueError(f"weight sync: {name} did not arrive as it was sent")
        return tensors

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._open = False

    def shutdown(self) -> None:
        for link in self._links:
            link.close()
        self._links = []


def _incomplete(model: torch.nn.Module) -> list[str]:
    """Modules of which a part came (a k_proj is missing, or one expert), with how much, by vLLM's own count of elements."""
    found = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        # Complete ones are counted no more. A vocabulary's padding is nobody's to send, and it is one tensor.
        if info.can_load() and not isinstance(module, VocabParallelEmbedding):
            came, total = info.load_numel, int(info.load_numel_total or 0)
            found += [f"{name} {came} of {total} elements"] * (0 < came < total)
    return found


def _unpack_experts(model: torch.nn.Module) -> None:
    """vLLM packs experts for CPU kernels once only; without their kernel they are packed again."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, FusedMoEMethodBase):
            _require(method, "moe_kernel")
            method.moe_kernel = None


def _require(thing: object, *names: str) -> None:
    """What we use of vLLM beside its interfaces must be there: set elsewhere it would do nothing, and nobody would know."""
    for name in names:
        if not hasattr(thing, name):
            raise RuntimeError(f"this vLLM's {type(thing).__name__} has no {name}; unisd_megatron works with vLLM 0.32")


class WorkerExtension:
    """Methods that vLLM mixes into its worker, to be called by `collective_rpc`."""

    def unisd_abandon(self) -> list[str]:
        """Forgets an update that was broken off; vLLM would refuse every later one. The next update loads everything anew."""
        _require(self, "_weight_update_active", "model_runner")
        self._weight_update_active = False
        return []

    def unisd_fingerprints(self) -> dict[str, str]:
        """A digest of each weight that the model computes with, by module and tensor name.

        Of the bits where they can be read, and of what linear layers and heads make of a fixed input: kernels may compute with
        a packed copy.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, VocabParallelEmbedding) and module.shard_indices.num_org_elements == 0:
                continue  # this worker's rows are all padding, which nobody sends
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.numel():
                    found[f"{name}.{part}"] = _digest(parameter)
            if isinstance(module, LinearBase | VocabParallelEmbedding):
                found[f"{name}, its output"] = _digest(_effect(module))
        return found

    def unisd_parts(self, wanted: dict[str, list[int]]) -> dict[str, int]:
        """See `RolloutEngine.parts`: this worker's share of them. Columns are what the module makes of a one among zeros,
        which are the very numbers of its weight, wherever a kernel keeps them."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        modules = dict(model.named_modules())
        found: dict[str, int] = {}
        for name, columns in wanted.items():
            module = modules.get(name.removesuffix(".weight"))
            if module is None:
                continue
            if not columns:
                found |= part_sums(name, module.weight.detach(), [])
            elif isinstance(module, LinearBase):
                found |= _columns(name, module, columns)
        return found


def _columns(name: str, module: LinearBase, columns: list[int]) -> dict[str, int]:
    """Those of the columns that this worker's shard has."""
    width = int(getattr(module, "input_size_per_partition", module.input_size))
    first = width * module.tp_rank if isinstance(module, RowParallelLinear) else 0
    here = [column for column in columns if first <= column < first + width]
    if not here:
        return {}
    weight = next(module.parameters())
    ones = torch.zeros(len(here), width, dtype=weight.dtype, device=weight.device)
    ones[torch.arange(len(here)), torch.tensor(here) - first] = 1
    rows = module.quant_method.apply(module, ones, bias=None)
    found: dict[str, int] = {}
    for column, row in zip(here, rows, strict=True):
        found |= {f"{name}[:, {column}]": total for total in part_sums(name, row, []).values()}
    return found


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def _effect(module: torch.nn.Module) -> Tensor:
    """The output for one fixed input of a linear layer or head."""
    widths = (getattr(module, name, None) for name in ("input_size_per_partition", "embedding_dim", "input_size"))
    width = next(int(one) for one in widths if one)
    given = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    weight = next(module.parameters())
    return module.quant_method.apply(module, given.to(weight), bias=None)  # type: ignore[union-attr, operator]


_require(WeightTransferEngineFactory, "_registry")
if BACKEND not in WeightTransferEngineFactory._registry:  # a second import under another name must not register again
    WeightTransferEngineFactory.register_engine(BACKEND, UnisdTransferEngine)
