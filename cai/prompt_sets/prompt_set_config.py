"""The entries of a recipe's `prompts:` and `pairs:`: which rows of which file, and which of them are held out."""

from __future__ import annotations

import random
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cai.contracts.references import RowsFileRef
from cai.storage.rows import Preference, Prompt, held_out_rank, stable_seed

MICRO = "micro"
"""The source of prompts of the embedded world."""

T = TypeVar("T", Prompt, Preference)


class Columns(BaseModel):
    """The names of a file's columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = Field(default=None, description="Column with the question, a text or a list of messages.")
    messages: str | None = Field(default=None, description="Column with the conversation, its last message the user's.")
    system: str | None = Field(default=None, description="Column with a system message to put in front.")
    tags: str | None = Field(default=None, description="Column with tags, a list or a text with commas.")


class RowSource(BaseModel):
    """Rows in a file or folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: RowsFileRef = Field(description="A file or folder, relative to the recipe.")
    format: Literal["auto", "jsonl", "csv", "parquet", "datasets", "hh"] = Field(
        "auto", description="auto = by the file's suffix and its first row."
    )
    split: str | None = Field(None, description="Split of a folder of `datasets`.")
    tags: list[str] = Field(default_factory=list, description="Tags for every row.")
    limit: int | None = Field(None, ge=1, description="Take this many.")
    hold_out: bool | Annotated[float, Field(gt=0, lt=1)] = Field(
        False, description="Keep all, or this share of the prompts, out of training."
    )
    seed: int = Field(0, ge=0, description="Above 0 shuffles the rows before `limit` takes the first.")

    def select(self, rows: list[T]) -> list[T]:
        """The first `limit` rows, after shuffling them in place where there is a seed."""
        if self.seed:
            random.Random(stable_seed("prompts", self.seed)).shuffle(rows)
        return rows[: self.limit]

    def holds_out(self, prompt_id: str) -> bool:
        """Whether a prompt is held out. A share depends on the id's hash alone, so that a set can grow."""
        if isinstance(self.hold_out, bool):
            return self.hold_out
        return held_out_rank(prompt_id) < self.hold_out * 2**63


class PromptSet(RowSource):
    """One entry of a recipe's `prompts:`. `tags` select prompts of `micro`; rows of a file get them in addition."""

    source: RowsFileRef = Field(description="`micro`, or a file or folder, relative to the recipe.")
    columns: Columns = Field(default_factory=Columns, description="What the file calls its columns.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source == MICRO and (self.format != "auto" or self.columns != Columns()):
            raise ValueError("`format` and `columns` are for files, and the source here is `micro`")
        return self


class PairSet(RowSource):
    """Human preference pairs: hh-rlhf transcripts, `chosen` and `rejected`."""

    format: Literal["auto", "hh"] = Field("auto", description="hh-rlhf transcripts are what can be read.")
