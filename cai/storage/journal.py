"""Records that survive being killed: a stage's items are computed and written a batch at a time.

The plan is a list of items with unique ids, cut into batches beforehand. Each finished batch is one line, written with
one call and flushed to the disk. A torn last line is discarded at the next start and its batch computed again, whole:
what an engine is given at once is the same in an interrupted run and an undisturbed one. `finish` writes the rows in
the plan's order to `records.jsonl` and what failed to `failures.jsonl`.

Several processes share a plan through the folder alone. Of the batches that no file has, rank r of n computes those
whose number is r modulo n, and writes them to a file of its own. What lies in any rank's file counts, so that a later
run, with however many ranks, computes what is missing and nothing else. A stage knows nothing of this: where it
finishes its journal, rank 0 waits for the others' batches and goes on alone, and the others end with `ShareDone`.

Left out: batches that change hands. A rank that is done leaves the slower ones to themselves.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from cai.storage.files import read_json, replacing
from cai.storage.rows import Failure, canonical_json, read_rows, row_lines, stable_id
from cai.text.errors import StageFailed

if TYPE_CHECKING:
    from cai.text.progress import Progress

JOURNAL = "journal.jsonl"
"""Rank 0's. That of rank 1 is `journal-1.jsonl`."""
RECORDS = "records.jsonl"
FAILURES = "failures.jsonl"
PLAN = "plan.json"
"""How the rows of `records.jsonl` fall into batches, so that a finished stage can be reopened."""
POLL = 0.1
"""Seconds between two looks at what other ranks have written."""


class ShareDone(Exception):
    """On any rank but 0: this process's batches are on the disk, and the rest of the stage is rank 0's."""


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
    """The records of one stage in `folder`, and how far they have come; `rank` of `ranks` computes a share of them."""

    def __init__(self, folder: Path, progress: Progress | None = None, rank: int = 0, ranks: int = 1) -> None:
        self.folder = folder
        self.path = folder / (JOURNAL if rank == 0 else f"journal-{rank}.jsonl")
        """This rank's own file, there from its start until the stage is done."""
        self.rank = rank
        self.ranks = ranks
        self.tokens = 0
        """Tokens of every finished batch, other ranks' and earlier processes' included."""
        self._progress = progress
        self._plan: str | None = None
        self._sizes: list[int] = []
        """Items of each batch."""
        self._written: dict[int, tuple[Path, int]] = {}
        """Batch number to the file and the offset of its line."""
        self._read: dict[Path, int] = {}
        """How far each file has been read: to the end of its last whole line of this plan."""
        self._attempts: dict[str, int] = {}

    def batches(
        self, items: Sequence[Mapping[str, Any]], size: int, unit: str = "items", builds_on: int = 0
    ) -> Iterator[Batch]:
        """This rank's batches of `items` that are not yet on disk. Each must be appended before the next is asked for.

        Items after the first `builds_on` are computed from the `rows` of these: a batch that holds such an item comes
        when all of these are on disk, except those that it holds itself.
        Raises StageFailed where two items have the same id.
        """
        ids = [item["id"] for item in items]
        if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
            raise StageFailed(f"{len(repeated)} items of this stage share an id with another, first {repeated[0]!r}")
        self._plan = stable_id(size, ids)
        cut = [items[first : first + size] for first in range(0, len(items), size)]
        self._sizes = [len(batch) for batch in cut]
        self._recover()
        if self._progress:
            done = sum(self._sizes[number] for number in self._written)
            self._progress.start(total=len(items), unit=unit, done=done)
        for number in self._share():
            if number in self._written:
                continue
            if (number + 1) * size > builds_on:
                self._wait_for(min(number, -(-builds_on // size)))
            yield Batch(number, list(cut[number]), self._attempts.get(str(number), 0))
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
            _write_all(file, line.encode())
        self._tell_new()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every batch on disk, in the plan's order: what a later part of the same plan builds on."""
        for number in sorted(self._written):
            yield from self._entry(number)["rows"]

    def finish(self) -> Finished:
        """Writes `records.jsonl` and `failures.jsonl` in the plan's order, when the other ranks' batches are there too.

        Every batch of this rank must have been appended. Raises ShareDone on any rank but 0.
        """
        missing = [number for number in self._share() if number not in self._written]
        if self._plan is None or missing:
            raise AssertionError(f"{len(missing)} of {len(self._sizes)} batches were not appended")
        if self.rank != 0:
            raise ShareDone
        self._wait_for(len(self._sizes))
        counts: list[int] = []
        failures: list[dict[str, Any]] = []
        with replacing(self.folder / RECORDS) as records:
            for number in range(len(self._sizes)):
                entry = self._entry(number)
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
        for path in journals(self.folder):
            path.unlink()

    def _share(self) -> range:
        """The numbers of this rank's batches."""
        return range(self.rank, len(self._sizes), self.ranks)

    def _wait_for(self, n: int) -> None:
        """Returns when the first `n` batches are on the disk: those of other ranks are theirs to write."""
        while any(number not in self._written for number in range(n)):
            time.sleep(POLL)
            self._tell_new()

    def _recover(self) -> None:
        """Reads what all ranks left on disk. Cuts a torn tail off this rank's file; starts it anew for another plan."""
        self._written, self._read, self._attempts, self.tokens = {}, {}, {}, 0
        self._look()
        if self.path in self._read:
            os.truncate(self.path, self._read[self.path])
        else:
            with replacing(self.path) as file:
                file.write(_head(self._plan, self._attempts))

    def _tell_new(self) -> None:
        """Looks, and tells the progress of every batch that is new."""
        for number, tokens in self._look():
            if self._progress:
                self._progress.advance(items=self._sizes[number], tokens=tokens)

    def _look(self) -> list[tuple[int, int]]:
        """Takes note of the whole lines of this plan that are new on the disk: the batch and the tokens of each."""
        new = []
        for path in journals(self.folder):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    entry, start = _parse(line), self._read.get(path, 0)
                    if entry is None or (start == 0 and entry.get("plan") != self._plan):
                        break
                    self._read[path] = start + len(line)
                    if start == 0:
                        self._attempts |= entry["attempts"]
                    elif entry["batch"] not in self._written:
                        self._written[entry["batch"]] = path, start
                        self.tokens += entry["tokens"]
                        new.append((entry["batch"], entry["tokens"]))
        return new

    def _entry(self, number: int) -> dict[str, Any]:
        """What was appended for a batch."""
        path, offset = self._written[number]
        with path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())  # type: ignore[no-any-return]


def journals(folder: Path) -> list[Path]:
    """The files of all ranks of an unfinished stage."""
    return sorted(folder.glob(f"{Path(JOURNAL).stem}*.jsonl"))


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
    for path in journals(folder):  # of a run that ended between DONE and `discard`: the failures are in there still
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
