"""GPQA: graduate-level science questions that a search engine does not answer. For evaluation only, as its authors ask."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from unisd_megatron.data.mcqa import ChoiceTask, choice_record
from unisd_megatron.data.task import Record

CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


class Gpqa(ChoiceTask):
    """`Idavidrein/gpqa`, its main set of 448 (the hub calls its one split "train"; access has to be asked for)."""

    name = "gpqa"
    hub_id = "Idavidrein/gpqa"
    hub_config = "gpqa_main"
    splits = {"test": "train"}

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        """The right answer is published first, so the order is drawn: by the question, wherever in the file it stands."""
        question = row["Question"]
        order = random.Random(f"gpqa {question}").sample(range(len(CHOICES)), len(CHOICES))
        return choice_record(
            f"gpqa_{row.get('Record ID', index)}",
            question,
            [row[name] for name in CHOICES],
            0,
            explanation=row.get("Explanation"),
            group=row.get("High-level domain"),
            order=order,
        )
