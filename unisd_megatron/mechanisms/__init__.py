"""The five mechanisms of UniSD as arithmetic on tensors [B, T]: pure torch, no model, no trainer, no settings object."""

from unisd_megatron.mechanisms.agreement import Agreement, agreement_weights
from unisd_megatron.mechanisms.clipping import clip_divergence, masked_quantile
from unisd_megatron.mechanisms.contrastive import contrastive_hinge
from unisd_megatron.mechanisms.ema import mix_
from unisd_megatron.mechanisms.matching import feature_distance

__all__ = [
    "Agreement",
    "agreement_weights",
    "clip_divergence",
    "contrastive_hinge",
    "feature_distance",
    "masked_quantile",
    "mix_",
]
