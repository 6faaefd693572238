"""GSM8K: grade-school word problems, whose reference is a worked solution that ends in `#### <number>`.

A wrong solution is a right one with one slip in the arithmetic, carried on through everything computed from it.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from typing import Any

from unisd_megatron.data.task import Corruption, Record, Task, Verdict
from unisd_megatron.data.thoughts import without_thoughts

INSTRUCTION = (
    "Reason step by step. End your response with one last line that holds the final answer as a plain number, in this form:"
    "\n#### <number>"
)
TOLERANCE = Fraction(1, 10_000)
MISTAKES = ("slip in the arithmetic", "wrong operation", "misread quantity", "missing last step")
MISTAKE_REQUEST = """\
You are simulating a confident student who makes one mistake: {kind}.
Solve the problem below step by step, with that mistake in it.

{question}

Rules:
- The final number must be wrong because of that mistake, and everything after it must follow from it.
- Write as if you were sure: no hint of doubt, and never say that there is a mistake.
- Answer in JSON: "reasoning" holds the steps, "answer" the final number alone."""

# A number in running text: thousands commas (western or Indian), then decimals. re.ASCII: other scripts' digits are not read.
_UNSIGNED = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(_UNSIGNED, re.ASCII)
# A minus counts as a sign only where nothing stands before it to subtract from: "10-3" ends in 3.
_MINUS = "[-\u2010\u2011\u2012\u2013\u2212]"  # hyphens, figure and en dash, and the minus of typographers
_ANSWER = re.compile(rf"(?P<sign>(?<![\w)]){_MINUS})?(?:\\?\$(?P<minus>{_MINUS})?)?(?P<number>{_UNSIGNED})", re.ASCII)
# The released code's: a minus is a sign wherever it stands, and only western thousands commas are read.
_RELEASED_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d+)?")
_RELEASED_PHRASES = ("the answer is", "The answer is", "final answer is", "Final answer is", "answer:", "Answer:")
_PHRASE = re.compile(r"(?:the|final) answer is|answer[*_ ]*:|\\boxed\{", re.IGNORECASE)

_REMARK = re.compile(r"\([^()]*\)")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_STEP_OR_NUMBER = re.compile(
    rf"<<(?P<expression>[^<>=]*)=(?P<result>[^<>=]*)>>|{_CALCULATION.pattern}|(?P<number>{_UNSIGNED})(?!\d|st\b|nd\b|rd\b|th\b)",
    re.ASCII,
)
_SLIPS = (1, -1, 2, -2, 10, -10)  # in units of the last place: a miscount, or a digit carried wrongly
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Gsm8k(Task):
    """`openai/gsm8k`, or a file of its rows: `question`, and `answer` with calculations in `<<...>>`."""

    name = "gsm8k"
    hub_id = "openai/gsm8k"
    hub_config = "main"

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        fields = {"question": row["question"], "answer": row["answer"]}
        for name, text in fields.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name} is {text!r}; expected a text")
        if "####" not in fields["answer"] or _value(_split(fields["answer"])[1]) is None:
            raise ValueError("answer does not end in `#### <number>`")
        return Record(id=f"gsm8k_{index}", fields=fields)

    def question(self, record: Record) -> str:
        return f"{record.fields['question'].strip()}\n\n{INSTRUCTION}"

    def reference(self, record: Record) -> str:
        """The worked solution without its calculator annotations: no student should learn to write those."""
        working, gold = _split(record.fields["answer"])
        return _solution(_CALCULATION.sub("", working), gold)

    def corrupt(self, record: Record, rng: random.Random) -> str:
        """The solution with one calculated number wrong, and with all that follows from it worked out again.

        Where no slip leads to a wrong answer of the same kind (whole stays whole, positive stays positive), only
        the answer itself is wrong.
        """
        working, gold = _split(record.fields["answer"])
        attempts = [(step, slip) for step, result in _steps(record) for slip in _slips(result)]
        rng.shuffle(attempts)
        for step, slip in attempts:
            reworked = _rework(working, gold, step, slip)
            if reworked is not None:
                return reworked
        right = _required_value(gold)
        wrong = _write(rng.choice(_slips(gold)), gold)
        *lines, last = _CALCULATION.sub("", working).split("\n")
        last = _NUMBER.sub(lambda match: wrong if _value(match[0]) == right else match[0], last)
        return _solution("\n".join([*lines, last]), wrong)

    def corruptions(self, record: Record) -> Sequence[Corruption]:
        question = record.fields["question"].strip()
        return [Corruption(kind, MISTAKE_REQUEST.format(kind=kind, question=question)) for kind in MISTAKES]

    def negative(self, record: Record, corruption: Corruption, reasoning: str, answer: str) -> str | None:
        """The working and the number, as in the reference; None without working, or where the answer is no single number."""
        working = reasoning.rpartition("####")[0] or reasoning
        number = re.fullmatch(rf"(?:####)?\s*\$?(-?(?:{_UNSIGNED}))\.?", answer.strip(), re.ASCII)
        return None if number is None or not working.strip() else _solution(working.strip(), number[1])

    def judge(self, record: Record, completion: str) -> Verdict:
        answer = released_answer(completion) if self.released else extract_answer(completion)
        if answer is None:
            return Verdict(False, "no answer")
        correct = abs(answer - _required_value(_split(record.fields["answer"])[1])) < TOLERANCE
        return Verdict(correct, None if correct else "wrong answer")

    def topic(self, record: Record) -> str:
        return record.fields["question"].strip()


def extract_answer(completion: str) -> Fraction | None:
    """The number a completion gives: after its last `####`, else after its last "the answer is" or `\\boxed`, else the last.

    Of an equation behind `####` ("10 - 3 = 7"), the number behind its last `=`.
    """
    text = _CALCULATION.sub("", without_thoughts(completion))
    _, marker, after = text.rpartition("####")
    result = _REMARK.sub("", after.strip().partition("\n")[0]).rpartition("=")[2]
    if marker and (number := next(chain(_numbers(result), _numbers(after)), None)) is not None:
        return number
    *_, phrase = [None, *_PHRASE.finditer(text)]
    if phrase is not None and (number := next(_numbers(text[phrase.end() :]), None)) is not None:
        return number
    *_, last = [None, *_numbers(text)]
    return last


def released_answer(completion: str) -> Fraction | None:
    """The number that the released code reads: after the last `####`, else after the last of the first phrase that has one
    after it, else the last number."""
    for mark in ("####", *_RELEASED_PHRASES):
        _, marker, after = completion.rpartition(mark)
        if marker and (match := _RELEASED_NUMBER.search(after)) is not None:
            return _value(match[0])
    *_, last = [None, *_RELEASED_NUMBER.findall(completion)]
    return None if last is None else _value(last)


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _ANSWER.finditer(text):
        value = _value(match["number"])
        if value is not None:
            yield -value if match["sign"] or match["minus"] else value


def _value(text: str) -> Fraction | None:
    """The number that `text` writes; None where it is none, or has more digits than Python agrees to read."""
    try:
        return Fraction(text.strip().lstrip("$").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _required_value(text: str) -> Fraction:
    """The value of a number that `parse` has already found to be one."""
    value = _value(text)
    assert value is not None, text
    return value


def _split(answer: str) -> tuple[str, str]:
    """The working, and the gold number as written."""
    working, _, gold = answer.rpartition("####")
    return working.strip(), gold.strip()


def _solution(working: str, answer: str) -> str:
    return f"{working}\n#### {answer}".lstrip()


# Wrong solutions: a slip in one step, and its consequences.


def _steps(record: Record) -> Iterator[tuple[int, str]]:
    """The calculations that may go wrong, `(number, result)`: those whose result is a number not met before them.

    A result that equals an earlier number could not be told from it further down, where it has to be replaced.
    """
    seen = {_value(match[0]) for match in _NUMBER.finditer(record.fields["question"])}
    calculations = 0
    for match in _STEP_OR_NUMBER.finditer(_split(record.fields["answer"])[0]):
        if match["expression"] is not None:
            if (value := _value(match["result"])) is not None and value not in seen:
                yield calculations, match["result"]
            calculations += 1
            seen |= {value}
        elif match["number"]:
            seen |= {_value(match["number"])}


def _slips(result: str) -> list[Fraction]:
    """Values a little off `result`, of its sign, as many decimals, never equal to it."""
    right = _required_value(result)
    unit = Fraction(1, 10 ** _decimals(result))
    near = [right + slip * unit for slip in _SLIPS if abs(slip) < 10 or abs(right) >= 20 * unit]
    return [value for value in near if value * right > 0] or [right + unit]


def _rework(working: str, gold: str, step: int, slip: Fraction) -> str | None:
    """The solution in which calculation number `step` gives `slip`; None when that does not make a plausible wrong answer."""
    changed: dict[Fraction, Fraction] = {}
    pieces, end, calculations = [], 0, 0
    for match in _STEP_OR_NUMBER.finditer(working):
        pieces.append(working[end : match.start()])
        end = match.end()
        if match["number"]:
            pieces.append(_replace(match["number"], changed))
        elif match["expression"] is not None and (old := _value(match["result"])) is not None:
            new = slip if calculations == step else _recalculate(match["expression"], match["result"], changed)
            if new is None or (old > 0) != (new > 0):
                return None
            changed.pop(old, None)
            if new != old:
                changed[old] = new
        calculations += match["expression"] is not None
    wrong = changed.get(_required_value(gold))
    if wrong is None or abs(wrong - _required_value(gold)) < TOLERANCE:
        return None
    return _solution("".join(pieces) + working[end:], _write(wrong, gold))


def _recalculate(expression: str, result: str, changed: Mapping[Fraction, Fraction]) -> Fraction | None:
    """The result of a calculation after its numbers changed, rounded as written; None when a whole number breaks."""
    again = _NUMBER.sub(lambda match: _replace(match[0], changed), expression)
    if again == expression:
        return _required_value(result)
    value = _evaluate(again)
    if value is None or (value.denominator > 1 and not _decimals(result)):
        return None
    return round(value, max(2, _decimals(result)))


def _replace(number: str, changed: Mapping[Fraction, Fraction]) -> str:
    value = _value(number)
    return number if value is None or value not in changed else _write(changed[value], number)


def _write(value: Fraction, like: str) -> str:
    """`value` as text, with thousands commas where `like` has them."""
    text = format(Decimal(value.numerator) / value.denominator if value.denominator > 1 else value.numerator, ",")
    return text if "," in like else text.replace(",", "")


def _decimals(number: str) -> int:
    return len(number.strip().partition(".")[2])


def _evaluate(expression: str) -> Fraction | None:
    """The value of an expression in + - * / and parentheses; None for anything else."""
    try:
        return _evaluate_node(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluate_node(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))  # through text: 0.2 means one fifth
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate_node(node.operand)
    raise ValueError(ast.dump(node))
