"""The prompts of a recipe's `prompts:`, and the human preferences of its `pairs:`, pairs of hh-rlhf transcripts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cai.micro import conversations
from cai.prompt_sets.prompt_set_config import MICRO, PairSet, PromptSet
from cai.prompt_sets.row_formats import open_rows, row_messages, row_tags, transcript_messages, transcript_prompt
from cai.storage.rows import HELD_OUT, TOPIC, Message, Preference, Prompt, stable_id
from cai.text.errors import BadInput, did_you_mean, nearest_name
from cai.text.left_out import LeftOut

CERTAIN = 40.0
"""Log-odds of a human's choice, in nats: the first multiple of ten whose logistic function is 1 in double precision."""


class PromptRows(NamedTuple):
    """The prompts of a set, the number of its rows, and how many of these repeat the prompt of an earlier row."""

    prompts: list[Prompt]
    rows: int
    duplicates: int
    column_like_tags: str | None = None
    """A column that may hold tags under another name, where there are none."""


def read_prompt_set(config: PromptSet, folder: Path) -> PromptRows:
    """The prompts of a set; paths are relative to `folder`. Raises BadInput with file and line for a wrong row."""
    if config.source == MICRO:
        return _micro_prompts(config)
    file_format, rows = open_rows(config, folder)
    prompts_by_id: dict[str, Prompt] = {}
    n_rows = 0
    column_like_tags = None
    for row in rows:
        n_rows += 1
        if file_format == "hh":
            messages, tags = transcript_prompt(row), []
        else:
            if config.columns.tags is None and "tags" not in row.columns:
                column_like_tags = column_like_tags or nearest_name("tags", map(str, row.columns))
            messages, tags = row_messages(row, config.columns), row_tags(row, config.columns)
        prompt: Prompt = {
            "id": stable_id("prompt", messages),
            "messages": messages,
            "tags": list(dict.fromkeys([*config.tags, *tags])),
            "source": Path(config.source).name,
        }
        prompts_by_id.setdefault(prompt["id"], prompt)
    if not prompts_by_id:
        raise BadInput(f"{config.source}: found no rows, expected prompts")
    selected = config.select(list(prompts_by_id.values()))
    return PromptRows(_tag_held_out(selected, config), n_rows, n_rows - len(prompts_by_id), column_like_tags)


def _micro_prompts(config: PromptSet) -> PromptRows:
    prompts = conversations.prompts(config.split or "train", tuple(config.tags), config.limit, config.seed)
    for tag in config.tags:
        is_topic = tag.startswith(TOPIC) and prompts
        if tag not in conversations.TAGS and not is_topic:
            expected = f"expected one of {', '.join(conversations.TAGS)}{did_you_mean(tag, conversations.TAGS)}"
            raise BadInput(f"{MICRO}: found no prompts with tag {tag!r}, {expected}")
    return PromptRows(_tag_held_out(prompts, config), len(prompts), 0)


def _tag_held_out(prompts: list[Prompt], config: PromptSet) -> list[Prompt]:
    return [
        {**prompt, "tags": [*prompt["tags"], HELD_OUT]} if config.holds_out(prompt["id"]) else prompt
        for prompt in prompts
    ]


ABOVE_LIMIT = "above the limit"
"""Reason of pairs that `limit` leaves out."""


class HumanPairs(NamedTuple):
    """Human preferences, the number of the file's pairs, and the counts of those left out, by reason."""

    preferences: list[Preference]
    rows: int
    left_out: dict[str, int]

    @property
    def n_wanted(self) -> int:
        """The file's pairs but for those above the `limit`."""
        return self.rows - self.left_out.get(ABOVE_LIMIT, 0)

    @property
    def unusable(self) -> list[LeftOut]:
        """The pairs of `n_wanted` that are left out, by reason."""
        return [LeftOut(n, f"({reason})") for reason, n in self.left_out.items() if reason != ABOVE_LIMIT]


def load_human_pairs(config: PairSet, folder: Path) -> HumanPairs:
    """The human preferences in a file of transcripts: p_chosen 1, log-odds `CERTAIN`, judged by `human`.

    Left out and counted: pairs whose transcripts differ before the last answer, pairs of one answer, empty answers, and
    repetitions of a pair.
    """
    file_format, rows = open_rows(config, folder)
    if file_format != "hh":
        raise BadInput(f"{config.source}: found no hh-rlhf transcripts, expected columns `chosen` and `rejected`")
    left_out: Counter[str] = Counter()
    preferences_by_id: dict[str, Preference] = {}
    n_rows = 0
    for row in rows:
        n_rows += 1
        chosen, rejected = transcript_messages(row, "chosen"), transcript_messages(row, "rejected")
        if reason := _unusable_reason(chosen, rejected):
            left_out[reason] += 1
            continue
        preference = _preference(chosen, rejected, config.tags)
        if preference["id"] in preferences_by_id:
            left_out["the same pair again"] += 1
        else:
            preferences_by_id[preference["id"]] = preference
    selected = config.select(list(preferences_by_id.values()))
    if n_above_limit := len(preferences_by_id) - len(selected):
        left_out[ABOVE_LIMIT] += n_above_limit
    for preference in selected:
        if config.holds_out(preference["prompt_id"]):
            preference["tags"].append(HELD_OUT)
    return HumanPairs(selected, n_rows, dict(left_out))


def _unusable_reason(chosen: list[Message], rejected: list[Message]) -> str | None:
    """The reason why two transcripts are no preference pair, or None."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "no answer at the end"
    if chosen[:-1] != rejected[:-1]:
        return "different conversations"
    if not chosen[-1]["content"] or not rejected[-1]["content"]:
        return "an empty answer"
    if chosen[-1] == rejected[-1]:
        return "the same answer twice"
    return None if any(message["role"] == "user" for message in chosen) else "no question"


def _preference(chosen: list[Message], rejected: list[Message], tags: list[str]) -> Preference:
    prompt = chosen[:-1]
    answers = sorted([chosen[-1]["content"], rejected[-1]["content"]])
    return {
        "id": stable_id("human", prompt, chosen[-1]["content"], rejected[-1]["content"]),
        "pair_id": stable_id("pair", prompt, answers),
        "prompt_id": stable_id("prompt", prompt),
        "prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:], "p_chosen": 1.0, "log_odds": CERTAIN,
        "source": "human", "tags": list(tags), "judge": "human", "constitution": "",
    }  # fmt: skip
