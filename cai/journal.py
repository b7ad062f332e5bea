"""Records that survive being killed: a stage's items are computed and written a batch at a time.

The plan is a list of items with unique ids, cut into batches beforehand. Each finished batch is one line, written with
one call and flushed to the disk. A torn last line is discarded at the next start and its batch computed again, whole:
what an engine is given at once is the same in an interrupted run and an undisturbed one. `finish` writes the rows in
the plan's order to `records.jsonl` and what failed to `failures.jsonl`.

Left out: several writers. One process owns a journal; its lines carry their batch's number, so that journals of several
ranks could be merged by it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from cai.engines import Failure
from cai.errors import StageFailed
from cai.files import read_json, replacing
from cai.records import canonical_json, read_rows, row_lines, stable_id

if TYPE_CHECKING:
    from cai.stages import Progress

JOURNAL = "journal.jsonl"
RECORDS = "records.jsonl"
FAILURES = "failures.jsonl"
PLAN = "plan.json"
"""How the rows of `records.jsonl` fall into batches, so that a finished stage can be reopened."""


@dataclass(frozen=True)
class Batch:
    """Items that are computed and written together.

    `attempt` counts how often `cai run --retry-failures` has reopened it: part of the seed where chance decides.
    """

    number: int
    items: list[Any]
    attempt: int = 0


class Finished(NamedTuple):
    """What `finish` wrote."""

    n_rows: int
    failures: list[Failure]


class Journal:
    """The records of one stage in `folder`, and how far they have come."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self.folder = folder
        self.tokens = 0
        """Tokens of every finished batch, earlier processes' included."""
        self._progress = progress
        self._plan: str | None = None
        self._n_batches = 0
        self._written: dict[int, int] = {}
        """Batch number to the offset of its line."""
        self._attempts: dict[str, int] = {}

    @property
    def path(self) -> Path:
        """The journal itself, there from the first batch until the stage is done."""
        return self.folder / JOURNAL

    def batches(self, items: Sequence[Mapping[str, Any]], size: int, unit: str = "items") -> Iterator[Batch]:
        """The batches of `items` that are not yet on disk. Each must be appended before the next is asked for.

        Raises StageFailed where two items have the same id.
        """
        ids = [item["id"] for item in items]
        if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
            raise StageFailed(f"{len(repeated)} items of this stage share an id with another, first {repeated[0]!r}")
        self._plan = stable_id(size, ids)
        self._n_batches = -(-len(items) // size)
        self._recover()
        done = sum(len(items[number * size : (number + 1) * size]) for number in self._written)
        if self._progress:
            self._progress.start(total=len(items), unit=unit, done=done)
        for number in range(self._n_batches):
            if number in self._written:
                continue
            yield Batch(number, list(items[number * size : (number + 1) * size]), self._attempts.get(str(number), 0))
            if number not in self._written:
                raise AssertionError(f"batch {number} was not appended")

    def append(
        self, batch: Batch, rows: Iterable[Mapping[str, Any]], failures: Iterable[Failure], tokens: int | None = None
    ) -> None:
        """Writes one finished batch. `tokens` is for the speed display; by default the rows' `n_tokens` added up."""
        rows = list(rows)
        if tokens is None:
            tokens = sum(row.get("n_tokens", 0) for row in rows)
        failed = [{"id": failure.id, "reason": failure.reason} for failure in failures]
        line = canonical_json({"batch": batch.number, "rows": rows, "failures": failed, "tokens": tokens}) + "\n"
        with self.path.open("ab") as file:
            self._written[batch.number] = file.tell()
            _write_all(file, line.encode())
        self.tokens += tokens
        if self._progress:
            self._progress.advance(items=len(batch.items), tokens=tokens)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every batch on disk, in the plan's order: what a later part of the same plan builds on."""
        with self.path.open("rb") as journal:
            for number in sorted(self._written):
                journal.seek(self._written[number])
                yield from json.loads(journal.readline())["rows"]

    def finish(self) -> Finished:
        """Writes `records.jsonl` and `failures.jsonl` in the plan's order. Every batch must have been appended."""
        if self._plan is None or len(self._written) != self._n_batches:
            raise AssertionError(f"{len(self._written)} of {self._n_batches} batches are complete")
        counts: list[int] = []
        failures: list[dict[str, Any]] = []
        with replacing(self.folder / RECORDS) as records, self.path.open("rb") as journal:
            for number in range(self._n_batches):
                journal.seek(self._written[number])
                entry = json.loads(journal.readline())
                for line in row_lines(entry["rows"]):
                    records.write(line.encode())
                counts.append(len(entry["rows"]))
                failures += [{**failure, "batch": number} for failure in entry["failures"]]
        with replacing(self.folder / FAILURES) as file:
            file.writelines(line.encode() for line in row_lines(failures))
        plan = {"plan": self._plan, "rows": counts, "tokens": self.tokens, "attempts": self._attempts}
        with replacing(self.folder / PLAN) as file:
            file.write(canonical_json(plan).encode())
        return Finished(sum(counts), [Failure(failure["id"], failure["reason"]) for failure in failures])

    def discard(self) -> None:
        """Removes the journal, once the stage is marked as done."""
        self.path.unlink(missing_ok=True)

    def _recover(self) -> None:
        """Reads what is on disk: all whole lines of this plan. Cuts off a torn tail; starts anew for another plan."""
        self._written, self._attempts, self.tokens = {}, {}, 0
        end = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    entry = _parse(line)
                    if entry is None or (end == 0 and entry.get("plan") != self._plan):
                        break
                    if end == 0:
                        self._attempts = entry["attempts"]
                    else:
                        self._written[entry["batch"]] = end
                        self.tokens += entry["tokens"]
                    end += len(line)
        if end == 0:
            self._start({})
        else:
            os.truncate(self.path, end)

    def _start(self, attempts: dict[str, int]) -> None:
        with replacing(self.path) as file:
            file.write(_head(self._plan, attempts))


def reopen(folder: Path) -> int:
    """Turns a finished stage's records back into a journal without the batches that hold failures; their number.

    The records stay as they are until the stage is finished again. A stage without a journal has no such batches.
    """
    if (plan := read_json(folder / PLAN)) is None:
        return 0
    failed = {failure["batch"] for failure in read_rows(folder / FAILURES)}
    if not failed:
        return 0
    attempts = plan["attempts"] | {str(number): plan["attempts"].get(str(number), 0) + 1 for number in failed}
    with replacing(folder / JOURNAL) as file, (folder / RECORDS).open(encoding="utf-8") as records:
        file.write(_head(plan["plan"], attempts))
        for number, count in enumerate(plan["rows"]):
            rows = [json.loads(records.readline()) for _ in range(count)]
            if number not in failed:
                tokens = sum(row.get("n_tokens", 0) for row in rows)
                line = canonical_json({"batch": number, "rows": rows, "failures": [], "tokens": tokens})
                file.write(line.encode() + b"\n")
    return len(failed)


def _head(plan: str | None, attempts: dict[str, int]) -> bytes:
    return canonical_json({"plan": plan, "attempts": attempts}).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for one that was torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _write_all(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
