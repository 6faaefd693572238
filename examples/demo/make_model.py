"""Pretrains the demo's base model: a Qwen2 of 125,952 parameters that is mediocre at addition, and why is known.

    python examples/demo/make_model.py            # about four minutes on one CPU thread; writes examples/demo/model/

Self-distillation needs a model that does better with the reference in its prompt than without it. Under-training
gives no such model (it then cannot start at all); here the weakness is written into the pretraining documents:

1. Careless authors. 65 % of the documents without a reference are by an author who writes every carry as 0. Decoding
   a bare question greedily therefore forgets carries, and a carefully solved example in front helps.
2. Unknown facts. For six pairs of digits the authors guess the sum, so only a reference is right about them.
3. References are followed. What stands after `R:` is continued, right or wrong, even after a slip of the model's own.

A base is saved only if it passes the gates on held-out questions outside the demo's test split, measured on the very
files to be saved. Whether a base learns to use a solved example is a matter of luck: seed 0 reaches 6 % there and is
refused; seed 1, the default, reaches 47 %. Another machine may add in another order and need another seed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from unisd_megatron.data.task import Record
from unisd_megatron.data.tasks.addition import (
    LARGEST,
    Addition,
    careful_solution,
    careless_solution,
    is_held_out,
    question_text,
    referred_text,
    solved_text,
)

CHARACTERS = "0123456789+=#;:QRAX\n "
# These two names, because AutoTokenizer makes a Qwen2Tokenizer of any tokenizer beside a `qwen2` config, whatever class
# was saved, and that class appends `<|endoftext|>` behind the embedding's last row unless the vocabulary has it.
PAD, PAD_ID = "<|endoftext|>", 0
EOS, EOS_ID = "<|im_end|>", 1
VOCABULARY = 32  # a round number that two and four tensor-parallel ranks divide
IDS = {character: number for number, character in enumerate(CHARACTERS, start=2)}
IGNORED = -100

UNKNOWN_FACTS = {frozenset(pair) for pair in ((3, 8), (4, 7), (6, 9), (7, 8), (5, 6), (2, 9))}
CARELESS_SHARE = 0.65
BARE_SHARE, AUXILIARY_SHARE = 0.28, 0.25  # the other 47 % of the documents have a reference
GATE_QUESTIONS = 1000
GATES = {"question only": (0.25, 0.40), "with the reference": (0.95, 1.0), "behind a solved example": (0.45, 1.0)}

Question = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining text; `shown` (read) and `target` (to be predicted) are equally long and nearly always equal."""

    prompt: str
    shown: str
    target: str


def draw_question(rng: random.Random) -> Question:
    """A question that is not held out."""
    while True:
        question = rng.randrange(LARGEST + 1), rng.randrange(LARGEST + 1)
        if not is_held_out(*question):
            return question


def redraw_digits(text: str, share: float, rng: random.Random) -> str:
    """The text with each digit redrawn with probability `share`."""
    return "".join(rng.choice("0123456789") if c.isdigit() and rng.random() < share else c for c in text)


def draw_author(rng: random.Random, careless_share: float = CARELESS_SHARE) -> Callable[[int, int], str]:
    """One author's way to solve a question: careless or not, and guessing the facts nobody knows."""

    def guessed_sum(x: int, y: int) -> int:
        return x + y + (rng.randint(-2, 2) if frozenset((x, y)) in UNKNOWN_FACTS else 0)

    solution = careless_solution if rng.random() < careless_share else careful_solution
    return lambda a, b: solution(a, b, guessed_sum)


def solved_example(author: Callable[[int, int], str], rng: random.Random) -> str:
    """Another question, solved by the author."""
    question = draw_question(rng)
    return solved_text(*question, author(*question))


def draw_document(rng: random.Random) -> Document:
    """A document of the pretraining mixture."""
    question, author, kind = draw_question(rng), draw_author(rng), rng.random()
    if kind >= BARE_SHARE + AUXILIARY_SHARE:
        return draw_referred(question, author, rng)
    before = solved_example(author, rng) if kind >= BARE_SHARE else ""
    solution = author(*question)
    return Document(before + question_text(*question), solution, solution)


def draw_referred(question: Question, author: Callable[[int, int], str], rng: random.Random) -> Document:
    """A document with a reference, which is the target; the completion shown may have left it.

    A teacher reads a student's errors behind the reference. Slips in `shown` teach it to keep to the reference then.
    """
    kind, reference = rng.random(), careful_solution(*question)
    if kind < 0.15:
        reference = careless_solution(*question)
    elif kind < 0.35:
        reference = redraw_digits(reference, 0.12, rng)
    shown = reference
    if rng.random() < 0.3:
        shown = draw_author(rng, careless_share=0.5)(*question)
    if rng.random() < 0.6:
        shown = redraw_digits(shown, 0.1, rng)
    before = solved_example(author, rng) if rng.random() < 0.2 else ""
    return Document(before + referred_text(*question, reference), shown, reference)


def encode(text: str) -> list[int]:
    """The ids of a text."""
    return [IDS[character] for character in text]


