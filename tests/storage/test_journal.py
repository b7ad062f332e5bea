"""A journal that is cut anywhere and continued, by however many ranks, ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cai.storage.journal import (
    FAILURES,
    JOURNAL,
    PLAN,
    RECORDS,
    Journal,
    Portion,
    Result,
    ShareDone,
    count_items,
    journal_paths,
    reopen,
)
from cai.storage.rows import Failure, read_rows
from cai.text.errors import StageFailed

ITEMS = [{"id": f"item-{n}"} for n in range(7)]


def result(item: dict[str, str], failing: Sequence[str], attempt: int) -> Result:
    """A row for even items, which half of a failing one leaves too; none for odd ones; failures as asked."""
    is_even = int(item["id"][-1]) % 2 == 0
    row = {"id": item["id"], "text": "naïve “quote”\n", "attempt": attempt} if is_even else None
    return Result(row, [Failure(f"{item['id']}/part", "no")] if item["id"] in failing else [])


def run(
    folder: Path, items=ITEMS, failing=("item-3",), size: int | None = 2, stop_after=None, rank=0, ranks=1,
    in_flight: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """A stage. Returns the positions of the items in each portion that it computed."""
    journal = Journal(folder, rank=rank, ranks=ranks, in_flight=in_flight)
    computed = []
    for portion in journal.portions(items, size=size):
        if len(computed) == stop_after:
            return computed
        computed.append(portion.positions)
        journal.append(portion, [result(item, failing, portion.attempt) for item in portion.items])
    with contextlib.suppress(ShareDone):
        journal.finish()
    return computed


def run_ranks(folder: Path, ranks: int, **options) -> list[list[list[int]]]:
    """The stage in as many threads, each a rank. Returns what each computed, as `run` does."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: run(folder, rank=rank, ranks=ranks, **options), range(ranks)))


def positions(shares: list[list[list[int]]]) -> list[int]:
    """The positions of all items that the ranks computed."""
    return sorted(position for share in shares for portion in share for position in portion)


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (RECORDS, FAILURES, PLAN)}


def test_cut_at_any_byte_and_continued_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them, and the machine does not lose its power
    run(tmp_path)
    whole, journal = outputs(tmp_path), (tmp_path / JOURNAL).read_bytes()
    assert whole[RECORDS].count(b"\n") == 4
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
    assert run(tmp_path) == [[2, 3], [4, 5], [6]]
    assert outputs(tmp_path) == whole


def test_only_missing_items_are_computed(tmp_path):
    assert run(tmp_path, stop_after=2) == [[0, 1], [2, 3]]
    assert str(count_items(tmp_path)) == "4 of 7 items are on disk"
    assert run(tmp_path) == [[4, 5], [6]]
    assert run(tmp_path) == []


def test_a_journal_of_another_plan_is_discarded(tmp_path):
    run(tmp_path, stop_after=2)
    assert run(tmp_path, items=ITEMS[:6]) == [[0, 1], [2, 3], [4, 5]]


def test_items_with_the_same_id_are_refused(tmp_path):
    with pytest.raises(StageFailed, match="item-0"):
        run(tmp_path, items=[*ITEMS, ITEMS[0]])


def test_a_portion_that_is_not_appended_whole_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="portion 0"):
        list(Journal(tmp_path).portions(ITEMS, size=2))
    journal = Journal(tmp_path)
    with pytest.raises(AssertionError, match="1 results for 2 items"):
        journal.append(next(journal.portions(ITEMS, size=2)), [Result()])


@pytest.mark.parametrize("size", [2, None])
def test_reopening_computes_only_failed_items_with_a_new_attempt_and_keeps_the_other_rows(tmp_path, size):
    run(tmp_path, size=size, failing=("item-3", "item-4"))
    before = read_rows(tmp_path / RECORDS)
    Journal(tmp_path).discard()
    assert reopen(tmp_path) == 2
    assert positions([run(tmp_path, size=size, failing=("item-3",))]) == [3, 4]
    after = read_rows(tmp_path / RECORDS)
    assert [row["id"] for row in after] == ["item-0", "item-2", "item-4", "item-6"]
    assert [row["attempt"] for row in after] == [0, 0, 1, 0], "a row of an item that failed in part is made again"
    assert [row for row in after if row["id"] != "item-4"] == [row for row in before if row["id"] != "item-4"]
    assert reopen(tmp_path) == 1
    assert positions([run(tmp_path, size=size, failing=())]) == [3]
    assert read_rows(tmp_path / RECORDS) == after
    assert json.loads((tmp_path / PLAN).read_text())["attempts"] == {"3": 2, "4": 1}
    assert read_rows(tmp_path / FAILURES) == []
    assert reopen(tmp_path) == 0


