"""The journal of a feedback stage: its rows on disk, a batch at a time, so that a killed stage continues.

The plan is a list of items with unique ids, cut into batches beforehand. Each finished batch is one line, written with
one call and flushed to the disk. The next start discards a torn last line and computes its whole batch again: an
engine gets the same requests together in an interrupted run as in an undisturbed one. `finish` writes the rows in the
plan's order to `records.jsonl` and the failures to `failures.jsonl`.

Several processes share a plan through the folder alone. Of the batches that no file holds, rank r of n computes those
whose number is r modulo n, and writes them to a file of its own. Batches in any rank's file count, so that a later run,
with any number of ranks, computes the missing ones and nothing else. Stages need not know about ranks: when a stage
finishes its journal, rank 0 waits for the other ranks' batches and continues alone, and the others end with
`ShareDone`.

Left out: moving batches between ranks. A rank that has finished its share does not help slower ones.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai.storage.files import read_json, replacing
from cai.storage.rows import Failure, canonical_json, read_rows, row_lines, stable_id
from cai.text.errors import StageFailed

if TYPE_CHECKING:
    from cai.text.progress import Progress

JOURNAL = "journal.jsonl"
"""The file of rank 0; rank 1 writes `journal-1.jsonl`."""
RECORDS = "records.jsonl"
FAILURES = "failures.jsonl"
PLAN = "plan.json"
"""The number of rows of each batch in `records.jsonl`, so that a finished stage can be reopened."""
POLL_SECONDS = 0.1
"""Time between two reads of the other ranks' files."""


class ShareDone(Exception):
    """Ends the stage on every rank but 0: its batches are on the disk, and rank 0 does the rest of the stage."""


@dataclass(frozen=True)
class Batch:
    """Items that are computed and written together.

    `attempt` counts how often `cai run --retry-failures` has reopened the batch; seeds of random sampling contain it.
    """

    number: int
    items: list[Any]
    attempt: int = 0


class Finished(NamedTuple):
    """The rows and failures that `finish` has written."""

    n_rows: int
    failures: list[Failure]


