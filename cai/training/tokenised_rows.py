"""Rows as token ids that a trainer takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from cai.storage.rows import Preference
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.models.chat import Chat


@dataclass(frozen=True)
class TokenisedPair:
    """One preference as token ids. The responses end with the end-of-turn token."""

    row: Preference
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer conversation."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def tokenise_pairs(rows: Iterable[Preference], chat: Chat, max_length: int) -> tuple[list[TokenisedPair], Counter[str]]:
    """Pairs that can be learned from, and how many were left out by reason."""
    pairs: list[TokenisedPair] = []
    left_out: Counter[str] = Counter()
    limit = chat.token_limit(max_length)
    for row in rows:
        try:
            prompt_ids, chosen_ids = chat.example(row["prompt"], row["chosen"][-1]["content"])
            _, rejected_ids = chat.example(row["prompt"], row["rejected"][-1]["content"])
        except BadInput:  # the model's template refuses the conversation
            left_out["refused_by_template"] += 1
            continue
        pair = TokenisedPair(row, prompt_ids, chosen_ids, rejected_ids)
        if chosen_ids == rejected_ids:
            left_out["identical"] += 1
        elif pair.length > limit:
            left_out["too_long"] += 1
        else:
            pairs.append(pair)
    return pairs, left_out


def as_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows in memory, as the trainers take them."""
    return Dataset.from_list(list(rows))
