"""What an engine returns is a draw from the model it holds: the right tokens, their log-probs, and nobody else's settings."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distributions import distribution, log_probs_of
from unisd_megatron.batch import Completion
from unisd_megatron.config import Layout
from unisd_megatron.errors import CheckFailed, DataError
from unisd_megatron.grid import Axis, Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.rollout.engine import Request, Sampling, sequence_seed
from unisd_megatron.rollout.replay import ReplayEngine, rollout_file
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.tiny import write_tiny
from world import World

ALONE = Grid(*[Axis()] * 9, torch.device("cpu"))
EOS = 1
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=12, eos_ids=(EOS,))
WARM = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=12, eos_ids=(EOS,))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    for family in ("qwen2", "llama"):
        write_tiny(family, root / family, seed=11)
    return {family: root / family for family in ("qwen2", "llama")}


@pytest.fixture(scope="module")
def engine(tiny: dict[str, Path]) -> TransformersEngine:
    return TransformersEngine(tiny["qwen2"], ALONE, torch.float32, batch_size=4)


@pytest.fixture(scope="module")
def reference(tiny: dict[str, Path]) -> PreTrainedModel:
    return load(tiny["qwen2"])


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def requests(count: int = 9, longest: int = 40) -> list[Request]:
    """Ragged prompts of any ids, padding and end-of-sequence among them."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    prompts[0] = [0, EOS, *prompts[0], 0]
    return [Request(f"q{i}", tuple(prompt), sequence_seed(42, 0, i)) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def forced(model: PreTrainedModel, request: Request, completion: Completion, temperature: float) -> Tensor:
    """Log-probs of the completion's tokens from one plain forward pass."""
    logits = model(torch.tensor([request.prompt + completion.token_ids])).logits[0, len(request.prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits.double() / temperature, -1)
    return log_probs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def assert_forced(model: PreTrainedModel, asked: Sequence[Request], got: Sequence[Completion], temperature: float) -> None:
    for request, completion in zip(asked, got, strict=True):
        assert len(completion.log_probs) == len(completion.token_ids)
        found = torch.tensor(completion.log_probs, dtype=torch.float64)
        assert float((found - forced(model, request, completion, temperature)).abs().max()) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_greedy_equals_transformers_one_prompt_at_a_time(tiny: dict[str, Path], family: str) -> None:
    model = load(tiny[family])
    found = TransformersEngine(tiny[family], ALONE, torch.float32, batch_size=4).generate(requests(), GREEDY)
    for request, completion in zip(requests(), found, strict=True):
        prompt = torch.tensor([request.prompt])
        options = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
        assert list(completion.token_ids) == out[0, len(request.prompt) :].tolist()
    assert_forced(model, requests(), found, 1.0)


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> bool:
    return [one.token_ids for one in found] == [one.token_ids for one in expected] and all(
        one.finish_reason == other.finish_reason and one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        for one, other in zip(found, expected, strict=True)
    )


def test_completions_do_not_depend_on_batches_or_order(tiny: dict[str, Path], engine: TransformersEngine) -> None:
    expected = engine.generate(requests(), WARM)
    assert len({completion.token_ids for completion in expected}) == len(expected)
    assert same(engine.generate(requests(), WARM), expected)
    assert same(engine.generate(requests()[::-1], WARM)[::-1], expected)
    assert same([engine.generate([request], WARM)[0] for request in requests()], expected)
    assert same(TransformersEngine(tiny["qwen2"], ALONE, torch.float32, batch_size=64).generate(requests(), WARM), expected)


def test_completions_depend_on_the_seed_of_each_request_alone(engine: TransformersEngine) -> None:
    expected = engine.generate(requests(), WARM)
    changed = requests()
    changed[3] = Request(changed[3].example_id, changed[3].prompt, changed[3].seed + 1)
    found = engine.generate(changed, WARM)
    assert [i for i in range(len(found)) if found[i].token_ids != expected[i].token_ids] == [3]


class Counting(TransformersEngine):
    sampled = 0

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.sampled += len(requests)
        return super()._generate_batch(requests, sampling)


def generate_on_ranks(
    rank: int, group: Any, folder: Path, layout: Layout, asked: list[Request]
) -> tuple[list[Completion], int]:
    platform = platforms.choose()
    with start.world(platform, layout, seed=1) as grid:
        engine = Counting(folder, grid, torch.float32, batch_size=4)
        return engine.generate(asked, WARM) + engine.generate(asked[:1], WARM), engine.sampled  # 1: fewer than ranks


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 1), Layout(1, 2), Layout(2, 2), Layout(4, 1)])
def test_completions_do_not_depend_on_ranks(
    world: World, tiny: dict[str, Path], engine: TransformersEngine, layout: Layout
) -> None:
    expected = engine.generate(requests(), WARM)
    said = world.run(layout.model_parallel_size, generate_on_ranks, tiny["qwen2"], layout, requests())
    assert len(said) == layout.model_parallel_size
    assert all(same(completions, [*expected, expected[0]]) for completions, _ in said)
    assert sum(sampled for _, sampled in said) == len(expected) + 1  # the ranks share the work


