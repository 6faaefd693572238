"""CoS-E: common-sense questions (CommonsenseQA) with a sentence that explains the answer.

The hub has v1.11, 5 choices, in one table. The publisher has two files for each split: `csqa_v1.0_train_rand_split.jsonl` with
the questions, 3 choices, and `cose_train_v1.0.jsonl` with the explanations. `--data_path` names the first; the second is read
if it lies beside it, and joined by id. Without it there are no explanations, and a reference is the answer alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unisd_megatron.data.mcqa import ChoiceTask, choice_record
from unisd_megatron.data.sources import read_rows
from unisd_megatron.data.task import Record
from unisd_megatron.errors import DataError

QUESTIONS_FILE = re.compile(r"csqa_(?P<version>v[\d.]*\d)_(?P<part>[a-z]+)_rand_split\.jsonl(?P<gz>(?:\.gz)?)")
PART = re.compile(r"csqa_.*_(?P<part>train|dev)_.*")
SPLIT_OF_PART = {"train": "train", "dev": "test"}


class CosE(ChoiceTask):
    """`Salesforce/cos_e` v1.11, or a file of its rows, or the publisher's pair of files."""

    name = "cos_e"
    hub_id = "Salesforce/cos_e"
    hub_config = "v1.11"
    splits = {"train": "train", "test": "validation"}

    def parse(self, row: Mapping[str, Any], index: int) -> Record:
        identity = f"cos_e_{row.get('id', index)}"
        if isinstance(row["question"], Mapping):
            listed = row["question"]["choices"]
            choices, labels = [choice["text"] for choice in listed], [choice["label"] for choice in listed]
            question, answer = row["question"]["stem"], _place(row["answerKey"], labels)
            return choice_record(identity, question, choices, answer)
        answer = _place(row["answer"], row["choices"])
        return choice_record(identity, row["question"], row["choices"], answer, explanation=row.get("abstractive_explanation"))

    def load(self, split: str, data_path: str | None) -> list[Record]:
        """All records of a split.

        Raises `DataError` also for the publisher's file of the other split, and where the file beside it lacks a question's
        explanation or gives two.
        """
        named = PART.fullmatch(Path(data_path).name) if data_path is not None else None
        if named is not None and split in self.splits and split != SPLIT_OF_PART[named["part"]]:
            right = SPLIT_OF_PART[named["part"]]
            raise DataError(f"{data_path}: by its name this is the {right} split, not the {split} split; use the other file")
        records = super().load(split, data_path)
        beside = _explanations_file(Path(data_path)) if data_path is not None else None
        if beside is None:
            return records
        explanations: dict[str, str] = {}
        places: dict[str, str] = {}
        for where, _, row in read_rows(beside):
            identity = f"cos_e_{row.get('id')}"
            if identity in places:
                raise DataError(f"{where}: the id {identity} is that of {places[identity]} too; give every question its own")
            places[identity], explanations[identity] = where, _explanation(row, where)
        for record in records:
            if record.id not in explanations:
                raise DataError(f"{beside}: no explanation for {record.id} of {data_path}; use a pair of one split")
        return [replace(each, fields={**each.fields, "explanation": explanations[each.id]}) for each in records]


def _place(answer: Any, among: Any) -> int:
    if not isinstance(among, list) or answer not in among:
        raise ValueError(f"the answer {answer!r} is not among the choices {among!r}")
    return among.index(answer)


def _explanations_file(questions: Path) -> Path | None:
    """The file with the explanations, if there is one beside the file with the questions."""
    match = QUESTIONS_FILE.fullmatch(questions.name)
    if match is None:
        return None
    beside = questions.with_name(f"cose_{match['part']}_{match['version']}.jsonl{match['gz']}")
    return beside if beside.is_file() else None


def _explanation(row: Mapping[str, Any], where: str) -> str:
    explanation = row.get("explanation")
    text = explanation.get("open-ended") if isinstance(explanation, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no explanation of cos_e: explanation.open-ended is {text!r}; expected a text")
    return text.strip()
