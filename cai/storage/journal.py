"""The journal of a feedback stage: its rows on disk, a portion at a time, so that a killed stage continues.

The plan is a list of items with unique ids, cut beforehand into portions that a stage computes in one go: of the size
that its config states, or else as equal as can be and as large as the profile lets a process hold in flight and as
about a minute computes (`cai.engines.portion_size`). Each
finished portion is one line, written with one call and flushed to the disk. The next start discards a torn last line
and computes its whole portion again: an engine gets the same requests together in an interrupted run as in an
undisturbed one. `finish` writes the rows in the plan's order to `records.jsonl` and the failures to `failures.jsonl`.

Several processes share a plan through the folder alone. Rank r of n computes the portions whose number is r modulo n,
as far as no file holds their items, and writes them to a file of its own. Items in any rank's file count, so that a
later run, with any number of ranks, computes the missing ones and nothing else. Stages need not know about ranks: when
a stage finishes its journal, rank 0 waits for the other ranks' items and continues alone, and the others end with
`ShareDone`.

Left out: moving portions between ranks. A rank that has finished its share does not help slower ones. A portion is
written whole although an engine answers item by item: half a portion on disk would leave the other half to be computed
in other company, and rounding would differ from that of an undisturbed run.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
"""The number of items and the positions of those without a row, to reopen a finished stage."""
KNOWN_PER_LINE = 256
"""Results that need not be computed, on one line of the journal."""
POLL_SECONDS = 0.1
"""Time between two reads of the other ranks' files."""


class ShareDone(Exception):
    """Ends the stage on every rank but 0: its items are on the disk, and rank 0 does the rest of the stage."""


@dataclass(frozen=True)
class Portion:
    """Items that are computed and written together.

    `number` counts the portions of all ranks. `attempt` counts how often `cai run --retry-failures` has asked for these
    items again; `FeedbackConfig.attempts` follows from it.
    """

    number: int
    items: list[Any]
    positions: list[int]
    """Places of the items in the plan, from 0."""
    attempt: int = 0


class Result(NamedTuple):
    """What became of an item: its row, or what failed, or both where a part of it failed."""

    row: Mapping[str, Any] | None = None
    failures: Sequence[Failure] = ()


class Finished(NamedTuple):
    """The rows and failures that `finish` has written."""

    n_rows: int
    failures: list[Failure]


class Count(NamedTuple):
    """Items of an unfinished stage that are on disk."""

    n_finished: int
    n_items: int
    unit: str
    n_known: int = 0
    """Those of the finished items that were known beforehand and not computed."""

    def __str__(self) -> str:
        return f"{self.n_finished:,} of {self.n_items:,} {self.unit} are on disk"