def surprise(counts: Counter[int], probs: Tensor) -> float:
    """Chi-square of the counts in standard deviations above its mean; tokens too rare for it are one cell."""
    expected = probs * counts.total()
    cells = [(counts[i], float(expected[i])) for i in torch.nonzero(expected >= 5)[:, 0].tolist()]
    seen, wanted = counts.total() - sum(c for c, _ in cells), counts.total() - sum(e for _, e in cells)
    cells += [(seen, wanted)] if wanted >= 5 else []
    freedom = len(cells) - 1
    return (sum((c - e) ** 2 / e for c, e in cells) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 1.0, 0, 1, (EOS,)),
        Sampling(0.7, 1.0, 6, 1, (EOS,)),
        Sampling(0.7, 0.6, 0, 1, (EOS,)),
        Sampling(0.7, 0.7, 12, 1, (EOS,)),
        Sampling(0.7, 1.0, 0, 1, (EOS,), min_p=0.1),
        Sampling(0.7, 0.9, 0, 1, (EOS,), repetition_penalty=1.5),
    ],
)
def test_tokens_are_drawn_as_often_as_the_definition_says(
    tiny: dict[str, Path], reference: PreTrainedModel, sampling: Sampling
) -> None:
    engine = TransformersEngine(tiny["qwen2"], ALONE, torch.float32, batch_size=500)
    prompt = requests()[2].prompt
    found = engine.generate([Request("q", prompt, sequence_seed(42, step, 7)) for step in range(4000)], sampling)
    counts = Counter(one.token_ids[0] for one in found)
    with torch.no_grad():
        probs = distribution(reference(torch.tensor([prompt])).logits[0, -1], prompt, sampling)
    assert surprise(counts, probs) < 4
    support = set(torch.nonzero(probs)[:, 0].tolist())
    assert counts.keys() <= support
    if not sampling.is_plain:
        assert counts.keys() == support or len(support) > 50
    hotter = torch.where(probs > 0, probs.sqrt(), 0)  # twice the temperature over the same tokens
    assert surprise(counts, hotter / hotter.sum()) > 4  # else the bound would be too wide to tell


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, 1.0, 0, 12, (EOS,)),
        Sampling(0.8, 0.7, 0, 12, (EOS,)),
        Sampling(1.3, 1.0, 9, 12, (EOS,), min_p=0.05),
        Sampling(0.9, 0.95, 0, 12, (EOS,), repetition_penalty=1.3),
    ],
)
def test_log_probs_are_those_of_the_sampling_distribution(
    reference: PreTrainedModel, engine: TransformersEngine, sampling: Sampling
) -> None:
    for request, one in zip(requests(), engine.generate(requests(), sampling), strict=True):
        assert one.log_probs == pytest.approx(log_probs_of(reference, request.prompt, one.token_ids, sampling), abs=1e-5)


def test_top_k_one_is_greedy(engine: TransformersEngine) -> None:
    found, greedy = engine.generate(requests(), Sampling(1.5, 1.0, 1, 12, (EOS,))), engine.generate(requests(), GREEDY)
    assert [one.token_ids for one in found] == [one.token_ids for one in greedy]


def test_each_of_two_end_of_sequence_ids_ends_a_completion(engine: TransformersEngine) -> None:
    endless = engine.generate(requests(), Sampling(0.7, 1.0, 0, 12, (299,)))
    assert all(299 not in one.token_ids and len(one.token_ids) == 12 and one.finish_reason == "length" for one in endless)
    ends = (endless[0].token_ids[4], endless[1].token_ids[6])
    found = engine.generate(requests(), Sampling(0.7, 1.0, 0, 12, ends))
    for one, whole in zip(found, endless, strict=True):
        place = next((i for i, token in enumerate(whole.token_ids) if token in ends), None)
        assert one.token_ids == whole.token_ids[: 12 if place is None else place + 1]
        assert one.finish_reason == ("length" if place is None else "stop")
        assert one.log_probs == pytest.approx(whole.log_probs[: len(one.token_ids)], abs=1e-5)
    assert {one.token_ids[-1] for one in found if one.finish_reason == "stop"} == set(ends)


