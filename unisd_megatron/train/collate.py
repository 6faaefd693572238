"""Token lists of a step -> micro-batches of tensors. The only place that knows how a view is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisd_megatron.batch import MicroBatch, Sample, View


def micro_batches(
    samples: Sequence[Sample], size: int, views: Sequence[str], *, multiple: int, mask_truncated: bool, device: torch.device
) -> list[MicroBatch]:
    """Cuts a rank's samples into micro-batches of `size`, of similar length, each padded to its own longest sequence.

    Args: views: the views to lay out; multiple: sequence lengths are padded to a multiple of it (sequence parallelism);
    mask_truncated: completions that were cut count for nothing.
    """
    ordered = sorted(samples, key=lambda s: -(len(s.prompts.views[views[0]]) + len(s.completion.token_ids)))
    return [
        _micro_batch(ordered[start : start + size], views, multiple, mask_truncated, device)
        for start in range(0, len(ordered), size)
    ]


def _micro_batch(
    samples: Sequence[Sample], views: Sequence[str], multiple: int, mask_truncated: bool, device: torch.device
) -> MicroBatch:
    completions = [sample.completion.token_ids for sample in samples]
    counts = torch.tensor([len(ids) for ids in completions])
    kept = torch.tensor([not (mask_truncated and s.completion.finish_reason == "length") for s in samples])
    mask = (torch.arange(int(counts.max())) < counts[:, None]) & kept[:, None]
    completion = _padded(completions, 1)
    log_probs = torch.zeros(completion.shape)
    for row, sample in enumerate(samples):
        log_probs[row, : len(sample.completion.log_probs)] = torch.tensor(sample.completion.log_probs)
    return MicroBatch(
        ids=[sample.prompts.id for sample in samples],
        completion=completion.to(device),
        mask=mask.to(device),
        token_ids=completion[mask].to(device),
        engine_log_probs=log_probs[mask].to(device),
        views={
            name: _view([sample.prompts.views[name] for sample in samples], completions, mask, multiple, device)
            for name in views
        },
    )


def _view(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], mask: Tensor, multiple: int, device: torch.device
) -> View:
    tokens = _padded([(*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)], multiple)
    rows, steps = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    # The output at a position predicts the next token: completion token t of a row is predicted at prompt length - 1 + t.
    return View(tokens.to(device), torch.stack([rows, starts[rows] - 1 + steps], dim=1).to(device))


def _padded(sequences: Sequence[Sequence[int]], multiple: int) -> Tensor:
    longest = max(len(sequence) for sequence in sequences)
    width = -(-longest // multiple) * multiple
    out = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        out[row, : len(sequence)] = torch.tensor(sequence)
    return out


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """The N kept values as `[B, T]`, 0 where the mask is false. Differentiable."""
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(mask, values)
