"""Published models by name, without a hub; any other by its `config.json`. No torch here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisd_megatron.errors import ConfigError
from unisd_megatron.families import Arch, family_of

CONFIGS = Path(__file__).parent / "configs"

# Parameters of the safetensors on the hub, a tied head counted once; gemma-3 from 4B on with its image encoder.
PUBLISHED: Mapping[str, int] = {
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen2.5-72B-Instruct": 72_706_203_648,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
    "Llama-3.1-405B-Instruct": 405_853_388_800,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
    "internlm3-8b-instruct": 8_804_241_408,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}


def config_of(name: str) -> dict[str, Any]:
    """The published `config.json` of a name in `PUBLISHED`."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def find_arch(name_or_config: str) -> tuple[str, Arch]:
    """`(name, dimensions)` of a published model, a `config.json`, or a folder that has one.

    Names match without regard to case, the organisation before the slash, and whether the weights are the base model's or the
    instructed one's, which have the same dimensions. Raises `ConfigError` for an unknown name, with the nearest.
    """
    path = Path(name_or_config)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return name_or_config, _read(path)
    known = {_stem(name): name for name in PUBLISHED}
    if (name := known.get(_stem(name_or_config))) is not None:
        config = config_of(name)
        config = config.get("text_config", config)
        return name_or_config.rpartition("/")[2], family_of(config).arch(config)
    near = difflib.get_close_matches(_stem(name_or_config), known, n=3, cutoff=0.0)
    raise ConfigError(
        f"--model_name {name_or_config!r} is no file, no folder with a config.json and no known published model; nearest: "
        f"{', '.join(known[one] for one in near)}"
    )


def _stem(name: str) -> str:
    stem = name.rpartition("/")[2].lower().removeprefix("meta-")
    return re.sub(r"-(instruct|it|pt|base)$", "", stem)


def _read(path: Path) -> Arch:
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object")
    return family_of(config).arch(config)
