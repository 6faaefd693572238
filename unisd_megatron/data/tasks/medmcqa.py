"""MedMCQA: questions of Indian medical entrance examinations, four options each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisd_megatron.data.mcqa import ChoiceTask, choice_record
from unisd_megatron.data.task import Record

CHOICES = ("opa", "opb", "opc", "opd")


class MedMcqa(ChoiceTask):
    """`openlifescienceai/medmcqa`, or a file of its rows. Its test split hides the answers: the validation split is ours."""

    name = "medmcqa"
    hub_id = "openlifescienceai/medmcqa"
    splits = {"train": "train", "test": "validation"}

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        """A hidden answer (-1) is no error. An answer of 4 is: it shows a file that counts the options from 1."""
        answer = row["cop"]
        if type(answer) is not int:  # `true` is an int to isinstance
            raise ValueError(f"cop is {answer!r}; expected a whole number from 0 to 3")
        if answer == len(CHOICES):
            raise ValueError("cop is 4: the publisher's files count options from 1; use the hub's, which count from 0")
        known = 0 <= answer < len(CHOICES)
        record = choice_record(
            f"medmcqa_{row.get('id', index)}",
            row["question"],
            [row[name] for name in CHOICES],
            answer if known else 0,
            explanation=row.get("exp"),
            group=row.get("subject_name"),
        )
        return Record(record.id, {**record.fields, "answered": known})

    def keep(self, record: Record, split: str) -> bool:
        return record.fields["answered"]
