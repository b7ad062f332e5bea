"""Conversations in the columns of a row: texts, lists of messages, and hh-rlhf transcripts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cai.prompt_sets.prompt_set_config import Columns
from cai.prompt_sets.row_formats import Row
from cai.storage.rows import Message
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import describe

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""The role of each spelling of it; `human` and `gpt` are ShareGPT's."""

_TURN = re.compile(r"\n\n(Human|Assistant):")


def row_messages(row: Row, columns: Columns) -> list[Message]:
    """The conversation in a row; its last message is the user's. Raises BadInput where there is none."""
    names = row.columns
    column = columns.messages or columns.prompt or ("messages" if "messages" in names else "prompt")
    if names.get(column) is None:
        raise BadInput(
            f"{row.location}: found the columns {', '.join(map(str, names)) or '(none)'}, expected {column!r}"
            + (did_you_mean(column, names) or "; say which one it is with `columns: {prompt: …}`")
        )
    value = names[column]
    messages = [_text_message(row, column)] if isinstance(value, str) else _message_list(row, column)
    if columns.system is not None and names.get(columns.system):
        system = _check_unicode(row, str(names[columns.system]))
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def row_tags(row: Row, columns: Columns) -> list[str]:
    """The tags in a row. Raises BadInput where its tags are neither texts nor a text with commas."""
    value = row.columns.get(columns.tags or "tags")
    if value is None and columns.tags is None:
        return []
    if isinstance(value, str):
        return [tag.strip() for tag in value.split(",") if tag.strip()]
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise BadInput(f"{row.location}: found {describe(value)} as tags, expected a list of texts")
    return list(value)


def transcript_messages(row: Row, column: str) -> list[Message]:
    """The turns of a transcript, stripped. Successive turns of one speaker stay separate messages."""
    text = row.columns.get(column)
    if not isinstance(text, str):
        hint = did_you_mean(column, row.columns)
        raise BadInput(f"{row.location}: found {describe(text)} in {column!r}, expected a transcript{hint}")
    preamble, *speakers_and_texts = _TURN.split(_check_unicode(row, text))
    if preamble.strip() or not speakers_and_texts:
        raise BadInput(f"{row.location}: the transcript in {column!r} does not begin with a blank line and `Human:`")
    turns = zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True)
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in turns
    ]


def transcript_prompt(row: Row) -> list[Message]:
    """The conversation that the last answer of the `chosen` transcript replies to."""
    messages = transcript_messages(row, "chosen")
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages or not messages[-1]["content"]:
        raise BadInput(f"{row.location}: the transcript in 'chosen' asks nothing, expected a `Human:` turn with text")
    return messages


def _text_message(row: Row, column: str) -> Message:
    text = row.columns[column]
    if not text.strip():
        raise BadInput(f"{row.location}: found an empty text in {column!r}, expected a prompt")
    return {"role": "user", "content": _check_unicode(row, text)}


def _message_list(row: Row, column: str) -> list[Message]:
    """A conversation in OpenAI's or ShareGPT's format."""
    entries = row.columns[column]
    if not isinstance(entries, list) or not entries:
        message = f"found {describe(entries)} in {column!r}, expected a text or a list of messages"
        raise BadInput(f"{row.location}: {message}")
    messages: list[Message] = []
    for number, entry in enumerate(entries, start=1):
        subject = f"{row.location}: message {number} in {column!r}"
        if not isinstance(entry, Mapping):
            raise BadInput(f"{subject} is {describe(entry)}, expected role and content")
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}{did_you_mean(str(role), ROLES)}"
            raise BadInput(f"{subject} has the role {describe(role)}, {expected}")
        if not isinstance(content, str):
            raise BadInput(f"{subject} has {describe(content)} as content, expected text")
        messages.append({"role": ROLES[role], "content": _check_unicode(row, content)})  # type: ignore[typeddict-item]
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadInput(
            f"{row.location}: the last message in {column!r} is no user's question, expected a prompt to answer"
        )
    return messages


def _check_unicode(row: Row, text: str) -> str:
    """`text`. Raises BadInput where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{row.location}: found half of a surrogate pair, expected Unicode text") from None
    return text
