"""The loss of a step, composed: divergence -> clip -> agreement weights -> normalise -> + contrast -> + feature matching.

One place to read beside the paper (sections 2.1-2.3). Everything a mode does is in `LossSettings`. Sums over sequences
are normalised over the step's global batch *before* the student runs (agreement comes from teacher views only), so the
loss of a micro-batch is its exact share of the step's loss: shares are added over micro-batches and data-parallel
ranks, and nothing is divided again. `semantics="released"` reproduces the authors' code instead: per micro-batch and
rank normalisers and quantiles, weights that cancel, means over fully masked rows.

Shapes: B sequences of a micro-batch, T padded completion positions, K auxiliary views. Everything fp32, replicated over
tensor-parallel ranks, on the last pipeline stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from unisd_megatron.batch import NEGATIVE, TEACHER, auxiliary
from unisd_megatron.config import Run
from unisd_megatron.grid import Axis
from unisd_megatron.mechanisms.agreement import agreement_weights
from unisd_megatron.mechanisms.clipping import clip_divergence, masked_quantile
from unisd_megatron.mechanisms.contrastive import contrastive_hinge
from unisd_megatron.mechanisms.histograms import DIVERGENCES, WEIGHTS
from unisd_megatron.mechanisms.tally import Tally


@dataclass(frozen=True)
class LossSettings:
    """What the loss is made of; a weight of 0 or None switches its mechanism off."""

    alpha: float = 0.0
    temperature: float = 0.7
    divergence_weight: float = 1.0
    token_clip: float | None = None
    token_clip_quantile: float | None = None
    agreement: Literal["token", "sequence"] | None = None
    agreement_stat: Literal["var", "range"] = "var"
    gamma: float = 0.0
    views: int = 0
    contrastive_weight: float = 0.0
    contrastive_margin: float = 0.5
    matching_weight: float = 0.0
    released: bool = False
    path: Literal["fused", "fused_torch", "materialized"] = "fused"
    importance_cap: float | None = None
    entry_clip: float | None = None
    likelihood: bool = False
    skipped_tokens: int = 0

    @property
    def teacher_views(self) -> dict[str, float]:
        """The views the teacher must read, with the temperature of each (auxiliary views use 1, as released)."""
        if self.likelihood:
            return {}
        views = {TEACHER: self.temperature}
        if self.agreement is not None and self.gamma > 0:
            views |= {auxiliary(k): 1.0 for k in range(self.views)}
        if self.contrastive_weight > 0:
            views[NEGATIVE] = self.temperature
        return views


def loss_settings(run: Run) -> LossSettings:
    """The loss that a run asks for."""
    objective = run.objective
    return LossSettings(
        alpha=objective.alpha,
        temperature=1.0 if run.method.likelihood else run.rollout.temperature,
        divergence_weight=run.divergence_weight,
        token_clip=objective.token_clip,
        token_clip_quantile=objective.token_clip_quantile,
        agreement=run.agreement,
        agreement_stat=objective.agreement_stat,
        gamma=objective.gamma_agreement or 0.0,
        views=run.data.num_auxiliary_contexts,
        contrastive_weight=objective.contrastive_weight,
        contrastive_margin=0.5 if objective.contrastive_margin is None else objective.contrastive_margin,
        matching_weight=objective.final_layer_distill_weight or 0.0,
        released=objective.semantics == "released",
        path=objective.loss_path,
        importance_cap=run.rollout.importance_sampling_cap,
        entry_clip=objective.entry_clip,
        likelihood=run.method.likelihood,
        skipped_tokens=run.rollout.num_loss_tokens_to_skip,
    )


@dataclass(frozen=True)
class Heard:
    """What the teacher said about one micro-batch, before the student runs."""

    mask: Tensor  # bool [B, T]
    mine: Tensor  # bool [B, T], the part of the mask whose loss this rank computes; all of it without context parallel
    auxiliary: Tensor | None = None  # [K, B, T] log-probs of the sampled tokens, temperature 1
    negative: Tensor | None = None  # [B, T] log-probs of the sampled tokens that are mine


@dataclass(frozen=True)
class TokenStats:
    """What the student's pass adds for the tokens that are mine; 0 elsewhere. Without a teacher: its log-probs alone."""

    student_log_probs: Tensor  # [B, T] of the sampled token, gradient to the student
    divergence: Tensor | None = None  # [B, T], gradient to the student
    teacher_log_probs: Tensor | None = None  # [B, T]
    entropy: Tensor | None = None  # [B, T] of the student
    feature: Tensor | None = None  # [B, T] distance of final-layer hidden states, gradient to the student
    importance: Tensor | None = None  # [B, T] truncated ratio of the student's to the sampling engine's probability