class Journal:
    """The items of one stage on disk in `folder`; this process is rank `rank` of `ranks`.

    `in_flight` is the number of items that a portion may have where the stage states none; None = all of the rank's.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, rank: int = 0, ranks: int = 1,
        in_flight: int | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.path = folder / (JOURNAL if rank == 0 else f"journal-{rank}.jsonl")
        """This rank's file, which exists from the first portion until the stage is done."""
        self.rank, self.ranks, self.in_flight = rank, ranks, in_flight
        self.tokens = 0
        """Tokens of all finished items, including those of other ranks and earlier processes."""
        self._progress = progress
        self._plan: str | None = None
        """Hash of the items' ids."""
        self._n_items = 0
        self._unit = ""
        self._share: dict[int, list[int]] = {}
        """The positions of the items in each of this rank's portions."""
        self._lines: dict[int, tuple[Path, int]] = {}
        """The file and the offset of the line with each finished item, by the item's position."""
        self._ends: dict[Path, int] = {}
        """Offset up to which each file has been read: the end of its last whole line of this plan."""
        self._attempts: dict[str, int] = {}
        """How often an item has been reopened, by its position."""
        self._n_in_portion = 0
        """Items of the portion that is being computed."""
        self._n_answered = 0.0
        self._tokens_answered = 0
        """What has been shown as progress of that portion."""

    def portions(
        self, items: Sequence[Mapping[str, Any]], size: int | None = None, unit: str = "items",
        known: Mapping[str, Result] | None = None, limit: int | None = None,
    ) -> Iterator[Portion]:  # fmt: skip
        """This rank's portions of `items`, without what is on disk; each must be appended before the next is taken.

        With a `size`, a portion has so many items, on any number of ranks; without, its size follows from `in_flight`,
        `ranks` and the `limit` that the stage sets by the work that an item takes. `known` are results, by the item's
        id, that need not be computed: they are written at once and are in no portion. Raises StageFailed where two
        items have the same id.
        """
        ids = [item["id"] for item in items]
        if repeated := [item_id for item_id, count in Counter(ids).items() if count > 1]:
            raise StageFailed(f"{len(repeated)} items of this stage share an id with another, first {repeated[0]!r}")
        self._plan, self._n_items, self._unit = stable_id(ids), len(ids), unit
        known_positions = [position for position, id in enumerate(ids) if known and id in known]
        to_compute = [position for position, id in enumerate(ids) if not known or id not in known]
        if size is None:
            largest = min(self.in_flight or len(ids), limit or len(ids))
            cuts = cut_into_portions(len(to_compute), largest, self.ranks)
        else:
            cuts = [range(start, min(start + size, len(to_compute))) for start in range(0, len(to_compute), size)]
        self._share = {
            number: [to_compute[index] for index in cuts[number]] for number in range(self.rank, len(cuts), self.ranks)
        }
        self._recover()
        if known and self.rank == 0:
            self._write_known({position: known[ids[position]] for position in known_positions})
        if self._progress:
            self._progress.start(total=len(ids), unit=unit, finished=len(self._lines))
        for number, attempt, positions in self._missing():
            self._n_in_portion = len(positions)
            yield Portion(number, [items[position] for position in positions], positions, attempt)
            if not all(position in self._lines for position in positions):
                raise AssertionError(f"portion {number} was not appended")

    def report_answer(self, share: float = 1.0) -> None:
        """Shows an answer about an item as progress, before `append` writes its portion.

        `share` is how much of an item's work it was: 1/6 where the item takes six answers.
        """
        share = min(share, self._n_in_portion - self._n_answered)  # an answer that came to nothing is asked for again
        self._n_answered += share
        if self._progress:
            self._progress.advance(items=share)

    def report_tokens(self, n_tokens: int, most: float = math.inf) -> None:
        """Shows tokens that were sampled for the portion that is being computed; an item takes at most `most`."""
        self._tokens_answered += n_tokens
        if self._progress:
            self._progress.advance(items=0, tokens=n_tokens, begun=n_tokens / most)

    def append(self, portion: Portion, results: Sequence[Result]) -> None:
        """Writes a finished portion: the result of each of its items, in their order."""
        if len(results) != len(portion.items):
            raise AssertionError(f"{len(results)} results for {len(portion.items)} items")
        self._write(portion.positions, results)
        self._read_and_report()

    def finish(self) -> Finished:
        """Waits for the other ranks, then writes `records.jsonl` and `failures.jsonl` in the plan's order.

        Every portion of this rank must have been appended. Raises ShareDone on every rank but 0.
        """
        if self._plan is None or self._missing():
            raise AssertionError(f"{len(self._missing())} portions were not appended")
        if self.rank != 0:
            raise ShareDone
        while len(self._lines) < self._n_items:  # other ranks write theirs
            time.sleep(POLL_SECONDS)
            self._read_and_report()
        without_row: list[int] = []
        failures: list[dict[str, Any]] = []
        read_line = functools.lru_cache(maxsize=4)(_read_line)  # neighbouring items are mostly on the same line
        with replacing(self.folder / RECORDS) as records:
            for position in range(self._n_items):
                row, item_failures = read_line(*self._lines[position])[position]
                if row is None:
                    without_row.append(position)
                else:
                    records.writelines(line.encode() for line in row_lines([row]))
                failures += [{**failure, "item": position} for failure in item_failures]
        with replacing(self.folder / FAILURES) as file:
            file.writelines(line.encode() for line in row_lines(failures))
        plan = {
            "plan": self._plan, "n_items": self._n_items, "unit": self._unit, "without_row": without_row,
            "tokens": self.tokens, "attempts": self._attempts,
        }  # fmt: skip
        with replacing(self.folder / PLAN) as file:
            file.write(canonical_json(plan).encode())
        n_rows = self._n_items - len(without_row)
        return Finished(n_rows, [Failure.from_json(failure) for failure in failures])

    def discard(self) -> None:
        """Removes the files of all ranks, once the stage is marked as done."""
        for path in journal_paths(self.folder):
            path.unlink()

    def _write(self, positions: Sequence[int], results: Sequence[Result], *, known: bool = False) -> None:
        """Appends one line to this rank's file, and flushes it to the disk."""
        line = _line(positions, results, known=known)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _write_known(self, results: Mapping[int, Result]) -> None:
        """Writes results that are known beforehand, by position, as far as they are not on disk. Tells the user."""
        positions = [position for position in results if position not in self._lines]
        if self._progress and results:
            self._progress.note(f"{len(results):,} of {self._n_items:,} {self._unit} are unchanged and taken over")
        for start in range(0, len(positions), KNOWN_PER_LINE):
            chunk = positions[start : start + KNOWN_PER_LINE]
            self._write(chunk, [results[position] for position in chunk], known=True)
        self._read_new_lines()

    def _missing(self) -> list[tuple[int, int, list[int]]]:
        """What this rank has to compute: a portion's number, and its items with as many attempts by their positions."""
        missing = []
        for number, cut in self._share.items():
            positions_by_attempt = defaultdict(list)
            for position in cut:
                if position not in self._lines:
                    positions_by_attempt[self._attempts.get(str(position), 0)].append(position)
            missing += [(number, attempt, positions_by_attempt[attempt]) for attempt in sorted(positions_by_attempt)]
        return missing

    def _recover(self) -> None:
        """Reads the files of all ranks. Cuts a torn tail off this rank's file, or begins it for a new plan."""
        self._lines, self._ends, self._attempts, self.tokens = {}, {}, {}, 0
        self._read_new_lines()
        if self.path in self._ends:
            os.truncate(self.path, self._ends[self.path])
        else:
            with replacing(self.path) as file:
                file.write(_head(self._plan, self._n_items, self._unit, self._attempts))

    def _read_and_report(self) -> None:
        """Reads new lines of all ranks and reports them as progress, as far as their answers have not been.

        Rows may have fewer tokens than were sampled for them, as after a critique.
        """
        n_items, tokens = self._read_new_lines()
        if self._progress and n_items:
            n_tokens = max(0, tokens - self._tokens_answered)
            self._progress.advance(items=n_items - self._n_answered, tokens=n_tokens)
            self._n_answered, self._tokens_answered = 0.0, 0

    def _read_new_lines(self) -> tuple[int, int]:
        """Reads the whole lines of this plan that are new on disk; the number of their items and tokens."""
        n_items = tokens = 0
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
                    elif self._lines.keys().isdisjoint(entry["positions"]):
                        self._lines |= dict.fromkeys(entry["positions"], (path, start))
                        n_items += len(entry["positions"])
                        tokens += _count_tokens(entry["rows"])
        self.tokens += tokens
        return n_items, tokens