class Journal:
    """The batches of one stage on disk in `folder`; this process is rank `rank` of `ranks`."""

    def __init__(self, folder: Path, progress: Progress | None = None, rank: int = 0, ranks: int = 1) -> None:
        self.folder = folder
        self.path = folder / (JOURNAL if rank == 0 else f"journal-{rank}.jsonl")
        """This rank's file, which exists from the first batch until the stage is done."""
        self.rank, self.ranks = rank, ranks
        self.tokens = 0
        """Tokens of all finished batches, including those of other ranks and earlier processes."""
        self._progress = progress
        self._plan: str | None = None
        """Hash of the batch size and the items' ids."""
        self._batch_sizes: list[int] = []
        """Number of items of each batch."""
        self._locations: dict[int, tuple[Path, int]] = {}
        """The file and the offset of the line of each batch on disk, by batch number."""
        self._ends: dict[Path, int] = {}
        """Offset up to which each file has been read: the end of its last whole line of this plan."""
        self._attempts: dict[str, int] = {}

    def batches(self, items: Sequence[Mapping[str, Any]], size: int, unit: str = "items") -> Iterator[Batch]:
        """This rank's batches of `items` that are not on disk yet; each must be appended before the next one is taken.

        Raises StageFailed where two items have the same id.
        """
        ids = [item["id"] for item in items]
        if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
            raise StageFailed(f"{len(repeated)} items of this stage share an id with another, first {repeated[0]!r}")
        self._plan = stable_id(size, ids)
        batches = [list(items[start : start + size]) for start in range(0, len(items), size)]
        self._batch_sizes = [len(batch) for batch in batches]
        self._recover()
        if self._progress:
            n_finished = sum(self._batch_sizes[number] for number in self._locations)
            self._progress.start(total=len(items), unit=unit, finished=n_finished)
        for number in self._missing():
            yield Batch(number, batches[number], self._attempts.get(str(number), 0))
            if number not in self._locations:
                raise AssertionError(f"batch {number} was not appended")

    def append(
        self, batch: Batch, rows: Iterable[Mapping[str, Any]], failures: Iterable[Failure], tokens: int | None = None
    ) -> None:
        """Writes one finished batch. `tokens`, for the display, are by default the sum of the rows' `n_tokens`."""
        rows = list(rows)
        if tokens is None:
            tokens = sum(row.get("n_tokens", 0) for row in rows)
        failed = [{"id": failure.id, "reason": failure.reason} for failure in failures]
        line = canonical_json({"batch": batch.number, "rows": rows, "failures": failed, "tokens": tokens}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._read_and_report()

    def finish(self) -> Finished:
        """Waits for the other ranks, then writes `records.jsonl` and `failures.jsonl` in the plan's order.

        Every batch of this rank must have been appended. Raises ShareDone on every rank but 0.
        """
        missing = self._missing()
        if self._plan is None or missing:
            raise AssertionError(f"{len(missing)} of {len(self._batch_sizes)} batches were not appended")
        if self.rank != 0:
            raise ShareDone
        while len(self._locations) < len(self._batch_sizes):  # other ranks write theirs
            time.sleep(POLL_SECONDS)
            self._read_and_report()
        counts: list[int] = []
        failures: list[dict[str, Any]] = []
        with replacing(self.folder / RECORDS) as records:
            for number in range(len(self._batch_sizes)):
                path, offset = self._locations[number]
                with path.open("rb") as file:
                    file.seek(offset)
                    entry = json.loads(file.readline())
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
        """Removes the files of all ranks, once the stage is marked as done."""
        for path in journal_paths(self.folder):
            path.unlink()

    def _missing(self) -> list[int]:
        """The numbers of this rank's batches that are not on disk."""
        share = range(self.rank, len(self._batch_sizes), self.ranks)
        return [number for number in share if number not in self._locations]

    def _recover(self) -> None:
        """Reads the files of all ranks. Cuts a torn tail off this rank's file, or begins it for a new plan."""
        self._locations, self._ends, self._attempts, self.tokens = {}, {}, {}, 0
        self._read_new_batches()
        if self.path in self._ends:
            os.truncate(self.path, self._ends[self.path])
        else:
            with replacing(self.path) as file:
                file.write(_head(self._plan, self._attempts))

    def _read_and_report(self) -> None:
        """Reads new batches of all ranks and reports them as progress."""
        for number, tokens in self._read_new_batches():
            if self._progress:
                self._progress.advance(items=self._batch_sizes[number], tokens=tokens)

    def _read_new_batches(self) -> list[tuple[int, int]]:
        """Reads the whole lines of this plan that are new on disk; the number and the tokens of each new batch."""
        new_batches = []
        for path in journal_paths(self.folder):
            with path.open("rb") as file:
                file.seek(self._ends.get(path, 0))
                for line in file:
                    entry, start = _parse(line), self._ends.get(path, 0)
                    if entry is None or (start == 0 and entry.get("plan") != self._plan):
                        break
                    self._ends[path] = start + len(line)
                    if start == 0:
                        self._attempts |= entry["attempts"]
                    elif entry["batch"] not in self._locations:
                        self._locations[entry["batch"]] = path, start
                        self.tokens += entry["tokens"]
                        new_batches.append((entry["batch"], entry["tokens"]))
        return new_batches


def journal_paths(folder: Path) -> list[Path]:
    """The journal files of all ranks of an unfinished stage."""
    return sorted(folder.glob(f"{Path(JOURNAL).stem}*.jsonl"))


def reopen(folder: Path) -> int:
    """Turns a finished stage's records back into a journal without the batches that hold failures.

    Returns the number of these batches; 0 for a stage that had no journal. The records stay unchanged until the stage
    is finished again.
    """
    if (plan := read_json(folder / PLAN)) is None:
        return 0
    failed = {failure["batch"] for failure in read_rows(folder / FAILURES)}
    if not failed:
        return 0
    attempts = plan["attempts"] | {str(number): plan["attempts"].get(str(number), 0) + 1 for number in failed}
    for path in journal_paths(folder):  # a run that ended between DONE and `discard` leaves files with the failures
        path.unlink()
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
    """The object on a whole line; None for a torn line."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
