"""Which stages wrote the texts of rows: a stage may pass on what its own input stages wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cai.storage.files import read_json
from cai.storage.journal import RECORDS
from cai.storage.rows import read_rows
from cai.storage.run_folder import STAGE


def writing_stages(stage: str, folder: Path, rows: Iterable[Any]) -> dict[str, int | None]:
    """The stages that wrote the cut-off texts among `rows` of a finished stage in `folder`, and their `max_new_tokens`.

    A stage that revises passes a response on that no revision replaced, and one that chooses passes on all of its
    texts. The maximum is None where it is unknown.
    """
    cut_off = [row for row in rows if row["finish_reason"] == "length"]
    if not cut_off:
        return {}
    facts = read_json(folder / STAGE) or {"config": {}}
    limit: int | None = facts["config"].get("max_new_tokens")
    passed_on = [row for row in cut_off if limit is None or row.get("original") == row["response"]]
    limits: dict[str, int | None] = {} if len(passed_on) == len(cut_off) else {stage: limit}
    texts = {(row["prompt_id"], row["response"]) for row in passed_on}
    if passed_on:
        for name, input_stage in facts.get("inputs", {}).items():
            input_folder = folder.parent / input_stage["folder"]
            if (read_json(input_folder / STAGE) or {}).get("gives") == "texts":
                input_rows = read_rows(input_folder / RECORDS)
                same_texts = [row for row in input_rows if (row["prompt_id"], row["response"]) in texts]
                limits |= writing_stages(name, input_folder, same_texts)
    return limits or {stage: None}
