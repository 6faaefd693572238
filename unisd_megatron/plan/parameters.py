"""The parameters of one rank, in the order of Megatron's modules, and what Megatron's buffers make of them. No torch here.

Shapes come from the weight map of the family, which also converts and exports: there is no second list of weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unisd_megatron.config import Layout
from unisd_megatron.families import FAMILIES, Arch

EXPERTS = ".mlp.experts."
# Megatron's modules are registered in this order, which is not that of the weight map; it decides where buffers are padded.
_ORDER = ("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "pre_mlp_layernorm", "mlp")
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128  # numbers, of the distributed optimizer's buffers


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank. expert: dealt out by expert parallelism; shared: a tied head's copy on another stage."""

    name: str  # within its layer
    numel: int
    expert: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Parts:
    """The parameters of one tensor-parallel and expert-parallel rank, whole layers once (all layers are alike)."""

    embedding: Parameter
    layer: tuple[Parameter, ...]
    final_norm: Parameter
    head: Parameter  # its own, or the tied one's copy where it lies on another stage


@functools.cache
def parts(arch: Arch, tensor: int, expert: int) -> Parts:
    """The parameters that a rank of a layout with these sizes is made of."""
    one = dataclasses.replace(arch, num_layers=1, local=None)
    named = {mapping.megatron: math.prod(mapping.shard_shape(tensor)) for mapping in FAMILIES[arch.family].mappings(one)}
    prefix = "decoder.layers.0."
    layer = [(name.removeprefix(prefix), numel) for name, numel in named.items() if name.startswith(prefix)]
    layer.sort(key=lambda item: next(i for i, part in enumerate(_ORDER) if part in item[0].split(".")))
    if arch.experts is not None:
        first = arch.experts.count // expert
        layer = [(name, numel) for name, numel in layer if EXPERTS not in f".{name}" or int(name.split(".")[3]) < first]
    rows = named["embedding.word_embeddings.weight"]
    return Parts(
        Parameter("embedding", rows),
        _together([Parameter(name, numel, expert=expert > 1 and EXPERTS in f".{name}") for name, numel in layer]),
        Parameter("final_layernorm", named["decoder.final_layernorm.weight"]),
        Parameter("output_layer", rows, shared=arch.tied),
    )


def _together(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    """Parameters of one buffer as one where no padding falls between them: the same counts, some thousand times faster."""
    if any(one.numel % _PARAMETER_ALIGNMENT for one in parameters):
        return tuple(parameters)
    kinds = ([one for one in parameters if one.expert == of_experts] for of_experts in (False, True))
    return tuple(Parameter(kind[0].name, sum(one.numel for one in kind), kind[0].expert) for kind in kinds if kind)


def layers_of(arch: Arch, layout: Layout, stage: int, chunk: int) -> int:
    """Layers of a chunk of a stage: as many as of any other, without the places that embedding and loss take."""
    ends, stages = layout.pipeline_ends, layout.pipeline_model_parallel_size
    count = (arch.num_layers + ends) // layout.virtual_stages
    first = (stage, chunk) == (0, 0) and layout.account_for_embedding_in_pipeline_split
    last = (stage, chunk) == (stages - 1, layout.virtual_stages // stages - 1) and layout.account_for_loss_in_pipeline_split
    return count - first - last


def chunks(arch: Arch, layout: Layout, stage: int) -> list[list[Parameter]]:
    """The parameters of each chunk of a pipeline stage, in Megatron's order, or several as one (`_together`)."""
    found = parts(arch, layout.tensor_model_parallel_size, layout.expert_model_parallel_size)
    count, stages = layout.virtual_pipeline_model_parallel_size or 1, layout.pipeline_model_parallel_size
    out = []
    for number in range(count):
        first, last = (stage, number) == (0, 0), (stage, number) == (stages - 1, count - 1)
        chunk = [*_together(found.layer * layers_of(arch, layout, stage, number))]
        if first:
            chunk = [dataclasses.replace(found.embedding, shared=arch.tied and stages > 1), *chunk]
        if last:
            chunk.append(found.final_norm)
            if not (arch.tied and first):
                chunk.append(found.head)
        out.append(chunk)
    return out


@dataclass(frozen=True)
class Buffer:
    """Megatron's gradient buffer of some parameters: `numel` with padding; buckets and parameters as [start, stop) in it."""

    numel: int
    buckets: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]

    def owned(self, ranks: int, rank: int) -> int:
        """Numbers of parameters, without padding, in the part of the buffer that the distributed optimizer gives a rank."""
        mine = [
            (start + rank * (stop - start) // ranks, start + (rank + 1) * (stop - start) // ranks)
            for start, stop in self.buckets
        ]
        return sum(max(0, min(end, stop) - max(begin, start)) for begin, end in mine for start, stop in self.spans)


def buffer(parameters: Sequence[Parameter], ranks: int, *, distributed: bool) -> Buffer:
    """What Megatron lays out for parameters that are reduced over `ranks` replicas, without overlap (one bucket)."""
    if not distributed:
        numel = sum(one.numel for one in parameters)
        return Buffer(numel, ((0, numel),), ((0, numel),))
    align = math.lcm(ranks, _BUCKET_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    begin = end = 0
    for one in reversed(parameters):
        start = _padded(end, _PARAMETER_ALIGNMENT)
        if one.shared and start > begin:  # a tied weight has a bucket of its own
            start = _padded(start, align)
            buckets.append((begin, start))
            begin = start
        end = start + one.numel
        spans.append((start, end))
        if one.shared:
            end = _padded(end, align)
            buckets.append((begin, end))
            begin = end
    if end > begin:
        buckets.append((begin, _padded(end, align)))
    return Buffer(buckets[-1][1] if buckets else 0, tuple(buckets), tuple(spans))


def _padded(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def buffers(arch: Arch, layout: Layout, stage: int, replicas: int, expert_replicas: int) -> Iterator[tuple[Buffer, bool]]:
    """`(buffer, whether of experts)` of a pipeline stage: one for each chunk, experts that are dealt out apart."""
    for chunk in chunks(arch, layout, stage):
        for of_experts, ranks in ((False, replicas), (True, expert_replicas)):
            if some := [one for one in chunk if one.expert == of_experts]:
                yield buffer(some, ranks, distributed=layout.use_distributed_optimizer), of_experts
