"""Prompt sets and human preferences, read from files that other people made.

A row has a `prompt` (text, or a list of messages), or `messages`; `columns:` says which columns these are where they
are called otherwise. hh-rlhf transcripts (Bai et al. 2022, arXiv 2204.05862) are read with all their turns: a prompt is
the `chosen` transcript up to and including its last `Human:` turn, a human preference what the two transcripts end
with.

A row that cannot be read is an error that names file and line: a file with a wrong row is usually the wrong file.
Prompts that a set holds twice are taken once, and `read_prompt_set` says how many there were.

Left out: images, tools, streaming, files on the network.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cai.storage.rows import HELD_OUT, Message, Preference, Prompt, stable_id, stable_seed
from cai.text.errors import BadInput, nearest
from cai.text.formatting import describe

MICRO = "micro"
CERTAIN = 40.0
"""Log-odds of a human's choice, in nats: the first whole ten whose logistic function is 1 in double precision."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""How roles are written to what they are here; `human` and `gpt` are ShareGPT's."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

Format = Literal["auto", "jsonl", "csv", "parquet", "datasets", "hh"]
T = TypeVar("T", Prompt, Preference)
Row = tuple[str, Mapping[str, Any]]
"""(where it stands, its columns)."""


class Columns(BaseModel):
    """What a file calls its columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = Field(default=None, description="Column with the question, a text or a list of messages.")
    messages: str | None = Field(default=None, description="Column with the conversation, its last message the user's.")
    system: str | None = Field(default=None, description="Column with a system message to put in front.")
    tags: str | None = Field(default=None, description="Column with tags, a list or a text with commas.")


class RowSource(BaseModel):
    """Rows in a file or folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="A file or folder, relative to the recipe.")
    format: Format = Field("auto", description="auto = by the file's suffix and its first row.")
    split: str | None = Field(None, description="Split of a folder of `datasets`.")
    tags: list[str] = Field(default_factory=list, description="Tags for every row.")
    limit: int | None = Field(None, ge=1, description="Take this many.")
    hold_out: bool | Annotated[float, Field(gt=0, lt=1)] = Field(
        False, description="Keep all, or this share of the prompts, out of training."
    )
    seed: int = Field(0, ge=0, description="Above 0 shuffles the rows before `limit` takes the first.")


