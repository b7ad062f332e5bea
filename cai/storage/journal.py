"""The journal of a feedback stage: its rows on disk, a batch at a time, so that a killed stage continues.

The plan is a list of items with unique ids, cut into batches beforehand. A stage takes a portion at a time: one batch
of the size that its config states, or else neighbouring small batches, as many as the profile lets a process hold in
flight. Each finished portion is one line, written with one call and flushed to the disk. The next start discards a torn
last line and computes its whole portion again: an engine gets the same requests together in an interrupted run as in an
undisturbed one. `finish` writes the rows in the plan's order to `records.jsonl` and the failures to `failures.jsonl`.

Several processes share a plan through the folder alone. Rank r of n computes the portions whose number is r modulo n,
as far as no file holds their batches, and writes them to a file of its own. Batches in any rank's file count, so that a
later run, with any number of ranks, computes the missing ones and nothing else. Stages need not know about ranks: when
a stage finishes its journal, rank 0 waits for the other ranks' batches and continues alone, and the others end with
`ShareDone`.

Left out: moving portions between ranks. A rank that has finished its share does not help slower ones.
"""

from __future__ import annotations

import itertools
import json
import math
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
"""The numbers of batches and of rows of each line, in the order of `records.jsonl`, to reopen a finished stage."""
POLL_SECONDS = 0.1
"""Time between two reads of the other ranks' files."""


class ShareDone(Exception):
    """Ends the stage on every rank but 0: its batches are on the disk, and rank 0 does the rest of the stage."""


N_BATCHES, LARGEST_BATCH = 64, 256
"""Number of batches where a stage states no size: enough for as many ranks, of at most so many items."""


@dataclass(frozen=True)
class Batch:
    """Items that are computed and written together: one batch of the plan, or `n_batches` from `number` on.

    `attempt` counts how often `cai run --retry-failures` has reopened the batch; seeds of random sampling contain it.
    """

    number: int
    items: list[Any]
    attempt: int = 0
    n_batches: int = 1

    @property
    def numbers(self) -> range:
        """The numbers of its batches in the plan."""
        return range(self.number, self.number + self.n_batches)


class Finished(NamedTuple):
    """The rows and failures that `finish` has written."""

    n_rows: int
    failures: list[Failure]


