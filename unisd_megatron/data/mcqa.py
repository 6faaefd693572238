"""Multiple-choice tasks: one prompt, one form of the reference, one strict reading of the answer, for all of them.

The reference is `Reasoning: ...` and then `Answer: <letter>`, which is what the prompt asks for. Options stand in the order in
which they were published, since explanations name their letters ("Ans. is 'c'"); a task whose right answer is always published
first gives an order of its own. The released code shuffles all of them by their position in the file.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unisd_megatron.data import prompts
from unisd_megatron.data.task import Corruption, Record, Task, Verdict
from unisd_megatron.data.thoughts import without_thoughts

LETTERS = "ABCDEFGHIJ"
RELEASED_SEED = 42

# A statement of the answer: a label, then a letter and nothing that makes the letter a word ("Answer: Because", "A magnet").
_NAME = r"(?:answer(?:[ ](?:choice|option|letter))?|(?:correct|right|best|final)[ ](?:choice|option|letter))"
_LABEL = re.compile(
    rf"(?P<field>(?<![\w-]){_NAME}[*_`\"']*[ \t]*[:=\uff1a]|\\boxed(?={{))"  # the third is the colon of Chinese
    rf"|(?<![\w-]){_NAME}[*_`]*[ ](?:is|(?:must|should|would)[ ]be)\b:?"
    rf"|^[*_#]{{0,3}}[ ]?(?:final[ ])?{_NAME}[*_]{{0,3}}[ ][-–—](?=[ ])",
    re.IGNORECASE | re.ASCII | re.MULTILINE,
)
_OPENING = r"(?:[\s*_`\"'(\[{<$]|\\(?:boxed|text|textbf|mathrm)\b|\\\(){0,12}"  # bounded, as are all: time stays linear
_CLOSING = r"(?:[*_`\"')\]}>$]|\\\)){0,12}"
_LETTER = rf"{_OPENING}(?:(?:option|choice|letter)\b{_OPENING})?(?P<letter>[A-Za-z]){_CLOSING}"
_LAST = r"[.!]?[*_]{0,3}[ \t]*(?:\n|\Z)"
_AFFIRMED = rf"(?=[ ]is[ ](?:the[ ])?(?:correct|right)(?:[ ](?:answer|option|choice))?{_LAST})"
_END = r"(?:(?=\s*$|[ \t]*\n|[.,;:!](?!\w)|[ \t]+(?:[(–—]|-[ ]|(?:because|since|as)\b))|(?<=[)\]}>])(?!\w))"
_STATED = re.compile(rf"{_LETTER}(?:{_END}|{_AFFIRMED})", re.ASCII | re.IGNORECASE)
_SUBJECT = re.compile(  # "C is the correct answer."
    rf"^(?:(?:so|thus|hence|therefore),?[ ])?{_LETTER}[ ]is[ ]the[ ](?:correct|right|best)[ ](?:answer|option|choice){_LAST}",
    re.ASCII | re.IGNORECASE | re.MULTILINE,
)
_SPECIAL_TOKEN = re.compile(r"</s>|<\|\w{1,30}\|>|<end_of_turn>")
_LISTED = re.compile(rf"[ ]?(?:[,;.&/|+]|and\b|or\b)[ ]?(?:(?:and|or)[ ])?{_LETTER}{_END}", re.ASCII | re.IGNORECASE)
_ALONE = re.compile(rf"{_LETTER}[.:!]?{_CLOSING}\s*", re.ASCII | re.IGNORECASE)
_LEADING = re.compile(rf"{_LETTER}[.:]?{_CLOSING}[ \t]+(?P<text>.+)", re.ASCII | re.IGNORECASE)


class ChoiceTask(Task):
    """A task whose records are made by `choice_record`; a subclass says where they come from."""

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """All records of a split; released: with the options shuffled by the position among the records that are kept."""
        records = super().load(split, data_path)
        return [_released_order(record, place) for place, record in enumerate(records)] if self.released else records

    def question(self, record: Record) -> str:
        letters = "/".join(_options(record))
        return (
            f"Answer the following multiple-choice question.\n\n{_problem(record)}\n\n"
            "Reason briefly, then give the letter of the one right option on the last line, and nothing after it.\n\n"
            f"## Output format\nReasoning: <at most 3 short sentences>\nAnswer: <{letters}>"
        )

    def reference(self, record: Record) -> str:
        explanation, letter = record.fields["explanation"], right_letter(record)
        if self.released and not explanation:
            return letter
        return _solution(explanation, letter)

    def judge(self, record: Record, completion: str) -> Verdict:
        read = released_answer if self.released else stated_answer
        answer = read(completion, _options(record))
        if answer is None:
            return Verdict(False, "no answer")
        correct = answer == right_letter(record)
        return Verdict(correct, None if correct else "wrong answer")

    def options(self, record: Record) -> Mapping[str, str]:
        return {letter: _solution("", letter) for letter in _options(record)}

    def group(self, record: Record) -> str | None:
        return record.fields["group"]

    def topic(self, record: Record) -> str:
        return record.fields["question"]

    # No `corrupt`: a rule can change the letter but not argue for it, and a wrong letter without reasoning, or behind the
    # reasoning for the right one, would differ from the reference in form and not only in content.

    def corruptions(self, record: Record) -> Sequence[Corruption]:
        """One for each wrong letter; not for an option that says the same as the right one."""
        options, right = _options(record), right_letter(record)
        wrong = [letter for letter, text in options.items() if text.casefold() != options[right].casefold()]
        return [Corruption(f"wrong option {letter}", _request(record, letter, options[letter])) for letter in wrong]

    def negative(self, record: Record, corruption: Corruption, reasoning: str, answer: str) -> str | None:
        """The reasoning with the letter asked for; None without reasoning, or where the model went for another letter.

        The released code takes any reasoning, and ends with a full stop where its reference has none.
        """
        letter, reasoning = corruption.kind[-1], reasoning.strip().removeprefix("Reasoning:").strip()
        if self.released:
            return f"{_solution(reasoning, letter)}."
        given = stated_answer(answer, _options(record))
        return _solution(reasoning, letter) if reasoning and given in (None, letter) else None

    def teacher_prompt(self, record: Record, solution: str, *, negative: bool = False) -> str:
        """Released: wrong solutions stand without the line end before and after, right ones with a line more."""
        if not self.released:
            return super().teacher_prompt(record, solution, negative=negative)
        more = "\n" if record.fields["explanation"] and not negative else ""
        prompt = prompts.with_solution(self.question(record), solution + more)
        return prompt.strip("\n") if negative else prompt

    def auxiliary_prompt(self, record: Record, donors: Sequence[Record], *, gold: bool = False) -> str:
        """Released: donors in another form than the task: `A) text`, no lecture, the answer before its explanation."""
        if not self.released:
            return super().auxiliary_prompt(record, donors, gold=gold)
        return prompts.behind_examples(self._asked(record, gold), [_released_example(donor) for donor in donors])


def choice_record(
    identity: str,
    question: object,
    choices: object,
    answer: object,
    *,
    explanation: object = "",
    context: Mapping[str, object] | None = None,
    group: str | None = None,
    order: Sequence[int] | None = None,
) -> Record:
    """The record of a question with `choices`, of which number `answer` (from 0) is right.

    `context`: texts to show between question and options, by their heading; empty ones are left out. `order`: the places of the
    choices, as published where it is not given. Raises `ValueError` for what is not a question with one right choice.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}; expected a text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"the choices are {choices!r}; expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"there are {len(choices)} choices; expected 2 to {len(LETTERS)}")
    if type(answer) is not int or not 0 <= answer < len(choices):  # `true` is an int to isinstance
        raise ValueError(f"the answer is {answer!r}; expected a whole number from 0 to {len(choices) - 1}")
    shown = {heading: _text(text, heading) for heading, text in (context or {}).items()}
    fields = {
        "question": question.strip(),
        "choices": [choice.strip() for choice in choices],
        "answer": answer,
        "order": list(order if order is not None else range(len(choices))),
        "explanation": _text(explanation, "the explanation"),
        "context": {heading: text for heading, text in shown.items() if text},
        "group": group,
    }
    return Record(identity, fields)


