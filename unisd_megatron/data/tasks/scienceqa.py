"""ScienceQA, the questions without an image: school science, with a lecture as context and, if wanted, the question's hint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisd_megatron.data.mcqa import ChoiceTask, choice_record
from unisd_megatron.data.task import Record

PUBLISHED_SPLITS = {"train": "train", "test": "test"}  # the publisher's file also holds "val"


class ScienceQa(ChoiceTask):
    """`derek-thomas/ScienceQA`, or a file of its rows; also the publisher's `problems.json`, one object by problem id."""

    name = "scienceqa"
    hub_id = "derek-thomas/ScienceQA"
    shows_hint = False
    """Whether the hint is shown: where the question is about a passage, that passage is the hint."""

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        context = {"Context": row.get("lecture")} | ({"Hint": row.get("hint")} if self.shows_hint else {})
        record = choice_record(
            f"scienceqa_{row.get('id', index)}",
            row["question"],
            row["choices"],
            row["answer"],
            explanation=row.get("solution"),
            context=context,
            group="/".join(part for part in (row.get("subject"), row.get("topic")) if part) or None,
        )
        fields = {**record.fields, "image": row.get("image") is not None, "split": row.get("split")}
        return Record(record.id, fields)

    def keep(self, record: Record, split: str) -> bool:
        """Only what can be answered without an image; and by split in the publisher's file, which holds all of them."""
        return not record.fields["image"] and record.fields["split"] in (None, PUBLISHED_SPLITS[split])


class ScienceQaHint(ScienceQa):
    """The same with the hint; the released code never shows it."""

    name = "scienceqa_hint"
    shows_hint = True
