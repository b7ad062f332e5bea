"""The rows of a file in any of the formats, and the conversations in their columns: texts, messages, transcripts."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai.prompt_sets.prompt_set_config import Columns, RowSource
from cai.storage.rows import Message
from cai.text.encodings import utf16_hint
from cai.text.errors import BadInput, did_you_mean, nearest_name
from cai.text.formatting import describe

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
"""The role of each spelling of it; `human` and `gpt` are ShareGPT's."""

_TURN = re.compile(r"\n\n(Human|Assistant):")


class Row(NamedTuple):
    location: str
    """`file:line`, or `file: row n` for formats without lines."""
    columns: Mapping[str, Any]


def open_rows(config: RowSource, folder: Path) -> tuple[str, Iterator[Row]]:
    """The format and the rows of a source; its path is relative to `folder`.

    The format is `hh` for transcripts, in whichever kind of file they are. Raises BadInput for an unreadable source.
    """
    path = folder / Path(config.source).expanduser()
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        raise BadInput(f"{config.source}: no such file or folder, relative to {folder}{hint}")
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    by_suffix = "datasets" if path.is_dir() else _SUFFIXES.get(suffixes[-1] if suffixes else "", "")
    file_format: str = config.format if config.format not in {"auto", "hh"} else by_suffix
    if not file_format:
        raise BadInput(f"{config.source}: cannot tell the format by the name, expected .jsonl, .csv, .parquet (.gz) or "
                       f"a folder, or `format:`")  # fmt: skip
    if config.split is not None and file_format != "datasets":
        no_splits = f"a {file_format} file has no splits"
        raise BadInput(f"{config.source}: {no_splits}, so `split: {config.split}` means nothing here")
    readers = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}
    rows = _datasets_rows(path, config) if file_format == "datasets" else readers[file_format](path, config.source)
    first = next(rows, None)
    if first is None:
        return file_format, iter(())
    has_transcripts = str(first.columns.get("chosen")).startswith("\n\nHuman:")
    is_hh = config.format == "auto" and has_transcripts and not {"prompt", "messages"} & set(first.columns)
    return ("hh" if is_hh or config.format == "hh" else file_format), itertools.chain([first], rows)


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """The number and the text of each line of a text file, compressed or not."""
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rb") as beginning:
            if hint := utf16_hint(beginning.read(100)):
                raise BadInput(f"{name}:1: {hint}")
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}:{number + 1}: not UTF-8 text: {error.reason}") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise BadInput(f"{name}:{number + 1}: not a whole gzip file: {error}") from None


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
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
        yield Row(f"{name}:{number}", row)


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(10_000_000)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader((line for _, line in _lines(path, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line_number = 1  # of the row's first line, as a quoted value may hold line breaks
    try:
        for values in reader:
            if header is None:
                header = values
                _check_separator(header, delimiter, name)
            elif len(values) == len(header):
                yield Row(f"{name}:{line_number}", dict(zip(header, values, strict=True)))
            elif values:
                counts = f"found {len(values)} columns, expected {len(header)}"
                hint = f"; text with {delimiter!r} in it stands in double quotes" if len(values) > len(header) else ""
                raise BadInput(f"{name}:{line_number}: {counts} as in the first line{hint}")
            line_number = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{name}:{line_number}: not CSV: {error}") from None


def _check_separator(header: list[str], delimiter: str, name: str) -> None:
    """Refuses a file whose first line has another separator between the names of columns, as spreadsheets write it."""
    separators = [separator for separator in (";", "\t", "|", ",") if separator != delimiter]
    other = next((separator for separator in separators if len(header) == 1 and separator in header[0]), None)
    if other is not None:
        suffix = {"\t": ", or call it .tsv", ",": ", or call it .csv"}.get(other, "")
        fix = f"save it with {delimiter!r} or as .jsonl{suffix}"
        raise BadInput(f"{name}:1: found {other!r} between the columns, expected {delimiter!r}; {fix}")


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{name}: not a Parquet file: {str(error).splitlines()[0]}") from None
    rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield Row(f"{name}: row {number}", row)


def _datasets_rows(path: Path, config: RowSource) -> Iterator[Row]:
    """The rows of a folder that `datasets` has saved."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise BadInput(f"{config.source}: not a folder saved by `datasets`, expected one, or a file") from None
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            splits = ", ".join(map(str, dataset))
            shown = "no `split:`" if config.split is None else f"`split: {config.split}`"
            raise BadInput(f"{config.source}: found {shown}, expected one of {splits}")
        dataset = dataset[config.split]
    elif config.split is not None:
        raise BadInput(f"{config.source}: found `split: {config.split}`, but the folder holds one set without splits")
    for number, row in enumerate(dataset, start=1):
        yield Row(f"{config.source}: row {number}", row)


def row_messages(row: Row, columns: Columns) -> list[Message]:
    """The conversation in a row; its last message is the user's. Raises BadInput where there is none."""
    names = row.columns
    column = columns.messages or columns.prompt or ("messages" if "messages" in names else "prompt")
    if names.get(column) is None:
        raise BadInput(
            f"{row.location}: found the columns {', '.join(map(str, names)) or '(none)'}, expected {column!r}"
            + f"; say which one it is with `columns: {{prompt: {nearest_name(column, names) or '…'}}}`"
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
    return [{"role": ROLES[speaker.lower()], "content": content.strip()} for speaker, content in turns]


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
        messages.append({"role": ROLES[role], "content": _check_unicode(row, content)})
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        subject = f"{row.location}: the last message in {column!r}"
        raise BadInput(f"{subject} is no user's question, expected a prompt to answer")
    return messages


def _check_unicode(row: Row, text: str) -> str:
    """`text`. Raises BadInput where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{row.location}: found half of a surrogate pair, expected Unicode text") from None
    return text