def batch_tensors(documents: Sequence[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels `[B, S]`; what is not completion or EOS is ignored, right padding included."""
    longest = max(len(document.prompt) + len(document.target) for document in documents)
    inputs = torch.full((len(documents), longest), PAD_ID)
    labels = torch.full((len(documents), longest), IGNORED)
    for row, document in enumerate(documents):
        read = encode(document.prompt + document.shown)
        inputs[row, : len(read)] = torch.tensor(read)
        labels[row, len(document.prompt) - 1 : len(read)] = torch.tensor([*encode(document.target), EOS_ID])
    return inputs, labels


def make_model() -> Qwen2ForCausalLM:
    """The untrained model."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None, eos_token_id=EOS_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, as the only form that AutoTokenizer gives back unchanged: byte-level BPE, no merges."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {PAD: PAD_ID, EOS: EOS_ID}
    vocabulary |= {byte_level.pre_tokenize_str(character)[0][0]: number for character, number in IDS.items()}
    vocabulary |= {f"<|unused_{number}|>": number for number in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=512, clean_up_tokenization_spaces=False
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Exits unless the tokenizer, loaded the way every tool loads it, has this file's ids both ways."""
    example = (347, 285)
    for text in (CHARACTERS, referred_text(*example, careful_solution(*example))):
        ids = tokenizer.encode(text)
        if ids != encode(text) or tokenizer.decode(ids) != text:
            raise SystemExit(f"the tokenizer does not round-trip: {text!r} -> {ids} -> {tokenizer.decode(ids)!r}")
    if (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) != (PAD_ID, EOS_ID, VOCABULARY):
        raise SystemExit(f"pad {tokenizer.pad_token_id}, EOS {tokenizer.eos_token_id}, {len(tokenizer)} entries: not as made")


def pretrain(model: Qwen2ForCausalLM, *, steps: int, seed: int) -> None:
    """Trains the model in place."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up, last = 50, 0.02

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 1 - (1 - last) * (step - warm_up) / max(1, steps - warm_up))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    for step in range(1, steps + 1):
        inputs, labels = batch_tensors([draw_document(rng) for _ in range(64)])
        logits = model(input_ids=inputs).logits  # no attention mask: padding is on the right, where nothing looks
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.monotonic() - started:5.0f} s", flush=True)


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], prompts: Sequence[str]
) -> float:
    """The share of greedy completions that end and are right; `prompts` are equally long."""
    inputs = torch.tensor(tokenizer(list(prompts))["input_ids"])
    outputs = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=40)
    right, task = 0, Addition()
    for record, completion in zip(records, outputs[:, inputs.shape[1] :].tolist(), strict=True):
        if EOS_ID in completion:
            right += task.judge(record, tokenizer.decode(completion[: completion.index(EOS_ID)])).correct
    return right / len(records)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> dict[str, float]:
    """The accuracy on the records for each kind of prompt that has a gate."""
    task, rng = Addition(), random.Random("donors")
    donors = rng.choices(task.load("train", None), k=len(records))
    prompts = {
        "question only": [task.question(record) for record in records],
        "with the reference": [task.teacher_prompt(record, task.reference(record)) for record in records],
        "behind a solved example": [task.auxiliary_prompt(r, [d]) for r, d in zip(records, donors, strict=True)],
    }
    return {kind: accuracy(model, tokenizer, records, texts) for kind, texts in prompts.items()}


def gate_records() -> list[Record]:
    """Held-out questions outside the test split, which would not be held out if a base were chosen on it."""
    task, rng = Addition(), random.Random("gates")
    taken = {record.id for record in task.load("test", None)}
    records: dict[str, Record] = {}
    while len(records) < GATE_QUESTIONS:
        record = task.parse({"a": rng.randrange(LARGEST + 1), "b": rng.randrange(LARGEST + 1)}, len(records))
        if task.keep(record, "test") and record.id not in taken:
            records[record.id] = record
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's base model and save it if it passes its gates.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "model")
    parser.add_argument("--seed", type=int, default=1, help="of initial weights and documents")
    parser.add_argument("--steps", type=int, default=900, help="of 64 documents")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} is less than 1")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        parser.error(f"--output_dir {arguments.output_dir} is a file; name a folder")

    torch.set_num_threads(1)  # the order of summation depends on the number of threads, and so does the base
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        model = make_model()
        print(f"{model.num_parameters():,} parameters, seed {arguments.seed}")
        model.save_pretrained(folder)  # AutoTokenizer reads config.json too: a bad pair has to show before the training
        check_tokenizer(AutoTokenizer.from_pretrained(folder))
        pretrain(model, steps=arguments.steps, seed=arguments.seed)
        model.half().save_pretrained(folder)

        tokenizer = AutoTokenizer.from_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        measured = measure(saved, tokenizer, gate_records())
        failed = [kind for kind, (low, high) in GATES.items() if not low <= measured[kind] <= high]
        for kind, (low, high) in GATES.items():
            verdict = "FAILED" if kind in failed else "passed"
            print(f"{kind:24s} {measured[kind]:6.1%}  gate {low:.0%} to {high:.0%}  {verdict}", flush=True)
        if failed:
            raise SystemExit(f"seed {arguments.seed}: gate failed: {', '.join(failed)}; nothing saved; try another --seed")
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        for path in Path(folder).iterdir():
            shutil.copyfile(path, arguments.output_dir / path.name)  # not copytree: temporary files are their owner's only
    print(f"saved to {arguments.output_dir}")


if __name__ == "__main__":
    main()
