"""Loss and gradient of every mode under this layout, against one process.

The product runs as in training (teacher schedule, student schedule, gradient reduction) on a tiny model; rank 0 computes
the same step with `transformers` and the dense fp64 oracle, one sequence at a time. Gradients are compared as full
Hugging Face tensors. Losses alone would not do: the classic bug of this field leaves the loss exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisd_megatron.batch import NEGATIVE, STUDENT, TEACHER, Completion, Prompts, Sample, auxiliary
from unisd_megatron.config import Layout, Optimization
from unisd_megatron.errors import CheckFailed, ConfigError
from unisd_megatron.exchange import broadcast_json
from unisd_megatron.families import family_named
from unisd_megatron.families.published import published
from unisd_megatron.grid import Grid
from unisd_megatron.mcore.model import Stage, build
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.mcore.student import Student
from unisd_megatron.mcore.teacher import Teacher
from unisd_megatron.mechanisms.objective import LossSettings, Objective, loss_settings
from unisd_megatron.modes import MODES
from unisd_megatron.parity import oracle
from unisd_megatron.resolve import resolve
from unisd_megatron.train.learner import Learner
from unisd_megatron.train.step import compute_gradients, gather_tally, share_out
from unisd_megatron.weights import stream
from unisd_megatron.weights.tiny import VOCAB_SIZE, tiny_model

TOLERANCE = 1e-5
"""Largest relative difference of a loss or a gradient, fp32 against fp64."""
BF16_TOLERANCE, BF16_GRADIENT_TOLERANCE = 2e-2, 0.1
"""In bf16, of a loss or the gradient's norm, and of a tensor of the gradient, against fp64 on the same rounded weights.

Dense families were seen to need 9e-3 and 5e-2; a reduction that is missing or done twice costs ten times that.
"""

SEQUENCES, VIEWS = 8, 3


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    loss: float
    loss_error: float  # relative
    gradient_error: float  # relative, worst tensor; see `gradient_error`
    norm_error: float  # relative, of the global gradient norm that clipping uses
    holds: bool


class InMemory:
    """A `transformers` model as a source of tensors for `stream.load`."""

    path = "the tiny model"

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = published(model.state_dict().items())

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class Rig:
    """Tiny student and teacher under a layout, and the same two as `transformers` models.

    Args: platform: what it runs on, and whether gradients are reduced under the backward pass.
    """

    def __init__(self, layout: Layout, platform: Platform, grid: Grid, family: str = "qwen2", path: str = "fused") -> None:
        oracle.without_tf32()
        self.layout, self.grid, self.path = layout, grid, path
        self.references = tiny_model(family, seed=1), tiny_model(family, seed=2)
        if layout.bf16:  # the oracle's weights are the rounded ones
            self.references = tuple(reference.bfloat16().float() for reference in self.references)
        self.arch = family_named(family).arch(self.references[0].config.to_dict())
        self.mappings = family_named(family).mappings(self.arch)
        tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
        self.arch.check_layout(tensor, layout.virtual_stages, f"the tiny {family}", expert, layout.pipeline_ends)
        if layout.bf16 and self.arch.experts is not None:
            raise ConfigError(f"--bf16 rounds which experts a router picks, so no bound would hold; compare {family} in fp32")
        models = [build(self.arch, layout, platform, grid) for _ in self.references]
        for model, reference in zip(models, self.references, strict=True):
            self._load(model, reference)
        self.student = Student(models[0], layout, Optimization(), 10, grid, platform)
        self.teacher = Teacher(models[1], "frozen", grid)
        self.samples = make_samples()
        if grid.world.rank == 0:
            self.references = tuple(reference.double() for reference in self.references)

    def _load(self, model: Stage, reference: torch.nn.Module) -> None:
        stream.load(model.named_shards(), self.mappings, InMemory(reference), self.grid.tensor)  # type: ignore[arg-type]

    def gradients(
        self, settings: LossSettings, samples: list[Sample], teacher: Teacher | None = None
    ) -> tuple[float, dict[str, Tensor], float]:
        """Loss, full gradients by Hugging Face name, and the norm that clipping would use, on every rank. Collective."""
        objective = Objective(settings, self.grid.data, self.grid.data_context)
        teacher = None if settings.likelihood else teacher or self.teacher
        learner = Learner(self.student, teacher, objective, self.arch, self.grid)
        work = share_out(samples, learner, self.layout, mask_truncated=True)
        tally = gather_tally(compute_gradients(learner, work), self.grid)
        gradients = dict(stream.full_tensors(self.student.named_gradients(), self.mappings, self.grid))
        return tally.read()["loss"], gradients, self.student.gradient_norm()

    @functools.cached_property
    def _heard(self) -> list[dict[str, oracle.Said]]:
        """What the references say about every sample behind every view; the student's with its graph. Read once."""
        student, teacher = self.references
        heard = []
        for sample in self.samples:
            views, completion = sample.prompts.views, sample.completion.token_ids
            with torch.no_grad():
                said = {name: oracle.read(teacher, views[name], completion) for name in views if name != STUDENT}
            heard.append({STUDENT: oracle.read(student, views[STUDENT], completion), **said})
        return heard

    def expected(self, settings: LossSettings) -> tuple[float, dict[str, Tensor]]:
        """The same from the oracle; on rank 0 only."""
        loss = oracle.step_loss(self._heard, self.samples, settings, mask_truncated=True)
        parameters = dict(self.references[0].named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        return float(loss.detach()), published(zip(parameters, gradients, strict=True))


def make_samples() -> list[Sample]:
    """A fixed global batch of ragged sequences; one was cut and one was filtered out, which count for nothing.

    Two are references, which no engine sampled. Log-probs of the others are such that importance ratios lie around 1.
    """
    rng = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(low, high)))

    samples = []
    for i in range(SEQUENCES):
        names = [STUDENT, TEACHER, NEGATIVE, *(auxiliary(k) for k in range(VIEWS))]
        prompts = Prompts(str(i), {name: ids(3, 20) for name in names})
        completion = ids(1, 12)
        log_probs = () if i in (0, 3) else tuple(rng.uniform(-7.0, -4.0) for _ in completion)
        said = Completion(completion, log_probs, "length" if i == 5 else "stop")
        samples.append(Sample(prompts, said, counts=i != 2))
    return samples


