"""Hidden states and logits of a model that is on disk: by `transformers`, and by Megatron, a layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unisd_megatron.batch import View
from unisd_megatron.config import Layout
from unisd_megatron.convert.layerwise import listen, parameters_nowhere, stream_parameters
from unisd_megatron.convert.source import Source
from unisd_megatron.convert.weights import Weights
from unisd_megatron.families.published import published
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import schedule, skeleton
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.weights import internlm3
from unisd_megatron.weights.stream import EMBEDDING, HEAD, by_name


@dataclass(frozen=True)
class Heard:
    """What a model said: `[B, S, h]` behind the embedding and behind every layer, and logits `[B, S, V]`, all on the CPU."""

    hidden: list[Tensor]
    logits: Tensor


def read_with_transformers(source: Source, tokens: Tensor, dtype: torch.dtype) -> Heard:
    """Reads `tokens` [B, S] with the Hugging Face folder's weights, cast to `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = source.folder()
    internlm3.register()
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    with parameters_nowhere():
        how = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how).eval()
    body, hidden = model.model, []

    def fill(name: str, like: Tensor) -> Tensor:
        tensor = torch.empty(like.shape, dtype=dtype)
        for stored, part in published([(name, tensor)]).items():
            tied = source.arch.tied and stored == "lm_head.weight"
            part.copy_(folder.tensor("model.embed_tokens.weight" if tied else stored))
        return tensor

    parts = {"model.embed_tokens": body.embed_tokens, "model.norm": body.norm, "lm_head": model.lm_head}
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(body.layers)}
    for name, part in parts.items():
        stream_parameters(part, name, fill)
    for part in (body.embed_tokens, *body.layers):
        listen(part, lambda states: hidden.append(states.clone()))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return Heard(hidden, logits)


def _hear_batch_first(hear: Callable[[int, Tensor], None], number: int, states: Tensor) -> None:
    hear(number, states.transpose(0, 1).cpu())


def read_with_megatron(
    source: Source,
    weights: Weights,
    tokens: Tensor,
    dtype: torch.dtype,
    platform: Platform,
    grid: Grid,
    hear: Callable[[int, Tensor], None],
    judge: Callable[[slice, Tensor], None],
) -> None:
    """Reads `tokens` [B, S] with Megatron, one process.

    Args: weights: of the model, cast to `dtype`; hear: called with 0 and the embedding's output, then with each layer's
    number from 1 and what it returns, `[B, S, h]`; judge: called with blocks of the B x S positions in order and their logits.
    """
    mappings = by_name(source.mappings)
    stage = skeleton.empty_stage(source.arch, Layout(bf16=dtype is torch.bfloat16), platform, grid)
    (model,) = stage.chunks

    def fill(name: str, _: Tensor | None = None) -> Tensor:
        mapping = mappings[name]
        return mapping.shard(weights.tensors(mapping), 1, 0).to(grid.device, dtype)

    parts = {"embedding": model.embedding, "decoder.final_layernorm": model.decoder.final_layernorm}
    parts |= {f"decoder.layers.{i}": layer for i, layer in enumerate(model.decoder.layers)}
    for name, part in parts.items():
        stream_parameters(part, name, fill)
    for number, part in enumerate((model.embedding, *model.decoder.layers)):
        listen(part, partial(_hear_batch_first, hear, number))
    rows, length = tokens.shape
    everywhere = torch.cartesian_prod(torch.arange(rows), torch.arange(length)).to(grid.device)

    def logits(_: int, states: Tensor) -> None:
        head = fill(HEAD if HEAD in mappings else EMBEDDING)[: source.arch.vocab_size]
        for start in range(0, len(states), length):
            block = slice(start, start + length)
            judge(block, (states[block] @ head.t()).cpu())

    schedule.score([model], [View(tokens.to(grid.device), everywhere)], logits, grid)