class Journal:
    """The batches of one stage on disk in `folder`; this process is rank `rank` of `ranks`.

    `in_flight` is the number of items that a portion of several batches may have; None = all of the rank's items.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, rank: int = 0, ranks: int = 1,
        in_flight: int | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.path = folder / (JOURNAL if rank == 0 else f"journal-{rank}.jsonl")
        """This rank's file, which exists from the first batch until the stage is done."""
        self.rank, self.ranks, self.in_flight = rank, ranks, in_flight
        self.tokens = 0
        """Tokens of all finished batches, including those of other ranks and earlier processes."""
        self._progress = progress
        self._plan: str | None = None
        """Hash of the batch size and the items' ids."""
        self._batch_sizes: list[int] = []
        """Number of items of each batch."""
        self._share: list[range] = []
        """This rank's portions, as numbers of neighbouring batches."""
        self._finished: set[int] = set()
        """Numbers of the batches on disk."""
        self._lines: dict[int, tuple[Path, int]] = {}
        """The file and the offset of each line with batches, by the number of its first batch."""
        self._ends: dict[Path, int] = {}
        """Offset up to which each file has been read: the end of its last whole line of this plan."""
        self._attempts: dict[str, int] = {}

    def batches(
        self, items: Sequence[Mapping[str, Any]], size: int | None = None, unit: str = "items"
    ) -> Iterator[Batch]:
        """This rank's portions of `items` that are not on disk yet; each must be appended before the next one is taken.

        With a `size`, a portion is one batch of so many items, on any number of ranks. Without, the batches follow from
        the number of items, and a portion from `in_flight` and `ranks`. Raises StageFailed where two items have the
        same id.
        """
        ids = [item["id"] for item in items]
        if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
            raise StageFailed(f"{len(repeated)} items of this stage share an id with another, first {repeated[0]!r}")
        batch_size = min(max(1, len(items) // N_BATCHES), LARGEST_BATCH) if size is None else size
        self._plan = stable_id("portions", batch_size, ids)
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        self._batch_sizes = [len(batch) for batch in batches]
        most = len(batches) if self.in_flight is None else self.in_flight // batch_size
        most = max(1, most) if size is None else 1
        self._share = portions(len(batches), most, self.ranks)[self.rank :: self.ranks]
        self._recover()
        if self._progress:
            n_finished = sum(self._batch_sizes[number] for number in self._finished)
            self._progress.start(total=len(items), unit=unit, finished=n_finished)
        for run in self._missing():
            merged = [item for number in run for item in batches[number]]
            yield Batch(run.start, merged, self._attempt(run.start), len(run))
            if not self._finished.issuperset(run):
                raise AssertionError(f"batch {run.start} was not appended")

    def append(
        self, batch: Batch, rows: Iterable[Mapping[str, Any]], failures: Iterable[Failure], tokens: int | None = None
    ) -> None:
        """Writes one finished portion. `tokens`, for the display, are by default the sum of the rows' `n_tokens`."""
        rows = list(rows)
        if tokens is None:
            tokens = sum(row.get("n_tokens", 0) for row in rows)
        failed = [{"id": failure.id, "reason": failure.reason} for failure in failures]
        line = _line(batch.number, batch.n_batches, rows, failed, tokens)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._read_and_report()

    def finish(self) -> Finished:
        """Waits for the other ranks, then writes `records.jsonl` and `failures.jsonl` in the plan's order.

        Every batch of this rank must have been appended. Raises ShareDone on every rank but 0.
        """
        missing = self._missing()
        if self._plan is None or missing:
            raise AssertionError(f"{sum(map(len, missing))} of {len(self._batch_sizes)} batches were not appended")
        if self.rank != 0:
            raise ShareDone
        while len(self._finished) < len(self._batch_sizes):  # other ranks write theirs
            time.sleep(POLL_SECONDS)
            self._read_and_report()
        counts: list[int] = []
        lengths: list[int] = []
        failures: list[dict[str, Any]] = []
        with replacing(self.folder / RECORDS) as records:
            for number, (path, offset) in sorted(self._lines.items()):
                with path.open("rb") as file:
                    file.seek(offset)
                    entry = json.loads(file.readline())
                for line in row_lines(entry["rows"]):
                    records.write(line.encode())
                counts.append(len(entry["rows"]))
                lengths.append(entry["batches"])
                failures += [{**failure, "batch": number} for failure in entry["failures"]]
        with replacing(self.folder / FAILURES) as file:
            file.writelines(line.encode() for line in row_lines(failures))
        plan = {"plan": self._plan, "batches": lengths, "rows": counts, "tokens": self.tokens}
        with replacing(self.folder / PLAN) as file:
            file.write(canonical_json({**plan, "attempts": self._attempts}).encode())
        return Finished(sum(counts), [Failure(failure["id"], failure["reason"]) for failure in failures])

    def discard(self) -> None:
        """Removes the files of all ranks, once the stage is marked as done."""
        for path in journal_paths(self.folder):
            path.unlink()

    def _missing(self) -> list[range]:
        """This rank's batches that are not on disk: runs of neighbours in one portion that have as many attempts."""
        runs: list[range] = []
        for portion in self._share:
            run = range(0)
            for number in [number for number in portion if number not in self._finished]:
                if run and number == run.stop and self._attempt(number) == self._attempt(run.start):
                    run = runs[-1] = range(run.start, number + 1)
                else:
                    run = range(number, number + 1)
                    runs.append(run)
        return runs

    def _attempt(self, number: int) -> int:
        """How often a batch has been reopened."""
        return self._attempts.get(str(number), 0)

    def _recover(self) -> None:
        """Reads the files of all ranks. Cuts a torn tail off this rank's file, or begins it for a new plan."""
        self._lines, self._ends, self._attempts, self.tokens = {}, {}, {}, 0
        self._finished = set()
        self._read_new_lines()
        if self.path in self._ends:
            os.truncate(self.path, self._ends[self.path])
        else:
            with replacing(self.path) as file:
                file.write(_head(self._plan, self._attempts))

    def _read_and_report(self) -> None:
        """Reads new lines of all ranks and reports them as progress."""
        for numbers, tokens in self._read_new_lines():
            if self._progress:
                self._progress.advance(items=sum(self._batch_sizes[number] for number in numbers), tokens=tokens)

    def _read_new_lines(self) -> list[tuple[range, int]]:
        """Reads the whole lines of this plan that are new on disk; the batches and the tokens of each."""
        new_lines = []
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
                        continue
                    numbers = range(entry["batch"], entry["batch"] + entry["batches"])
                    if self._finished.isdisjoint(numbers):
                        self._finished.update(numbers)
                        self._lines[numbers.start] = path, start
                        self.tokens += entry["tokens"]
                        new_lines.append((numbers, entry["tokens"]))
        return new_lines


def portions(n_batches: int, most: int, ranks: int) -> list[range]:
    """Neighbouring batches as portions of at most `most`, as equal as can be, the same number for each rank.

    With fewer batches than ranks, a portion for each batch.
    """
    n_portions = min(ranks * math.ceil(n_batches / (ranks * most)), n_batches)
    return [range(k * n_batches // n_portions, (k + 1) * n_batches // n_portions) for k in range(n_portions)]


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """What failed in a finished stage, `{"id", "reason", "batch"}` each; empty for a stage without a journal."""
    path = folder / FAILURES
    return read_rows(path) if path.exists() else []


def journal_paths(folder: Path) -> list[Path]:
    """The journal files of all ranks of an unfinished stage."""
    return sorted(folder.glob(f"{Path(JOURNAL).stem}*.jsonl"))


def reopen(folder: Path) -> int:
    """Turns a finished stage's records back into a journal without the portions that hold failures.

    Returns the number of these portions; 0 for a stage that had no journal. The records stay unchanged until the stage
    is finished again.
    """
    if (plan := read_json(folder / PLAN)) is None:
        return 0
    failed = {failure["batch"] for failure in read_failures(folder)}
    if not failed:
        return 0
    starts = list(itertools.accumulate(plan["batches"], initial=0))
    lines = list(zip(starts, plan["batches"], plan["rows"], strict=False))
    again = {number for start, n, _ in lines if start in failed for number in range(start, start + n)}
    attempts = plan["attempts"] | {str(number): plan["attempts"].get(str(number), 0) + 1 for number in sorted(again)}
    for path in journal_paths(folder):  # a run that ended between DONE and `discard` leaves files with the failures
        path.unlink()
    with replacing(folder / JOURNAL) as file, (folder / RECORDS).open(encoding="utf-8") as records:
        file.write(_head(plan["plan"], attempts))
        for start, n_batches, n_rows in lines:
            rows = [json.loads(records.readline()) for _ in range(n_rows)]
            if start not in failed:
                file.write(_line(start, n_batches, rows, [], sum(row.get("n_tokens", 0) for row in rows)))
    return len(failed)


def _head(plan: str | None, attempts: dict[str, int]) -> bytes:
    return canonical_json({"plan": plan, "attempts": attempts}).encode() + b"\n"


def _line(number: int, n_batches: int, rows: list[Any], failures: list[Any], tokens: int) -> bytes:
    """The line of a portion that begins with batch `number`."""
    entry = {"batch": number, "batches": n_batches, "rows": rows, "failures": failures, "tokens": tokens}
    return canonical_json(entry).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for a torn line."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
