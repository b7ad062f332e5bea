"""A journal that is cut anywhere and continued, by however many ranks, ends with the same bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cai.storage.journal import FAILURES, JOURNAL, RECORDS, Batch, Journal, ShareDone, journal_paths, reopen
from cai.storage.rows import Failure, read_rows
from cai.text.errors import StageFailed

ITEMS = [{"id": f"item-{n}"} for n in range(7)]


def run(
    folder: Path, items=ITEMS, failing=("item-3",), size: int | None = 2, stop_after=None, rank=0, ranks=1,
    in_flight: int | None = None,
) -> list[int]:  # fmt: skip
    """A stage: two rows for even items, none for odd ones, failures as asked. Returns the batches computed, of each
    portion the first one."""
    journal = Journal(folder, rank=rank, ranks=ranks, in_flight=in_flight)
    computed = []
    for batch in journal.batches(items, size=size):
        if len(computed) == stop_after:
            return computed
        computed.append(batch.number)
        answered = [item for item in batch.items if item["id"] not in failing]
        rows = [
            {"id": f"{item['id']}/{k}", "text": "naïve “quote”\n", "attempt": batch.attempt}
            for item in answered
            if int(item["id"][-1]) % 2 == 0
            for k in range(2)
        ]
        journal.append(batch, rows, [Failure(item["id"], "no") for item in batch.items if item["id"] in failing])
    with contextlib.suppress(ShareDone):
        journal.finish()
    return computed


def run_ranks(folder: Path, ranks: int, **options) -> list[list[int]]:
    """The stage in as many threads, each a rank. Returns the batches that each computed."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: run(folder, rank=rank, ranks=ranks, **options), range(ranks)))


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


def test_no_items_give_empty_records(tmp_path):
    assert run(tmp_path, items=[]) == []
    assert outputs(tmp_path) == {RECORDS: b"", FAILURES: b""}


def test_ranks_share_a_plan_and_rank_0_writes_what_one_alone_would(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    run(tmp_path / "one", size=1)
    assert run_ranks(tmp_path / "three", 3, size=1) == [[0, 3, 6], [1, 4], [2, 5]]
    assert outputs(tmp_path / "three") == outputs(tmp_path / "one")


def test_no_rank_but_0_goes_on_after_its_share(tmp_path):
    journal = Journal(tmp_path, rank=1, ranks=2)
    for batch in journal.batches(ITEMS, size=4):
        journal.append(batch, [], [])
    with pytest.raises(ShareDone):
        journal.finish()
    assert not (tmp_path / RECORDS).exists()


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2), (2, 2)])
def test_dead_ranks_leave_their_batches_to_however_many_go_on(tmp_path, before, after):
    (tmp_path / "one").mkdir()
    run(tmp_path / "one", size=1)
    for rank in range(before):
        run(tmp_path, size=1, rank=rank, ranks=before, stop_after=2)
    torn = journal_paths(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes()[:-5])
    lines = [line for path in journal_paths(tmp_path) for line in path.open()]
    kept = {json.loads(line)["batch"] for line in lines if line.endswith("\n") and "batch" in json.loads(line)}
    assert len(kept) == 2 * before - 1
    computed = [number for share in run_ranks(tmp_path, after, size=1) for number in share]
    assert sorted(computed) == sorted(set(range(7)) - kept)
    assert outputs(tmp_path) == outputs(tmp_path / "one")


def test_a_reopened_stage_computes_failures_again_on_all_ranks_despite_files_of_an_earlier_run(tmp_path):
    run_ranks(tmp_path, 2, size=1)
    assert len(journal_paths(tmp_path)) == 2
    assert reopen(tmp_path) == 1
    assert run_ranks(tmp_path, 2, size=1, failing=()) == [[], [3]]
    assert json.loads((tmp_path / "plan.json").read_text())["attempts"] == {"3": 1}
    assert read_rows(tmp_path / FAILURES) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("per_rank", [16, 40, 1000])