def test_an_end_at_the_last_place_still_is_an_end(engine: TransformersEngine) -> None:
    whole = engine.generate(requests()[:1], WARM)[0].token_ids
    (found,) = engine.generate(requests()[:1], Sampling(0.7, 1.0, 0, 5, (whole[4],)))
    assert (found.token_ids[-1], found.finish_reason) == (whole[4], "stop")


def test_generation_settings_of_the_checkpoint_do_not_act(
    tiny: dict[str, Path], engine: TransformersEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "opinionated"
    shutil.copytree(tiny["qwen2"], folder)
    opinions = {"repetition_penalty": 1.9, "top_k": 5, "top_p": 0.5, "temperature": 0.3, "do_sample": True}
    opinions |= {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(150)), "min_new_tokens": 30, "max_length": 3}
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | opinions))
    found = TransformersEngine(folder, ALONE, torch.float32)
    for sampling in (WARM, GREEDY):
        assert same(found.generate(requests(), sampling), engine.generate(requests(), sampling))
    prompt = torch.tensor([requests()[1].prompt])
    stated = load(folder).generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    assert stated != list(engine.generate(requests()[1:2], GREEDY)[0].token_ids)  # left alone, they do act


class Listed:
    """Tensors as the one bucket of a stream."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def everywhere(self) -> Iterator[list[tuple[str, Tensor]]]:
        yield list(self._tensors.items())


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_after_a_refresh_the_new_weights_speak(tiny: dict[str, Path], family: str) -> None:
    engine, model = TransformersEngine(tiny[family], ALONE, torch.float32), perturbed(load(tiny[family]))
    before = engine.generate(requests(), WARM)
    engine.refresh(Listed(weights(model)), step=1)
    after = engine.generate(requests(), WARM)
    assert_forced(model, requests(), after, WARM.temperature)
    assert [one.log_probs for one in after] != [one.log_probs for one in before]


def test_a_folder_without_weights_waits_for_its_refresh(
    tiny: dict[str, Path], engine: TransformersEngine, reference: PreTrainedModel, tmp_path: Path
) -> None:
    shutil.copyfile(tiny["qwen2"] / "config.json", tmp_path / "config.json")
    bare = TransformersEngine(tmp_path, ALONE, torch.float32)
    bare.refresh(Listed(weights(reference)), step=0)
    assert same(bare.generate(requests(), WARM), engine.generate(requests(), WARM))


def test_a_stream_of_weights_that_does_not_fit_is_refused_by_name(tiny: dict[str, Path]) -> None:
    engine, name = TransformersEngine(tiny["llama"], ALONE, torch.float32), "model.layers.1.self_attn.k_proj.weight"
    right = weights(load(tiny["llama"]))
    for step, stream, words in [
        (1, {n: t for n, t in right.items() if n != name}, f"step 1: the stream lacks {name} and 0 more"),
        (2, {n: t for n, t in right.items() if n != "lm_head.weight"}, "step 2: the stream lacks lm_head.weight"),
        (3, right | {"model.layers.9.mlp.up_proj.weight": right[name]}, "no model.layers.9.mlp.up_proj.weight"),
        (4, right | {name: right[name].t().contiguous()}, f"no {name} of shape (64, 128)"),
    ]:
        with pytest.raises(CheckFailed) as caught:
            engine.refresh(Listed(stream), step)
        assert words in str(caught.value)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"q{i}",
            "seed": 100 + i,
            "prompt": [i, 7],
            "completion": [20 + i, 1],
            "log_probs": [-0.5, -i],
            "finish_reason": "stop",
        }
        for i in range(3)
    ]
    rollout_file(tmp_path, 4).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_replay_returns_what_was_recorded_for_each_seed(recording: Path) -> None:
    engine = ReplayEngine(recording)
    engine.refresh(Listed({}), step=4)
    found = engine.generate([Request("q2", (2, 7), 102), Request("q0", (0, 7), 100)], WARM)
    assert found == [Completion((22, 1), (-0.5, -2), "stop"), Completion((20, 1), (-0.5, 0), "stop")]


def test_replay_refuses_what_was_not_recorded(recording: Path) -> None:
    engine = ReplayEngine(recording)
    engine.refresh(Listed({}), step=4)
    for asked in (Request("q0", (0, 8), 100), Request("q0", (0, 7), 999)):
        with pytest.raises(DataError, match=r"step_000004\.jsonl: no completion for q0"):
            engine.generate([asked], WARM)
    engine.refresh(Listed({}), step=5)
    with pytest.raises(DataError, match=r"step_000005\.jsonl: no recording of step 5"):
        engine.generate([Request("q0", (0, 7), 100)], WARM)
    with pytest.raises(DataError, match="no such folder"):
        ReplayEngine(recording / "absent")