def right_letter(record: Record) -> str:
    """The letter under which the right choice is shown."""
    return LETTERS[record.fields["order"].index(record.fields["answer"])]


def stated_answer(completion: str, options: Mapping[str, str]) -> str | None:
    """The letter that a completion states last: in an `Answer:` field or sentence; else alone on its last line; else None.

    None too where the last statement gives no letter of this question, or its line gives two different ones.
    """
    text = _SPECIAL_TOKEN.sub("\n", without_thoughts(completion)).strip()
    found = sorted(_statements(text, options), key=lambda statement: statement[0])
    if not found:
        return _lone_letter(text, options)
    place, last = found[-1]
    line_start = text.rfind("\n", 0, place) + 1
    on_line = {letter for place, letter in found if place >= line_start and letter is not None}
    return last if last in options and len(on_line) == 1 else None


def _statements(text: str, options: Mapping[str, str]) -> Iterator[tuple[int, str | None]]:
    """`(place, letter)` of every statement of an answer; no letter where the field `Answer:` holds something else."""
    yield from ((match.start("letter"), match["letter"].upper()) for match in _SUBJECT.finditer(text))
    for label in _LABEL.finditer(text):
        match = _STATED.match(text, label.end())
        if match is not None and not _is_abbreviation(text[match.end() :], options.get(match["letter"].upper(), "")):
            yield label.start(), match["letter"].upper()
            other = _LISTED.match(text, match.end())
            if other is not None:
                yield label.start(), other["letter"].upper()
        elif label["field"]:
            yield label.start(), None


