"""Tiny random Hugging Face checkpoints with a byte-level tokenizer, for tests, demos and parity checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.families import family_named
from unisd_megatron.weights import internlm3
from unisd_megatron.weights.hf import new_folder

# Under these names AutoTokenizer loads what was saved: beside a `qwen2` config it makes a Qwen2Tokenizer of any folder,
# which would otherwise add an `<|endoftext|>` of its own outside the embedding.
PAD, EOS = "<|endoftext|>", "<|im_end|>"
PAD_ID, EOS_ID = 0, 1
VOCAB_SIZE = 300  # wider than the tokenizer's 258 entries, and not a multiple of anything useful


def tiny_model(family: str, seed: int, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A random fp32 model of the family, made by `transformers` itself; biases and norms are random too.

    `changes` replace entries of the family's tiny config. Raises `ConfigError` for a family that is not supported.
    """
    described = family_named(family)
    settings = dict(described.tiny_config()) | dict(changes or {})
    internlm3.register()
    config = AutoConfig.for_model(
        settings.pop("model_type"), vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID, pad_token_id=PAD_ID, **settings
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()  # grouped products have no fp64
    generator = torch.Generator().manual_seed(seed)
    spread = config.hidden_size**-0.5  # logits of a few units, whatever the size
    lowest = -0.5 if described.arch(config.to_dict()).zero_centered_norms else 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(lowest + torch.rand(parameter.shape, generator=generator))
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, behind padding and end-of-sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {PAD: PAD_ID, EOS: EOS_ID} | {character: i for i, character in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def write_tiny(family: str, folder: Path, seed: int, changes: Mapping[str, Any] | None = None) -> None:
    """Writes the model (see `tiny_model`) and the tokenizer; complete or not there.

    Raises `CheckpointError` if the folder exists, `ConfigError` for a seed that torch does not take, `CheckFailed` where the
    disk does not take it.
    """
    family_named(family)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}; it must be from 0 to 2^63 - 1")
    with new_folder(folder) as partial:
        model = tiny_model(family, seed, changes)
        model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
        try:
            model.save_pretrained(partial)
            byte_tokenizer().save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:  # of the Rust libraries' own writers
            raise CheckFailed(f"{partial}: could not be written ({' '.join(str(error).split())[:200]})") from error