def test_tokens_of_earlier_processes_are_counted(tmp_path):
    for stop in (1, None):
        journal = Journal(tmp_path)
        for n, portion in enumerate(journal.portions(ITEMS, size=2)):
            if n == stop:
                break
            journal.append(portion, [Result({"id": item["id"], "n_tokens": 5}) for item in portion.items])
    assert journal.tokens == 35


def test_no_items_give_empty_records(tmp_path):
    assert run(tmp_path, items=[]) == []
    assert run(tmp_path, items=[], size=None) == []
    assert [outputs(tmp_path)[name] for name in (RECORDS, FAILURES)] == [b"", b""]


def test_ranks_share_a_plan_and_rank_0_writes_what_one_alone_would(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    run(tmp_path / "one", size=1)
    assert run_ranks(tmp_path / "three", 3, size=1) == [[[0], [3], [6]], [[1], [4]], [[2], [5]]]
    assert outputs(tmp_path / "three") == outputs(tmp_path / "one")


def test_no_rank_but_0_goes_on_after_its_share(tmp_path):
    journal = Journal(tmp_path, rank=1, ranks=2)
    for portion in journal.portions(ITEMS, size=4):
        journal.append(portion, [Result() for _ in portion.items])
    with pytest.raises(ShareDone):
        journal.finish()
    assert not (tmp_path / RECORDS).exists()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2), (2, 2)])
def test_dead_ranks_leave_their_items_to_however_many_go_on(tmp_path, before, after):
    (tmp_path / "one").mkdir()
    run(tmp_path / "one", size=1)
    for rank in range(before):
        run(tmp_path, size=1, rank=rank, ranks=before, stop_after=2)
    torn = journal_paths(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes()[:-5])
    lines = [line for path in journal_paths(tmp_path) for line in path.open()]
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    kept = {position for entry in entries for position in entry.get("positions", [])}
    assert len(kept) == count_items(tmp_path).n_finished == 2 * before - 1
    assert positions(run_ranks(tmp_path, after, size=1)) == sorted(set(range(7)) - kept)
    assert outputs(tmp_path) == outputs(tmp_path / "one")


def test_a_reopened_stage_computes_failures_again_on_all_ranks_despite_files_of_an_earlier_run(tmp_path):
    run_ranks(tmp_path, 2, size=1)
    assert len(journal_paths(tmp_path)) == 2
    assert reopen(tmp_path) == 1
    assert run_ranks(tmp_path, 2, size=1, failing=()) == [[], [[3]]]
    assert json.loads((tmp_path / "plan.json").read_text())["attempts"] == {"3": 1}
    assert read_rows(tmp_path / FAILURES) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("per_rank", [1, 16, 40, 200])
@pytest.mark.parametrize("in_flight", [7, 100])
def test_without_a_size_no_rank_idles_and_none_holds_more_in_flight_than_it_may(tmp_path, ranks, per_rank, in_flight):
    items = [{"id": f"{n}"} for n in range(per_rank * ranks)]
    shares = []
    for rank in range(ranks):
        journal = Journal(tmp_path, rank=rank, ranks=ranks, in_flight=in_flight)
        share = []
        for portion in journal.portions(items):
            assert 0 < len(portion.items) <= in_flight
            share.append(portion.positions)
            journal.append(portion, [Result() for _ in portion.items])
        shares.append(share)
    assert positions(shares) == list(range(len(items)))
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= per_rank / 4, "the shares are about equal"


def test_a_portion_is_as_large_as_the_profile_lets_it_be_or_as_the_stage_states(tmp_path):
    items = [{"id": f"item-{n}"} for n in range(200)]

    def sizes(in_flight: int | None, size: int | None = None) -> list[int]:
        folder = tmp_path / f"{in_flight}-{size}"
        folder.mkdir()
        return [len(portion) for portion in run(folder, items, size=size, in_flight=in_flight)]

    assert sizes(in_flight=None) == sizes(in_flight=1000) == [200]
    assert sizes(in_flight=60) == [50, 50, 50, 50]
    assert sizes(in_flight=60, size=150) == [150, 50]
    assert sizes(in_flight=1) == [1] * 200


