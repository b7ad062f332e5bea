"""The prompts of a recipe's prompt set."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cai.micro import conversations
from cai.prompt_sets.prompt_set_config import MICRO, PromptSet
from cai.prompt_sets.row_conversations import row_messages, row_tags, transcript_prompt
from cai.prompt_sets.row_formats import open_rows
from cai.storage.rows import HELD_OUT, TOPIC, Prompt, stable_id
from cai.text.errors import BadInput, did_you_mean


class PromptRows(NamedTuple):
    """The prompts of a set, the number of its rows, and how many of these repeat the prompt of an earlier row."""

    prompts: list[Prompt]
    rows: int
    duplicates: int


def read_prompt_set(config: PromptSet, folder: Path) -> PromptRows:
    """The prompts of a set; paths are relative to `folder`. Raises BadInput with file and line for a wrong row."""
    if config.source == MICRO:
        return _micro_prompts(config)
    file_format, rows = open_rows(config, folder)
    prompts_by_id: dict[str, Prompt] = {}
    n_rows = 0
    for row in rows:
        n_rows += 1
        if file_format == "hh":
            messages, tags = transcript_prompt(row), []
        else:
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
    return PromptRows(_tag_held_out(selected, config), n_rows, n_rows - len(prompts_by_id))


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