@dataclass(frozen=True)
class Shares:
    """One micro-batch's part in the step's normalisers."""

    heard: Heard
    weights: Tensor  # [B, T] token weights inside a sequence
    main: Tensor  # [B] share of each sequence in the weighted divergence
    plain: Tensor  # [B] share of each sequence in the other terms
    disagreement: Tensor | None  # [B, T] or [B]


class Objective:
    """The loss of a run. Holds one number of state: the clip ceiling carried over from the previous step."""

    def __init__(self, settings: LossSettings, data: Axis, tokens: Axis | None = None) -> None:
        self.settings = settings
        self.data = data  # ranks with other sequences
        self.tokens = tokens or data  # ranks that answer for other tokens: data x context
        self.ceiling: float | None = None  # nats; only with token_clip_quantile under corrected semantics

    def prepare(self, heard: Sequence[Heard]) -> list[Shares]:
        """Weights and shares of every micro-batch of this rank. Collective over the data-parallel axis.

        Corrected: shares sum to 1 over all sequences of the global batch that have a kept token.
        """
        return self._released(heard) if self.settings.released else self._corrected(heard)

    def _released(self, heard: Sequence[Heard]) -> list[Shares]:
        out = []
        for one in heard:
            weights, disagreement = self._weights([one], None)
            rows = torch.full((one.mask.shape[0],), 1.0 / (one.mask.shape[0] * len(heard) * self.data.size))
            rows = rows.to(one.mask.device)
            out.append(Shares(one, weights[0], rows, rows, disagreement[0] if disagreement else None))
        return out

    def _corrected(self, heard: Sequence[Heard]) -> list[Shares]:
        weights, disagreement = self._weights(heard, self.data)
        kept = [one.mask.any(1).float() for one in heard]
        # A sequence weight acts between sequences; a token weight acts inside its sequence.
        by_row = [
            w.max(1).values * k if self.settings.agreement == "sequence" else k for w, k in zip(weights, kept, strict=True)
        ]
        totals = torch.stack([torch.cat(by_row).double().sum(), torch.cat(kept).double().sum()])
        if self.data.group is not None:
            dist.all_reduce(totals, group=self.data.group)
        weighted, plain = totals.clamp(min=1e-30).tolist()
        return [
            Shares(one, w, row / weighted, keep / plain, disagreement[i] if disagreement else None)
            for i, (one, w, row, keep) in enumerate(zip(heard, weights, by_row, kept, strict=True))
        ]

    def _weights(self, heard: Sequence[Heard], scope: Axis | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """Agreement weights of the micro-batches, with one quantile over all of them and the ranks of `scope`."""
        settings = self.settings
        if settings.agreement is None or settings.gamma <= 0:
            return [torch.ones_like(one.mask, dtype=torch.float32) for one in heard], None
        longest = max(one.mask.shape[1] for one in heard)
        masks = torch.cat([_pad(one.mask, longest) for one in heard])
        views = torch.cat([_pad(_given(one.auxiliary), longest) for one in heard], dim=1)
        result = agreement_weights(
            views,
            masks,
            granularity=settings.agreement,
            statistic=settings.agreement_stat,
            gamma=settings.gamma,
            group=scope.group if scope is not None else None,
        )
        counts = [one.mask.shape[0] for one in heard]
        weights = [w[:, : one.mask.shape[1]] for w, one in zip(result.weights.split(counts), heard, strict=True)]
        return weights, list(result.disagreement.split(counts))

    def share_of_loss(self, stats: TokenStats, shares: Shares, tally: Tally) -> Tensor:
        """This micro-batch's share of the step's loss (a scalar with a gradient to the student); metrics go to `tally`."""
        settings, mask = self.settings, shares.heard.mask.float()
        mine: Tensor = shares.heard.mine
        # Every term is a mean over the tokens that were sampled; the ratio makes it one over tokens the student would sample.
        counted = mine if stats.importance is None else mine * stats.importance
        tally.check_finite("agreement weights", shares.weights * mask)
        terms = {}
        if settings.likelihood:
            tally.check_finite("log-likelihood", stats.student_log_probs)
            terms["loss/likelihood"] = -(shares.main * self._per_sequence(stats.student_log_probs * counted, mask)).sum()
        else:
            tally.check_finite("divergence", _given(stats.divergence))
        if settings.divergence_weight:
            divergence = self._clip(_given(stats.divergence), mine, tally)
            main = self._per_sequence(divergence * counted, shares.weights * mask)
            terms["loss/divergence"] = settings.divergence_weight * (shares.main * main).sum()
        if settings.contrastive_weight:
            hinge = self._contrast(stats, shares, tally)
            terms["loss/contrastive"] = (
                settings.contrastive_weight * (shares.plain * self._per_sequence(hinge * counted, mask)).sum()
            )
        if settings.matching_weight:
            feature = _given(stats.feature)
            tally.check_finite("feature distance", feature)
            tally.add_mean("matching/distance", feature, mine)
            terms["loss/matching"] = (
                settings.matching_weight * (shares.plain * self._per_sequence(feature * counted, mask)).sum()
            )
        loss = torch.stack(list(terms.values())).sum()
        tally.check_finite("loss", loss)
        tally.add_sum("loss", loss.detach())
        if len(terms) > 1:
            for name, value in terms.items():
                tally.add_sum(name, value.detach())
        self._report(stats, shares, tally)
        return loss

    def _per_sequence(self, values: Tensor, weights: Tensor) -> Tensor:
        """This rank's part of the weighted mean over each sequence's tokens, `[B]`; released: the divisor is at least 1."""
        floor = 1.0 if self.settings.released else 1e-30
        return (values * weights).sum(1) / weights.sum(1).clamp(min=floor)

    def _clip(self, divergence: Tensor, mask: Tensor, tally: Tally) -> Tensor:
        settings = self.settings
        if settings.token_clip is not None:
            clipped = clip_divergence(divergence, mask, ceiling=settings.token_clip)
        elif settings.token_clip_quantile is not None and settings.released:
            clipped = clip_divergence(divergence, mask, quantile=settings.token_clip_quantile)
        elif self.ceiling is not None:
            clipped = clip_divergence(divergence, mask, ceiling=self.ceiling)
        else:
            return divergence
        tally.add_mean("clip/clipped_fraction", (clipped < divergence).float(), mask)
        return clipped

    def _contrast(self, stats: TokenStats, shares: Shares, tally: Tally) -> Tensor:
        mask, negative = shares.heard.mine, _given(shares.heard.negative)
        hinge = contrastive_hinge(
            stats.student_log_probs, _given(stats.teacher_log_probs), negative, margin=self.settings.contrastive_margin
        )
        tally.check_finite("contrastive hinge", hinge * mask)
        student = stats.student_log_probs.detach()
        tally.add_mean("contrastive/hinge", hinge, mask)
        tally.add_mean("contrastive/positive_distance", (student - _given(stats.teacher_log_probs)).abs(), mask)
        tally.add_mean("contrastive/negative_distance", (student - negative).abs(), mask)
        tally.add_mean("contrastive/margin_violations", (hinge > 0).float(), mask)
        return hinge

    def _report(self, stats: TokenStats, shares: Shares, tally: Tally) -> None:
        mask = shares.heard.mine
        if stats.divergence is None or stats.teacher_log_probs is None or stats.entropy is None:
            tally.add_mean("nll/mean", -stats.student_log_probs, mask)
            tally.add_max("nll/max", -stats.student_log_probs, mask)
            return
        gap = (stats.teacher_log_probs - stats.student_log_probs.detach()).clamp(-50, 50)
        tally.add_mean("divergence/mean", stats.divergence, mask)
        tally.add_max("divergence/max", stats.divergence, mask)
        tally.add_histogram(DIVERGENCES, stats.divergence, mask)
        tally.add_mean("kl_approx", gap.exp() - gap - 1, mask)
        tally.add_mean("entropy", stats.entropy, mask)
        if shares.disagreement is not None:
            of_tokens = shares.disagreement.dim() == 2
            kept = mask if of_tokens else shares.heard.mask.any(1)
            disagreement = shares.disagreement[:, : mask.shape[1]] if of_tokens else shares.disagreement
            weights = shares.weights if of_tokens else shares.weights.max(1).values
            tally.add_mean("agreement/disagreement_mean", disagreement, kept)
            tally.add_max("agreement/disagreement_max", disagreement, kept)
            tally.add_mean("agreement/weight_mean", weights, kept)
            tally.add_histogram(WEIGHTS, weights, kept if of_tokens else kept & _begins_here(shares.heard))

    def follow_quantile(self, divergences: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Sets the next step's ceiling to the quantile of this step's divergences. Collective over the data-parallel axis.

        Args: divergences, masks: `[B, T]` of every micro-batch of this rank, before clipping.
        """
        if self.settings.token_clip_quantile is None or self.settings.released:
            return
        values = torch.cat([d.detach()[m] for d, m in zip(divergences, masks, strict=True)])
        ceiling = masked_quantile(
            values, torch.ones_like(values, dtype=torch.bool), self.settings.token_clip_quantile, self.tokens.group
        )
        if math.isfinite(float(ceiling)):  # infinite: nothing was kept in this step, and the last ceiling stays
            self.ceiling = max(float(ceiling), 1e-6)


def _begins_here(heard: Heard) -> Tensor:
    """`[B]`: sequences whose first kept token is mine, so that of the ranks that share a sequence one counts it."""
    return heard.mine.gather(1, heard.mask.int().argmax(1, keepdim=True)).squeeze(1)


def _pad(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[-1]))


def _given(values: Tensor | None) -> Tensor:
    assert values is not None, "the step did not compute what its settings need"
    return values