def test_without_a_size_no_rank_idles_and_none_holds_more_in_flight_than_it_may(tmp_path, ranks, per_rank):
    items = [{"id": f"{n}"} for n in range(per_rank * ranks)]
    computed: list[int] = []
    shares = []
    for rank in range(ranks):
        journal = Journal(tmp_path, rank=rank, ranks=ranks, in_flight=100)
        share = []
        for batch in journal.batches(items):
            assert 0 < len(batch.items) <= max(100, len(items) // 64)
            share += [int(item["id"]) for item in batch.items]
            journal.append(batch, [], [])
        shares.append(len(share))
        computed += share
    assert sorted(computed) == list(range(len(items)))
    assert max(shares) - min(shares) <= per_rank / 4, "the shares are about equal"


def test_a_portion_is_as_large_as_the_profile_lets_it_be_and_one_batch_where_the_stage_states_a_size(tmp_path):
    items = [{"id": f"item-{n}"} for n in range(200)]

    def sizes(in_flight: int | None, size: int | None = None) -> list[int]:
        folder = tmp_path / f"{in_flight}-{size}"
        folder.mkdir()
        return [len(batch.items) for batch in appended(Journal(folder, in_flight=in_flight), size)]

    def appended(journal: Journal, size: int | None) -> Iterator[Batch]:
        for batch in journal.batches(items, size):
            journal.append(batch, [], [])
            yield batch

    assert sizes(in_flight=None) == sizes(in_flight=1000) == [200]
    assert sizes(in_flight=60) == [48, 51, 51, 50]
    assert sizes(in_flight=60, size=150) == [150, 50]
    assert sizes(in_flight=1) == [3] * 66 + [2]


def test_portions_cut_anywhere_end_with_the_same_bytes_on_as_many_ranks_or_others(tmp_path):
    items = [{"id": f"item-{n}"} for n in range(40)]
    options = {"items": items, "size": None, "in_flight": 8}
    (tmp_path / "whole").mkdir()
    portions = run(tmp_path / "whole", **options)
    assert len(portions) == 5
    for ranks in (1, 2, 3):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        assert run(folder, stop_after=2, **options) == portions[:2]
        journal = (folder / JOURNAL).read_bytes()
        (folder / JOURNAL).write_bytes(journal[:-5])
        again = [number for share in run_ranks(folder, ranks, **options) for number in share]
        if ranks == 1:
            assert again == portions[1:], "the torn portion is computed again as a whole"
        assert not set(again) & set(range(portions[1])), "what is on the disk is not computed again"
        assert outputs(folder)[RECORDS] == outputs(tmp_path / "whole")[RECORDS]


def test_reopening_computes_whole_portions_with_failures(tmp_path):
    items = [{"id": f"item-{n}"} for n in range(40)]
    options = {"items": items, "size": None, "in_flight": 8}
    portions = run(tmp_path, failing=("item-12",), **options)
    n_rows = outputs(tmp_path)[RECORDS].count(b"\n")
    Journal(tmp_path).discard()
    assert reopen(tmp_path) == 1
    assert run(tmp_path, failing=(), **options) == [portions[1]]
    assert outputs(tmp_path)[RECORDS].count(b"\n") == n_rows + 2
    assert reopen(tmp_path) == 0


def test_progress_is_that_of_all_ranks(tmp_path):
    class Counts:
        finished = tokens = 0

        def start(self, total: int, unit: str, finished: int = 0) -> None:
            self.finished = finished

        def advance(self, items: int = 1, tokens: int = 0) -> None:
            self.finished += items
            self.tokens += tokens

    counts = Counts()
    journal = Journal(tmp_path, counts, ranks=2)  # type: ignore[arg-type]
    for n, batch in enumerate(journal.batches(ITEMS, size=2)):
        if n == 0:
            run(tmp_path, rank=1, ranks=2)
        journal.append(batch, [{"id": "row", "n_tokens": 5}], [])
    assert (counts.finished, counts.tokens, journal.tokens) == (7, 10, 10)