class PromptSet(RowSource):
    """One entry of a recipe's `prompts:`. Of `micro`, the embedded world, `tags` selects; a file's rows get them."""

    source: str = Field(description="`micro`, or a file or folder, relative to the recipe.")
    columns: Columns = Field(default_factory=Columns, description="What the file calls its columns.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source == MICRO and (self.format != "auto" or self.columns != Columns()):
            raise ValueError("`format` and `columns` are for files, and the source here is `micro`")
        return self


class PairSet(RowSource):
    """Human preference pairs: hh-rlhf transcripts, `chosen` and `rejected`."""

    format: Literal["auto", "hh"] = Field("auto", description="hh-rlhf transcripts are what can be read.")


class PromptRows(NamedTuple):
    """A set as read: `rows` of the file, of which `duplicates` were taken once."""

    prompts: list[Prompt]
    rows: int
    duplicates: int


class HumanPairs(NamedTuple):
    """Human preferences; of `rows` pairs those in `left_out`, by reason, are not among them."""

    preferences: list[Preference]
    rows: int
    left_out: dict[str, int]


def read_prompt_set(config: PromptSet, folder: Path) -> PromptRows:
    """The prompts of a set, and what became of the file's rows; paths are relative to `folder`.

    Raises BadInput with file and line for a wrong row.
    """
    if config.source == MICRO:
        from cai.micro.conversations import TAGS, prompts

        found = prompts(config.split or "train", tuple(config.tags), config.limit, config.seed)
        for tag in config.tags:
            if tag not in TAGS and (not found or not tag.startswith("topic:")):
                raise BadInput(
                    f"{MICRO}: found no prompts with tag {tag!r}, expected one of {', '.join(TAGS)}"
                    + nearest(tag, TAGS)
                )
        return PromptRows([_held(prompt, config.hold_out) for prompt in found], len(found), 0)
    kind, rows = _open(config, folder)
    read = transcript_prompts(rows) if kind == "hh" else _prompts(rows, config.columns)
    by_id: dict[str, Prompt] = {}
    count = 0
    for messages, tags in read:
        count += 1
        prompt: Prompt = {
            "id": stable_id("prompt", messages),
            "messages": messages,
            "tags": list(dict.fromkeys([*config.tags, *tags])),
            "source": Path(config.source).name,
        }
        by_id.setdefault(prompt["id"], prompt)
    if not by_id:
        raise BadInput(f"{config.source}: found no rows, expected prompts")
    chosen = _some(list(by_id.values()), config)
    return PromptRows([_held(prompt, config.hold_out) for prompt in chosen], count, count - len(by_id))


def load_human_pairs(config: PairSet, folder: Path) -> HumanPairs:
    """The human preferences in a file of transcripts: p_chosen 1, log-odds `CERTAIN`, judged by `human`.

    Left out and counted: pairs whose transcripts differ before the last answer, pairs of one answer, empty answers, and
    pairs that the file holds twice.
    """
    kind, rows = _open(config, folder)
    if kind != "hh":
        raise BadInput(f"{config.source}: found no hh-rlhf transcripts, expected columns `chosen` and `rejected`")
    left_out: Counter[str] = Counter()
    by_id: dict[str, Preference] = {}
    count = 0
    for where, row in rows:
        count += 1
        chosen, rejected = (_transcript(where, row, column) for column in ("chosen", "rejected"))
        reason = _unusable(chosen, rejected)
        preference = None if reason else _preference(chosen, rejected, config.tags)
        if preference is None or preference["id"] in by_id:
            left_out[reason or "the same pair again"] += 1
        else:
            by_id[preference["id"]] = preference
    taken = _some(list(by_id.values()), config)
    if dropped := len(by_id) - len(taken):
        left_out["above the limit"] += dropped
    for preference in taken:
        if _is_held(preference["prompt_id"], config.hold_out):
            preference["tags"].append(HELD_OUT)
    return HumanPairs(taken, count, dict(left_out))


def transcript_prompts(rows: Iterable[Row]) -> Iterator[tuple[list[Message], list[str]]]:
    """The conversation that each `chosen` transcript answers."""
    for where, row in rows:
        messages = _transcript(where, row, "chosen")
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages or not messages[-1]["content"]:
            raise BadInput(f"{where}: the transcript in 'chosen' asks nothing, expected a `Human:` turn with text")
        yield messages, []


def _some(rows: list[T], config: RowSource) -> list[T]:
    if config.seed:
        random.Random(stable_seed("prompts", config.seed)).shuffle(rows)
    return rows[: config.limit]


def _is_held(prompt_id: str, share: bool | float) -> bool:
    """Whether a prompt is held out: all are, none is, or by its hash, so that a set can grow and none changes sides."""
    return share if isinstance(share, bool) else stable_seed("hold_out", prompt_id) < share * 2**63


def _held(prompt: Prompt, share: bool | float) -> Prompt:
    return {**prompt, "tags": [*prompt["tags"], HELD_OUT]} if _is_held(prompt["id"], share) else prompt


def _unusable(chosen: list[Message], rejected: list[Message]) -> str | None:
    """Why two transcripts are no pair, or None."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "no answer at the end"
    if chosen[:-1] != rejected[:-1]:
        return "different conversations"
    if not chosen[-1]["content"] or not rejected[-1]["content"]:
        return "an empty answer"
    if chosen[-1] == rejected[-1]:
        return "the same answer twice"
    return None if any(one["role"] == "user" for one in chosen) else "no question"


def _preference(chosen: list[Message], rejected: list[Message], tags: list[str]) -> Preference:
    prompt = chosen[:-1]
    answers = sorted([chosen[-1]["content"], rejected[-1]["content"]])
    return {
        "id": stable_id("human", prompt, chosen[-1]["content"], rejected[-1]["content"]),
        "pair_id": stable_id("pair", prompt, answers),
        "prompt_id": stable_id("prompt", prompt),
        "prompt": prompt,
        "chosen": chosen[-1:],
        "rejected": rejected[-1:],
        "p_chosen": 1.0,
        "log_odds": CERTAIN,
        "source": "human",
        "tags": list(tags),
        "judge": "human",
        "constitution": "",
    }


def _transcript(where: str, row: Mapping[str, Any], column: str) -> list[Message]:
    """The turns of a transcript. Turns of one speaker in a row stay apart; space around a turn goes."""
    text = row.get(column)
    if not isinstance(text, str):
        raise BadInput(f"{where}: found {describe(text)} in {column!r}, expected a transcript" + nearest(column, row))
    parts = _TURN.split(_plain_text(where, text))
    if parts[0].strip() or len(parts) < 3:
        raise BadInput(f"{where}: the transcript in {column!r} does not begin with a blank line and `Human:`")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _prompts(rows: Iterable[Row], columns: Columns) -> Iterator[tuple[list[Message], list[str]]]:
    for where, row in rows:
        column = columns.messages or columns.prompt or ("messages" if "messages" in row else "prompt")
        if row.get(column) is None:
            raise BadInput(
                f"{where}: found the columns {', '.join(map(str, row)) or '(none)'}, expected {column!r}"
                + (nearest(column, row) or "; say which one it is with `columns: {prompt: …}`")
            )
        value = row[column]
        messages = [_text_message(where, column, value)] if isinstance(value, str) else _messages(where, column, value)
        if columns.system is not None and row.get(columns.system):
            system = _plain_text(where, str(row[columns.system]))
            messages = [{"role": "system", "content": system}, *messages]
        yield messages, _tags(where, row, columns)


def _text_message(where: str, column: str, text: str) -> Message:
    if not text.strip():
        raise BadInput(f"{where}: found an empty text in {column!r}, expected a prompt")
    return {"role": "user", "content": _plain_text(where, text)}


def _messages(where: str, column: str, value: object) -> list[Message]:
    """A conversation in OpenAI's or ShareGPT's spelling, its last message the user's."""
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: found {describe(value)} in {column!r}, expected a text or a list of messages")
    messages: list[Message] = []
    for number, one in enumerate(value, start=1):
        if not isinstance(one, Mapping):
            raise BadInput(f"{where}: message {number} in {column!r} is {describe(one)}, expected role and content")
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if role not in ROLES:
            raise BadInput(
                f"{where}: message {number} in {column!r} has the role {describe(role)}, expected one of "
                f"{', '.join(ROLES)}" + nearest(str(role), ROLES)
            )
        if not isinstance(content, str):
            raise BadInput(f"{where}: message {number} in {column!r} has {describe(content)} as content, expected text")
        messages.append({"role": ROLES[role], "content": _plain_text(where, content)})  # type: ignore[typeddict-item]
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadInput(f"{where}: the last message in {column!r} is no user's question, expected a prompt to answer")
    return messages


def _tags(where: str, row: Mapping[str, Any], columns: Columns) -> list[str]:
    value = row.get(columns.tags or "tags")
    if value is None and columns.tags is None:
        return []
    if isinstance(value, str):
        return [tag.strip() for tag in value.split(",") if tag.strip()]
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise BadInput(f"{where}: found {describe(value)} as tags, expected a list of texts")
    return list(value)


def _plain_text(where: str, text: str) -> str:
    """`text`, which can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: found half of a surrogate pair, expected Unicode text") from None
    return text


def _open(config: RowSource, folder: Path) -> tuple[str, Iterator[Row]]:
    """(format, rows) of a source."""
    path = folder / Path(config.source).expanduser()
    if not path.exists():
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(f"{config.source}: no such file or folder, relative to {folder}" + nearest(path.name, names))
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    by_suffix = "datasets" if path.is_dir() else _SUFFIXES.get(suffixes[-1] if suffixes else "", "")
    kind: str = config.format if config.format not in {"auto", "hh"} else by_suffix
    if not kind:
        raise BadInput(f"{config.source}: cannot tell the format by the name, expected .jsonl, .csv, .parquet (.gz) or "
                       f"a folder, or `format:`")  # fmt: skip
    if config.split is not None and kind != "datasets":
        raise BadInput(f"{config.source}: a {kind} file has no splits, so `split: {config.split}` means nothing here")
    readers = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
    rows = _datasets(path, config) if kind == "datasets" else readers[kind](path, config.source)
    first = next(rows, None)
    if first is None:
        return kind, iter(())
    columns = first[1]
    transcripts = str(columns.get("chosen")).startswith("\n\nHuman:") and not {"prompt", "messages"} & set(columns)
    whole = _again(first, rows)
    return ("hh" if config.format == "hh" or (config.format == "auto" and transcripts) else kind), whole


def _again(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, compressed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}:{number + 1}: not UTF-8 text: {error.reason}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise BadInput(f"{name}:{number + 1}: not a whole gzip file: {error}") from None


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in _lines(path, name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = getattr(error, "msg", "nested too deeply")
            raise BadInput(f"{name}:{number}: not a JSON object on one line: {message}") from None
        if not isinstance(row, dict):
            raise BadInput(f"{name}:{number}: found {describe(row)}, expected a JSON object with columns")
        yield f"{name}:{number}", row


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(10_000_000)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader((line for _, line in _lines(path, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for values in reader:
            if header is None:
                header = values
            elif len(values) != len(header):
                if values:
                    raise BadInput(
                        f"{name}:{start}: found {len(values)} columns, expected {len(header)} as in the first line"
                    )
            else:
                yield f"{name}:{start}", dict(zip(header, values, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{name}:{start}: not CSV: {error}") from None


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{name}: not a Parquet file: {str(error).splitlines()[0]}") from None
    number = 0
    for batch in file.iter_batches(1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{name}: row {number}", row


def _datasets(path: Path, config: RowSource) -> Iterator[Row]:
    """The rows of a folder that `datasets` saved."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise BadInput(f"{config.source}: not a folder saved by `datasets`, expected one, or a file") from None
    if isinstance(loaded, datasets.DatasetDict):
        known = ", ".join(map(str, loaded))
        if config.split not in loaded:
            found = "no `split:`" if config.split is None else f"`split: {config.split}`"
            raise BadInput(f"{config.source}: found {found}, expected one of {known}")
        loaded = loaded[config.split]
    elif config.split is not None:
        raise BadInput(f"{config.source}: found `split: {config.split}`, but the folder holds one set without splits")
    for number, row in enumerate(loaded, start=1):
        yield f"{config.source}: row {number}", row
