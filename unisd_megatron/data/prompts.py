"""The forms in which questions and solutions are put before the teacher: the same for every task, right or wrong.

After UniSD (arXiv 2605.06597 and its released code), reworded only where that code has a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

SELF_INSTRUCTION = (
    "Study the reference solution above carefully, then solve the task again in your own way and with your own words."
)


def with_solution(question: str, solution: str) -> str:
    """The question, then a solution of it."""
    return f"\n{question}\n\nThis is an example for a response to the question:\n{solution}\n\n{SELF_INSTRUCTION}\n"


def with_wrong_solution_released(question: str, solution: str) -> str:
    """The authors' form for negative demonstrations: no line break at the ends, no blank line before the instruction."""
    return f"{question}\n\nThis is an example for a response to the question:\n{solution}\n{SELF_INSTRUCTION}"


def behind_examples(asked: str, examples: Sequence[tuple[str, str]]) -> str:
    """What is asked, behind solved examples of other questions: `(question, solution)` each."""
    parts = ["# Reference Samples (DO NOT SOLVE THESE)", "Learn from how they are solved; do not copy their answers.", ""]
    for number, (question, solution) in enumerate(examples, start=1):
        parts += [f"### [REFERENCE ONLY #{number}]", question.strip(), "", "Reference Answer:", solution, ""]
    parts += ["-----", "## Task to Solve (ONLY ANSWER THIS TASK)", asked]
    return "\n".join(parts)


def behind_instruction(asked: str, instruction: str) -> str:
    """What is asked, behind a general instruction."""
    return f"## General Instruction for Your Answer\n{instruction.strip()}\n\n{asked}"


def studying(prompt: str) -> str:
    """A prompt that ends in the request to study a reference solution, as the authors' induced contexts do without one."""
    return f"{prompt}\n\n{SELF_INSTRUCTION}"


def asking_for_instruction(examples: Sequence[tuple[str, str]]) -> str:
    """The request for one general instruction by which solved examples, `(question, solution)` each, could have been solved."""
    parts = ["Below are solved examples of one kind of task.", ""]
    for number, (question, solution) in enumerate(examples, start=1):
        parts += [f"### Example {number}", question.strip(), "", "Solution:", solution, ""]
    return "\n".join([*parts, "-----", _INDUCTION_RULES])


_INDUCTION_RULES = """Write one general instruction that would help someone to solve new tasks of this kind well.
- State what carries over to other tasks: how to approach them, what to check, which mistakes to avoid.
- Mention nothing that is particular to these examples: no names, numbers, options, code, tool calls or answers of theirs.
- Write 3 to 4 sentences of plain text, and nothing else."""