def _is_abbreviation(after: str, option: str) -> bool:
    """Whether a letter is the abbreviation of a name ("C. albicans"): a small word behind its dot, not this option's text."""
    return after[:2] == ". " and after[2:3].islower() and not after[2:].casefold().startswith(option.rstrip(".").casefold())


def _lone_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter on the last line, if that holds nothing else, or is all there is and goes on with this option's text."""
    match = _ALONE.fullmatch(text.rpartition("\n")[2])
    if match is None and (match := _LEADING.fullmatch(text)) is not None:
        named = match["text"].strip().rstrip(".").casefold()
        if named != options.get(match["letter"].upper(), "").rstrip(".").casefold():
            return None
    letter = match["letter"].upper() if match is not None else None
    return letter if letter in options else None


def released_answer(completion: str, options: Mapping[str, str]) -> str | None:
    """The letter that the released code reads: the first hit of five patterns, the first three without a word boundary."""
    letter = f"[{''.join(options)}]"
    for pattern in (
        rf"(?m)^Answer:\s*\(?({letter})",
        rf"[Tt]he answer is\s*\(?({letter})",
        rf"ANSWER:\s*\(?({letter})",
        rf"(?m)^({letter})[.)\s]",
    ):
        match = re.search(pattern, completion.strip())
        if match is not None:
            return match[1]
    *_, last = [None, *re.findall(rf"\b({letter})\b", completion)]
    return last


def _options(record: Record) -> dict[str, str]:
    """The texts to choose among by their letter, in the order shown."""
    return {LETTERS[place]: record.fields["choices"][choice] for place, choice in enumerate(record.fields["order"])}


def _problem(record: Record) -> str:
    context = [f"{heading}: {text}" for heading, text in record.fields["context"].items()]
    options = "\n".join(f"{letter}. {text}" for letter, text in _options(record).items())
    return "\n\n".join([f"Question: {record.fields['question']}", *context, options])


def _solution(reasoning: str, letter: str) -> str:
    return f"Reasoning: {reasoning}\nAnswer: {letter}" if reasoning else f"Answer: {letter}"


def _request(record: Record, letter: str, text: str) -> str:
    return (
        "Play a student who is sure of a wrong answer to this multiple-choice question.\n\n"
        f"{_problem(record)}\n\n"
        f"Argue that the answer is {letter} ({text}).\n"
        f"- Conclude that the answer is {letter}.\n"
        "- Sound plausible, and use the terms of the field.\n"
        "- Give no hint of a doubt, and none that another option could be right.\n"
        "- Write 2 or 3 short sentences.\n\n"
        f'Respond in JSON: {{"reasoning": "<your argument>", "answer": "{letter}"}}'
    )


def _released_order(record: Record, place: int) -> Record:
    order = list(range(len(record.fields["choices"])))
    random.Random(RELEASED_SEED + place).shuffle(order)
    return replace(record, fields={**record.fields, "order": order})


def _released_example(donor: Record) -> tuple[str, str]:
    options = "\n".join(f"{letter}) {text}" for letter, text in _options(donor).items())
    explanation = donor.fields["explanation"]
    answer = f"Answer: {right_letter(donor)}." + (f"\nExplanation: {explanation}" if explanation else "")
    return f"{donor.fields['question']}\n\n{options}", answer


def _text(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; expected a text")
    return (value or "").strip()