def cut_into_portions(n_items: int, largest: int, ranks: int) -> list[range]:
    """Portions of at most `largest` neighbouring items, as equal as can be, the same number for each rank.

    With fewer items than ranks, a portion for each item.
    """
    if not n_items:
        return []
    n_portions = min(ranks * math.ceil(n_items / (ranks * largest)), n_items)
    return [range(k * n_items // n_portions, (k + 1) * n_items // n_portions) for k in range(n_portions)]


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """The fields of each `Failure` of a finished stage, and its "item"; empty for a stage without a journal."""
    path = folder / FAILURES
    return read_rows(path) if path.exists() else []


def failures_digest(folder: Path, *, with_reasons: bool) -> str:
    """Which items of a finished stage failed, and why where that is read: another reason alone retrains no model."""
    failures = read_failures(folder)
    return stable_id(sorted((failure["id"], failure["reason"] if with_reasons else "") for failure in failures))


def journal_paths(folder: Path) -> list[Path]:
    """The journal files of all ranks of an unfinished stage."""
    return sorted(folder.glob(f"{Path(JOURNAL).stem}*.jsonl"))


def count_items(folder: Path) -> Count | None:
    """The items of an unfinished stage that are on disk; None without a journal that this version can continue."""
    count = None
    for path in journal_paths(folder):
        with path.open("rb") as lines:
            head = _parse(next(lines, b""))
            if head is None or "n_items" not in head:
                continue
            entries = [entry for line in lines if (entry := _parse(line))]
            n_finished = sum(len(entry["positions"]) for entry in entries) + (count.n_finished if count else 0)
            n_known = sum(len(entry["positions"]) for entry in entries if entry.get("known"))
            count = Count(n_finished, head["n_items"], head["unit"], n_known + (count.n_known if count else 0))
    return count


def is_of_earlier_version(folder: Path) -> bool:
    """Whether a stage left a plan or journals in a form that this version cannot continue."""
    plan = read_json(folder / PLAN)
    if plan is not None and "n_items" not in plan:
        return True
    for path in journal_paths(folder):
        with path.open("rb") as lines:
            head = _parse(next(lines, b""))
        if head is not None and "n_items" not in head:
            return True
    return False


def reopen(folder: Path) -> int:
    """Turns a finished stage's records back into a journal without the items that failed, wholly or in part.

    Returns the number of these items; 0 for a stage that had no journal. The records stay unchanged until the stage is
    finished again.
    """
    if (plan := read_json(folder / PLAN)) is None:
        return 0
    failed = {failure["item"] for failure in read_failures(folder)}
    if not failed:
        return 0
    attempts = {str(position): plan["attempts"].get(str(position), 0) + 1 for position in sorted(failed)}
    without_row = set(plan["without_row"])
    for path in journal_paths(folder):  # a run that ended between DONE and `discard` leaves files with the failures
        path.unlink()
    with replacing(folder / JOURNAL) as file, (folder / RECORDS).open(encoding="utf-8") as records:
        file.write(_head(plan["plan"], plan["n_items"], plan["unit"], plan["attempts"] | attempts))
        for position in range(plan["n_items"]):
            row = None if position in without_row else json.loads(records.readline())
            if position not in failed:
                file.write(_line([position], [Result(row)]))
    return len(failed)


def _head(plan: str | None, n_items: int, unit: str, attempts: dict[str, int]) -> bytes:
    head = {"plan": plan, "n_items": n_items, "unit": unit, "attempts": attempts}
    return canonical_json(head).encode() + b"\n"


def _line(positions: Sequence[int], results: Sequence[Result], *, known: bool = False) -> bytes:
    """The line with the results of the items at these positions, which were `known` beforehand or computed."""
    failures = [[asdict(failure) for failure in result.failures] for result in results]
    entry: dict[str, Any] = {
        "positions": positions, "rows": [result.row for result in results], "failures": failures
    }  # fmt: skip
    if known:
        entry["known"] = True
    return canonical_json(entry).encode() + b"\n"


def _read_line(path: Path, offset: int) -> dict[int, tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
    """The row and the failures of each item on the line at this offset, by the item's position."""
    with path.open("rb") as file:
        file.seek(offset)
        entry = json.loads(file.readline())
    return dict(zip(entry["positions"], zip(entry["rows"], entry["failures"], strict=True), strict=True))


def _count_tokens(rows: Sequence[Mapping[str, Any] | None]) -> int:
    """The tokens of the rows that count theirs, for the display."""
    return sum(row.get("n_tokens", 0) for row in rows if row is not None)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line; None for a torn line."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