def cases(path: str) -> Iterator[tuple[str, LossSettings]]:
    """Every mode, and the divergences, statistics and clipping that modes share."""
    for mode in MODES:
        yield mode, _settings(mode, path)
    vanilla = _settings("vanilla", path)
    yield "reverse KL", dataclasses.replace(vanilla, alpha=1.0)
    yield "JSD 0.3", dataclasses.replace(vanilla, alpha=0.3)
    yield "clip 2", dataclasses.replace(vanilla, token_clip=2.0)
    yield "unisd_star, JSD 0.5, clip 0.2", dataclasses.replace(_settings("unisd_star", path), alpha=0.5, token_clip=0.2)
    yield "reverse KL, entry clip 0.02", dataclasses.replace(vanilla, alpha=1.0, entry_clip=0.02)
    yield "JSD 0.3, entry clip 0.02", dataclasses.replace(vanilla, alpha=0.3, entry_clip=0.02)
    yield "unisd_star without 2 tokens", dataclasses.replace(_settings("unisd_star", path), skipped_tokens=2)
    yield "agreement_seq range", dataclasses.replace(_settings("agreement_seq_random", path), agreement_stat="range", gamma=0.5)
    yield "agreement_tok range", dataclasses.replace(_settings("agreement_tok_random", path), agreement_stat="range")


def _settings(mode: str, path: str) -> LossSettings:
    flags = {"mode": mode, "model_name": "tiny", "loss_path": path}
    return dataclasses.replace(loss_settings(resolve(flags, {})), views=VIEWS)


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Worst relative L2 difference of a tensor, infinite if anything is not finite.

    Tensors whose gradient vanishes by symmetry (key biases) are measured against 1e-3 of the whole gradient's norm.
    Raises `CheckFailed` if the expected gradient is zero: such a case could not fail.
    """
    whole = total_norm(expected)
    if not whole > 0:
        raise CheckFailed("parity: the oracle's gradient is zero, so the case compares nothing")
    errors = torch.stack(
        [(found[name].cpu().double() - g).norm() / torch.maximum(g.norm(), 1e-3 * whole) for name, g in expected.items()]
    )
    return float(errors.max()) if bool(torch.isfinite(errors).all()) else math.inf


def total_norm(gradients: dict[str, Tensor]) -> Tensor:
    """The L2 norm over all tensors, fp64 scalar."""
    return torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()


def compare(rig: Rig, say: Callable[[Case], None] = lambda case: None) -> list[Case]:
    """All cases, on every rank. Collective over all ranks."""
    results: list[Case] = []
    known: dict[LossSettings, Case] = {}
    for name, settings in cases(rig.path):
        if settings in known:  # modes that differ in their contexts or their teacher's schedule share a loss
            results.append(dataclasses.replace(known[settings], name=name))
            say(results[-1])
            continue
        loss, gradients, norm = rig.gradients(settings, rig.samples)
        outcome = None
        if rig.grid.world.rank == 0:
            expected_loss, expected = rig.expected(settings)
            expected_norm = float(total_norm(expected))
            errors = [
                abs(loss - expected_loss) / abs(expected_loss),
                gradient_error(gradients, expected),
                abs(norm - expected_norm) / expected_norm,
            ]
            outcome = [name, loss, *errors, _hold(errors, rig.layout.bf16)]
        known[settings] = Case(*broadcast_json(outcome, 0, rig.grid.world))
        results.append(known[settings])
        say(results[-1])
    for alpha in (0.0, 0.3, 1.0):
        results.append(_same_model(rig, alpha))
        say(results[-1])
    return results


def _hold(errors: Sequence[float], bf16: bool) -> bool:
    """Errors of loss, gradient and norm."""
    bounds = (BF16_TOLERANCE, BF16_GRADIENT_TOLERANCE, BF16_TOLERANCE) if bf16 else (TOLERANCE,) * 3
    return all(error <= bound for error, bound in zip(errors, bounds, strict=True))


def _same_model(rig: Rig, alpha: float) -> Case:
    """Student and teacher are one model reading one prompt: loss and gradient must vanish."""
    settings = dataclasses.replace(_settings("vanilla", rig.path), alpha=alpha)
    same = [
        Sample(Prompts(s.prompts.id, dict(s.prompts.views) | {TEACHER: s.prompts.views[STUDENT]}), s.completion, s.counts)
        for s in rig.samples
    ]
    loss, gradients, norm = rig.gradients(settings, same, Teacher(rig.student.model, "live", rig.grid))
    size = float(total_norm(gradients))
    holds = abs(loss) <= 1e-7 and size <= 1e-6 and norm <= 1e-6
    return Case(f"student = teacher, alpha {alpha:g}", loss, abs(loss), size, norm, holds)