@pytest.mark.parametrize("offset", [0, 40, 69, 200, 700, 1500])
@pytest.mark.parametrize(("ranks", "in_flight"), [(1, 8), (2, 8), (3, 8), (1, 3), (2, 11), (1, None)])
def test_portions_cut_anywhere_end_with_the_same_bytes_whatever_profile_goes_on(tmp_path, offset, ranks, in_flight):
    items, failing = [{"id": f"item-{n}"} for n in range(40)], ("item-2", "item-13", "item-31")
    options = {"items": items, "failing": failing, "size": None}
    (tmp_path / "whole").mkdir()
    portions = run(tmp_path / "whole", in_flight=8, **options)
    assert [len(portion) for portion in portions] == [8] * 5
    run(tmp_path, in_flight=8, stop_after=4, **options)
    journal = (tmp_path / JOURNAL).read_bytes()
    assert len(journal) > 1500
    (tmp_path / JOURNAL).write_bytes(journal[:offset])
    kept = range(8 * max(0, journal[:offset].count(b"\n") - 1))
    shares = run_ranks(tmp_path, ranks, in_flight=in_flight, **options)
    assert positions(shares) == list(range(len(kept), 40)), "what is on the disk is not computed again"
    if (ranks, in_flight) == (1, 8):
        assert shares == [portions[len(kept) // 8 :]], "the torn portion is computed again as a whole"
    assert outputs(tmp_path) == outputs(tmp_path / "whole")


class Counts:
    """Counts what a journal reports as progress."""

    finished = 0.0
    tokens = 0

    def start(self, total: int, unit: str, finished: int = 0) -> None:
        self.finished = finished

    def advance(self, items: float = 1, tokens: int = 0, begun: float = 0.0) -> None:
        self.finished += items
        self.tokens += tokens


def rows_of(portion: Portion) -> list[Result]:
    return [Result({"id": item["id"], "n_tokens": 5}) for item in portion.items]


def test_progress_is_that_of_all_ranks(tmp_path):
    counts = Counts()
    journal = Journal(tmp_path, counts, ranks=2)  # type: ignore[arg-type]
    for n, portion in enumerate(journal.portions(ITEMS, size=2)):
        if n == 0:
            run(tmp_path, rank=1, ranks=2)
        journal.append(portion, rows_of(portion))
    assert (counts.finished, counts.tokens, journal.tokens) == (7, 20, 20)


def test_progress_advances_with_each_answer_and_counts_none_twice(tmp_path):
    counts = Counts()
    journal = Journal(tmp_path, counts)  # type: ignore[arg-type]
    for portion in journal.portions(ITEMS):
        for n_answered in range(1, 6):  # the other two fail
            journal.report_tokens(5)
            journal.report_answer()
            assert (counts.finished, counts.tokens) == (n_answered, 5 * n_answered)
        journal.append(portion, [*rows_of(portion)[:5], Result(), Result()])
    assert (counts.finished, counts.tokens, journal.tokens) == (7, 25, 25)


@pytest.mark.parametrize("ranks", [1, 2])
def test_known_results_are_written_and_in_no_portion(tmp_path, ranks):
    known = {ITEMS[n]["id"]: result(ITEMS[n], (), 0) for n in (0, 4)}

    def rank(number: int) -> list[int]:
        journal = Journal(tmp_path, rank=number, ranks=ranks)
        computed = []
        for portion in journal.portions(ITEMS, 2, known=known):
            computed += portion.positions
            journal.append(portion, [result(item, ["item-3"], portion.attempt) for item in portion.items])
        with contextlib.suppress(ShareDone):
            journal.finish()
        return computed

    with ThreadPoolExecutor(ranks) as pool:
        computed = list(pool.map(rank, range(ranks)))
    assert sorted(position for positions in computed for position in positions) == [1, 2, 3, 5, 6]
    (tmp_path / "undisturbed").mkdir()
    run(tmp_path / "undisturbed")
    for name in (RECORDS, FAILURES):
        assert (tmp_path / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_retried_answers_never_count_for_more_than_their_portion(tmp_path):
    counts = Counts()
    journal = Journal(tmp_path, counts)  # type: ignore[arg-type]
    for portion in journal.portions(ITEMS, size=4):
        before = counts.finished
        for _ in range(100):
            journal.report_answer(1 / 3)
        assert counts.finished == pytest.approx(before + len(portion.items))
        journal.append(portion, rows_of(portion))
    assert counts.finished == pytest.approx(7)


def test_a_limit_makes_portions_smaller_unless_their_size_is_stated(tmp_path):
    def sizes(name: str, **options: int) -> list[int]:
        (tmp_path / name).mkdir()
        journal = Journal(tmp_path / name, in_flight=5)
        n_items = []
        for portion in journal.portions(ITEMS, **options):
            n_items.append(len(portion.items))
            journal.append(portion, rows_of(portion))
        return n_items

    assert sizes("none") == [3, 4]
    assert sizes("lower", limit=3) == [2, 2, 3]
    assert sizes("higher", limit=6) == [3, 4]
    assert sizes("stated", limit=3, size=7) == [7]
