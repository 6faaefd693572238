"""What came in and went out again says the same, in `transformers` and in vLLM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unisd_megatron.cli import main
from unisd_megatron.families import FAMILIES
from unisd_megatron.weights import internlm3
from unisd_megatron.weights.tiny import VOCAB_SIZE, write_tiny

LENGTH = 16


def prompts() -> list[list[int]]:
    """The last are longer than a window and than a cache block."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (5, 6, 7, 8, 9, 70, 71, 72)]


def continuations(folder: Path) -> list[list[int]]:
    internlm3.register()
    how = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    model.generation_config.eos_token_id = None
    said = []
    for ids in prompts():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=LENGTH)
        said.append(out[0, len(ids) :].tolist())
    return said


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.timeout(600)
def test_an_exported_folder_says_what_the_original_says(tmp_path: Path) -> None:
    exported = {}
    for family in FAMILIES:
        original, megatron, exported[family] = (tmp_path / family / kind for kind in ("hf", "megatron", "exported"))
        write_tiny(family, original, seed=3)
        assert main(["convert", "import", "--model_name", str(original), "--output_dir", str(megatron)]) == 0
        assert main(["convert", "export", "--model_name", str(megatron), "--output_dir", str(exported[family])]) == 0
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    folders = {family: str(folder) for family, folder in exported.items()}
    asked.write_text(json.dumps({"folders": list(folders.values()), "prompts": prompts(), "length": LENGTH}))
    program = Path(__file__).with_name("vllm_texts.py")
    done = subprocess.run(
        [sys.executable, str(program), str(asked), str(answered)],
        capture_output=True,
        text=True,
        timeout=500,  # 60 s on two idle cores
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(answered.read_text())
    for family, folder in folders.items():
        expected = continuations(tmp_path / family / "hf")
        assert len({tuple(text) for text in expected}) > len(expected) / 2, f"{family}: one text for most prompts"
        assert continuations(Path(folder)) == expected, family
        assert said[folder] == expected, family
