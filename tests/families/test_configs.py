"""The published configurations give the published models: parameter counts, tensor names and shapes, without allocating."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration, PreTrainedModel

from unisd_megatron.cli import main
from unisd_megatron.convert.source import open_source
from unisd_megatron.errors import ConfigError
from unisd_megatron.families import FAMILIES, family_of
from unisd_megatron.families.published import published
from unisd_megatron.mcore.rope import rotary_embedding
from unisd_megatron.plan import PUBLISHED, config_of
from unisd_megatron.weights import internlm3
from unisd_megatron.weights.hf import HfFolder
from unisd_megatron.weights.tiny import byte_tokenizer


def on_meta(config: dict[str, Any]) -> PreTrainedModel:
    """The `transformers` model of a config, without memory."""
    internlm3.register()
    settings = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    known = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device("meta"):
        return Gemma3ForConditionalGeneration(known) if "vision_config" in config else AutoModelForCausalLM.from_config(known)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_model(name: str) -> None:
    config = config_of(name)
    reference = on_meta(config)
    assert sum(parameter.numel() for parameter in reference.parameters()) == PUBLISHED[name]
    text = config.get("text_config", config)
    family = family_of(text)
    mappings = family.mappings(family.arch(text))
    shapes = {hf: shape for mapping in mappings for hf, shape in zip(mapping.hf, mapping.shapes, strict=True)}
    if "vision_config" in config:
        named = [(f"model.{tensor}", weight) for tensor, weight in reference.model.language_model.named_parameters()]
    else:
        named = list(reference.named_parameters())
        assert sum(math.prod(shape) for shape in shapes.values()) == PUBLISHED[name]
    assert shapes == {tensor: tuple(weight.shape) for tensor, weight in published(named).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_means_what_transformers_reads_from_it(name: str) -> None:
    """Published spellings and those that this `transformers` writes back are one model."""
    config = config_of(name)
    text = config.get("text_config", config)
    settings = {key: value for key, value in text.items() if key not in ("model_type", "auto_map")}
    internlm3.register()
    written = AutoConfig.for_model(text["model_type"], **settings).to_dict()
    assert family_of(written).arch(written) == family_of(text).arch(text)


def test_details_that_a_count_does_not_show() -> None:
    arch = {name: family_of(c := config_of(name)).arch(c) for name in PUBLISHED if "vision_config" not in config_of(name)}
    assert arch["Llama-3.1-405B-Instruct"].rope.llama3 == arch["Llama-3.1-8B-Instruct"].rope.llama3
    assert arch["Llama-3.1-8B-Instruct"].rope.base == 500000.0
    assert [arch[name].qkv_bias for name in ("Qwen2.5-7B-Instruct", "Qwen3-8B", "internlm3-8b-instruct")] == [
        True,
        False,
        False,
    ]
    assert arch["internlm3-8b-instruct"].rope.base == 50000000.0
    assert arch["Qwen3-235B-A22B"].experts is not None and arch["Qwen3-235B-A22B"].experts.renormalized
    local = arch["gemma-3-1b-it"].local
    assert local is not None and (local.window, local.rope.base, sum(local.layers)) == (512, 10000.0, 22)
    text = config_of("gemma-3-27b-it")["text_config"]
    large = family_of(text).arch(text)
    assert large.attention_scale == 168**-0.5 and large.rope.linear_factor == 8.0
    assert large.local is not None and [i for i, is_local in enumerate(large.local.layers) if not is_local][:2] == [5, 11]


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types must name"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_act 'silu'"),
        ("internlm3", {"bias": True, "qkv_bias": False}, "qkv_bias is not"),
        ("internlm3", {"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 of only 8"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "layer_types has more than full_attention"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types has more than full_attention"),
        ("qwen3_moe", {"layer_types": "full_attention"}, "layer_types has more than full_attention"),
    ],
)
def test_what_a_family_file_does_not_cover_is_refused(family: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FAMILIES[family].arch(with_changes(family, change))


def with_changes(family: str, change: dict[str, Any]) -> dict[str, Any]:
    return {**FAMILIES[family].tiny_config(), "vocab_size": 300} | change


def without(stated: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in stated.items() if key != name}


LLAMA3 = FAMILIES["llama"].tiny_config()["rope_parameters"]
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": PLAIN, "rope_scaling": LLAMA3}),  # transformers 5 reads the second, 4 knows no first
        ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("gemma3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}),  # 5 passes over `type`
        ("llama", {"original_max_position_embeddings": 64}),
    ],
)
def test_a_rope_that_is_stated_twice_and_differs_is_refused(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="keep the one that is meant"):
        FAMILIES[family].arch(with_changes(family, change))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256}),
        (
            "llama",
            {
                "rope_parameters": without(LLAMA3, "original_max_position_embeddings"),
                "original_max_position_embeddings": 64,
            },
        ),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3", {"rope_parameters": {"full_attention": None, "sliding_attention": None}}),
        ("gemma3", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5}),
    ],
)
def test_a_rope_has_the_frequencies_that_transformers_gives_it(family: str, change: dict[str, Any]) -> None:
    config = with_changes(family, change)
    arch = FAMILIES[family].arch(config)
    settings = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    known = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(known).model.rotary_emb)
    theirs = {name.removesuffix("inv_freq"): one for name, one in kind(known).named_buffers() if "original" not in name}
    made: Any = rotary_embedding(arch, SimpleNamespace(use_cpu_initialization=True))  # type: ignore[arg-type]
    ours = {"": made} if arch.local is None else {"full_attention_": made.of_global, "sliding_attention_": made.of_local}
    assert theirs.keys() == ours.keys()
    for name, embedding in ours.items():
        assert torch.allclose(embedding.inv_freq, theirs[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *(("llama", {"rms_norm_eps": value}) for value in (None, "a", -1, math.nan, 10**400, True)),
        *(("llama", {"rope_parameters": {**PLAIN, "rope_theta": value}}) for value in ("abc", None, -5)),
        *(("llama", {"rope_parameters": {**without(LLAMA3, "factor"), "factor": value}}) for value in (None, 0)),
        ("llama", {"rope_parameters": {**without(LLAMA3, "low_freq_factor"), "low_freq_factor": 4.0}}),
        ("llama", {"rope_parameters": "x"}),
        ("llama", {"head_dim": 33}),
        ("llama", {"tie_word_embeddings": "false"}),
        ("llama", {"vocab_size": 10**30}),
        ("internlm3", {"qkv_bias": "false"}),
        ("qwen3_moe", {"norm_topk_prob": "false"}),
        *(("gemma3", {"query_pre_attn_scalar": value}) for value in (0, None, "x", -4)),
        ("gemma3", {"rope_parameters": None, "rope_theta": None}),
        ("gemma3", {"rope_parameters": {"full_attention": 5}}),
        *(("gemma3", {"layer_types": value}) for value in (5, "abcd", [{}] * 4)),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_key(family: str, change: dict[str, Any]) -> None:
    key, value = list(change.items())[-1]
    if isinstance(value, dict):
        key = list(value)[-1]
    with pytest.raises(ConfigError, match=f"config.json: {key} "):
        FAMILIES[family].arch(with_changes(family, change))


def test_a_config_whose_kind_is_no_word_is_refused() -> None:
    for config, said in (({"model_type": ["llama"]}, "not supported"), ({"text_config": "x"}, "text_config is 'x'")):
        with pytest.raises(ConfigError, match=said):
            family_of({"model_type": "foo", **config})


def test_a_model_that_reads_images_is_refused_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma-3-4b-it")))
    assert main(["convert", "import", "--model_name", str(tmp_path), "--output_dir", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_type 'gemma3' reads images too" in line and "gemma3_text" in line and "docs/families.md" in line


def test_the_documented_way_to_a_language_model_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/families.md, run on a tiny model that reads images."""
    text = {**FAMILIES["gemma3"].tiny_config(), "vocab_size": 300}
    vision = {"hidden_size": 32, "image_size": 28, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "num_hidden_layers": 1})
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0].replace("google/gemma-3-4b-it", "whole"), {})
    source = open_source("gemma-3-4b-text")
    folder = HfFolder(source.path)
    inside = whole.model.language_model.state_dict()
    assert {name.removeprefix("model.") for name in folder.names()} == inside.keys()
    assert all(torch.equal(folder.tensor(f"model.{name}"), tensor) for name, tensor in inside.items())


def test_another_architecture_names_the_supported_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'gpt2' is not supported; use one of qwen2, llama, gemma3_text") as met:
        family_of({"model_type": "gpt2"})
    assert "Bridge" not in str(met.value)
    (tmp_path / "megatron" / "bridge").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"gemma3_text.*Megatron-Bridge.*AutoBridge.import_ckpt"):
        family_of({"model_type": "gpt2"})
