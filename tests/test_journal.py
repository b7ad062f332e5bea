"""A journal that is cut anywhere and continued ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.engines import Failure
from cai.errors import StageFailed
from cai.journal import FAILURES, JOURNAL, RECORDS, Journal, reopen
from cai.records import read_rows

ITEMS = [{"id": f"item-{n}"} for n in range(7)]


def run(folder: Path, items=ITEMS, failing=("item-3",), size=2, stop_after=None) -> list[int]:
    """A stage: two rows for even items, none for odd ones, failures as asked. Returns the batches computed."""
    journal = Journal(folder)
    computed = []
    for batch in journal.batches(items, size=size):
        if len(computed) == stop_after:
            return computed
        computed.append(batch.number)
        ok = [item for item in batch.items if item["id"] not in failing]
        rows = [
            {"id": f"{item['id']}/{k}", "text": "naïve “quote”\n", "attempt": batch.attempt}
            for item in ok
            if int(item["id"][-1]) % 2 == 0
            for k in range(2)
        ]
        journal.append(batch, rows, [Failure(i["id"], "no") for i in batch.items if i["id"] in failing])
    journal.finish()
    return computed


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (RECORDS, FAILURES)}


def test_cut_at_any_byte_and_continued_ends_with_the_same_bytes(tmp_path):
    run(tmp_path)
    whole, journal = outputs(tmp_path), (tmp_path / JOURNAL).read_bytes()
    assert whole[RECORDS].count(b"\n") == 8
    for cut in range(len(journal)):
        (tmp_path / RECORDS).unlink()
        (tmp_path / JOURNAL).write_bytes(journal[:cut])
        run(tmp_path)
        assert outputs(tmp_path) == whole, f"cut at byte {cut}"


def test_rubbish_after_a_crash_of_the_machine_is_discarded(tmp_path):
    run(tmp_path)
    whole = outputs(tmp_path)
    journal = (tmp_path / JOURNAL).read_bytes()
    first_two = b"".join(journal.splitlines(keepends=True)[:2])
    (tmp_path / JOURNAL).write_bytes(first_two + b"\0" * 50 + b"\n")
    assert run(tmp_path) == [1, 2, 3]
    assert outputs(tmp_path) == whole


def test_only_missing_batches_are_computed(tmp_path):
    assert run(tmp_path, stop_after=2) == [0, 1]
    assert run(tmp_path) == [2, 3]
    assert run(tmp_path) == []


def test_a_journal_of_another_plan_is_discarded(tmp_path):
    run(tmp_path, stop_after=2)
    assert run(tmp_path, items=ITEMS[:6]) == [0, 1, 2]
    assert run(tmp_path, items=ITEMS[:6], size=3) == [0, 1]


def test_items_with_the_same_id_are_refused(tmp_path):
    with pytest.raises(StageFailed, match="item-0"):
        run(tmp_path, items=[*ITEMS, ITEMS[0]])


def test_a_batch_that_is_not_appended_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="batch 0"):
        list(Journal(tmp_path).batches(ITEMS, size=2))


def test_reopening_computes_only_batches_with_failures_with_a_new_attempt(tmp_path):
    run(tmp_path)
    Journal(tmp_path).discard()
    assert reopen(tmp_path) == 1
    assert run(tmp_path, failing=()) == [1]
    rows = read_rows(tmp_path / RECORDS)
    assert [row["id"] for row in rows] == [f"item-{n}/{k}" for n in (0, 2, 4, 6) for k in range(2)]
    assert {row["id"]: row["attempt"] for row in rows}["item-2/0"] == 1
    assert read_rows(tmp_path / FAILURES) == []
    assert reopen(tmp_path) == 0


def test_tokens_of_earlier_processes_are_counted(tmp_path):
    for stop in (1, None):
        journal = Journal(tmp_path)
        for n, batch in enumerate(journal.batches(ITEMS, size=2)):
            if n == stop:
                break
            journal.append(batch, [{"id": item["id"], "n_tokens": 5} for item in batch.items], [])
    assert journal.tokens == 35


def test_rows_of_earlier_batches_can_be_read_while_later_ones_are_computed(tmp_path):
    run(tmp_path, stop_after=1)
    journal = Journal(tmp_path)
    seen = []
    for batch in journal.batches(ITEMS, size=2):
        seen.append([row["id"] for row in journal.rows()])
        journal.append(batch, [{"id": item["id"]} for item in batch.items], [])
    assert seen[0] == ["item-0/0", "item-0/1"]
    assert seen[1] == [*seen[0], "item-2", "item-3"]


def test_no_items_give_empty_records(tmp_path):
    assert run(tmp_path, items=[]) == []
    assert outputs(tmp_path) == {RECORDS: b"", FAILURES: b""}
