"""Lines about stages: when they are printed, what they count, and what a run's log keeps of them."""

from __future__ import annotations

import io
import json
import threading
import warnings
from pathlib import Path

import pytest

from cai.text import progress, run_log
from cai.text.errors import StageFailed
from cai.text.progress import (
    Display,
    FileLine,
    PlainDisplay,
    RichDisplay,
    StageLine,
    part_counter,
    recorded,
    relay,
    warnings_copied_to,
)
from cai.text.run_log import RunLog


class Lines(io.StringIO):
    """A file that is no terminal, which a test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def write(self, text: str) -> int:
        with self.changed:
            self.changed.notify_all()
            return super().write(text)

    def wait_for(self, n_lines: int) -> list[str]:
        """The first lines, once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.getvalue().count("\n") >= n_lines, timeout=60)
        return self.getvalue().splitlines()[:n_lines]


@pytest.fixture
def half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage has worked for 30 seconds, and lines come quickly."""
    monkeypatch.setattr(StageLine, "seconds", 30.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)


@pytest.mark.usefixtures("half_a_minute")
def test_without_a_terminal_a_stage_that_computes_in_one_call_still_prints_lines() -> None:
    file = Lines()
    with PlainDisplay(file) as display:
        line = display.begin_stage("texts")
        file.wait_for(3)  # nothing is counted yet, as while a model is loaded
        line.start(total=12, unit="texts")
        line.advance(3, tokens=60)
        n_before = file.getvalue().count("\n")
        lines = file.wait_for(n_before + 3)
        display.end_stage(line, failures=1)
    assert lines[:3] == ["texts: started", "texts: 30.0 s so far", "texts: 30.0 s so far"]
    assert lines[-1] == "texts: 3 of 12 texts (25 %), 2 tokens/s, 30.0 s so far, 1 min 30 s left"
    assert "texts: 3 texts, 30.0 s, 2 tokens/s, 1 failed" in file.getvalue().splitlines()


@pytest.mark.usefixtures("half_a_minute")
def test_a_stage_that_is_over_prints_no_more_lines() -> None:
    file = Lines()
    with PlainDisplay(file) as display:
        display.end_stage(display.begin_stage("first"), 0)
        display.begin_stage("second")  # and fails
        file.wait_for(8)
    names = [text.partition(":")[0] for text in file.getvalue().splitlines()]
    assert "first" not in names[names.index("second") + 1 :]


@pytest.mark.usefixtures("half_a_minute")
def test_counts_say_what_is_known_of_shares_and_parts_of_items() -> None:
    line = StageLine("policy")
    line.start(total=8, unit="steps", finished=2)
    assert line.counts == "2 of 8 steps (25 %), 30.0 s so far"
    count = part_counter(line, 4, "responses of rollout 1")
    for _ in range(9):
        count(1 / 3)
    assert line.counts == "2 of 8 steps (25 %), 3 of 4 responses of rollout 1, 30.0 s so far"
    for _ in range(6):
        line.advance(1 / 6, tokens=5)
    assert line.counts == "3 of 8 steps (37 %), 1 tokens/s, 30.0 s so far, 2 min 30 s left"
    line.advance(5)
    assert line.counts == "8 of 8 steps (100 %), 1 tokens/s, 30.0 s so far"


@pytest.mark.usefixtures("half_a_minute")
def test_the_time_left_counts_what_is_begun_of_items_that_are_computed_together() -> None:
    line = StageLine("texts")
    line.start(total=100, unit="texts", finished=20)
    assert line.time_left == ""
    line.advance(0, tokens=400, begun=20)  # all are half done, one is finished early
    line.advance(1)
    assert line.time_left == "1 min 30 s left"
    line.advance(39)
    assert line.time_left == "30.0 s left"


@pytest.mark.parametrize("new_display", [lambda: PlainDisplay(Lines()), RichDisplay])
@pytest.mark.usefixtures("half_a_minute")
def test_the_log_has_the_lines_of_a_run_with_and_without_a_terminal(tmp_path: Path, new_display: object) -> None:
    display: Display = new_display()  # type: ignore[operator]
    path = tmp_path / "run.log"
    written = threading.Event()
    record = display.record
    display.record = lambda text: (record(text), written.set() if "so far" in text else None)  # type: ignore[assignment, func-returns-value]

    def run() -> None:
        with display, recorded(display, path, "recipe.yaml"):
            line = display.begin_stage("texts")
            line.start(total=4, unit="texts")
            line.note("a note\x1b[2J")
            assert written.wait(60)
            warnings.warn("the model is odd", stacklevel=1)
            display.end_stage(line, 0)
            raise StageFailed("the pen broke")

    with pytest.warns(UserWarning, match="odd"), pytest.raises(StageFailed):
        run()
    texts = [text.split(" ", 1)[1] for text in path.read_text().splitlines()]
    assert texts[:2] == ["recipe.yaml", "texts: started"]
    assert "texts: a note\N{REPLACEMENT CHARACTER}[2J" in texts
    assert "texts: 0 of 4 texts (0 %), 30.0 s so far" in texts
    assert texts[-3:] == ["warning: the model is odd", "texts: 0 texts, 30.0 s", "error: the pen broke"]


def test_a_log_keeps_its_newest_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MAX_BYTES", 1000)
    log = RunLog(tmp_path / "run.log")
    for number in range(200):
        log.write(f"line {number}")
        assert log.path.stat().st_size <= 1000
    kept = [int(text.rpartition(" ")[2]) for text in log.path.read_text().splitlines()]
    assert len(kept) > 10
    assert kept == list(range(kept[0], 200))
    RunLog(tmp_path / "no folder" / "run.log").write("a disk that takes no log does not end the run")


def test_another_process_shows_what_a_stage_reports_and_gets_a_line_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REPORT_SECONDS", 1e9)
    notes: list[str] = []
    recorded_texts: list[str] = []
    line = FileLine("texts", tmp_path / "progress.jsonl")
    shown = StageLine("texts", notes.append, recorded_texts.append)
    line.start(total=4, unit="texts")
    for _ in range(1000):
        line.advance(0, tokens=1)
    assert len(line.path.read_text().splitlines()) == 1
    line.report_part(1, 2, "rationales")
    line.advance(2.5)
    line.advance(1.5)
    line.note("a note")
    with pytest.warns(UserWarning, match="odd"), warnings_copied_to(line.record_warning):
        warnings.warn("the model is odd", stacklevel=1)
    for event in line.path.read_text().splitlines():
        relay(json.loads(event), shown)
    assert (notes, recorded_texts) == (["texts: a note"], ["texts: warning: the model is odd"])
    assert (shown.n_finished, shown.total, shown.unit, shown.tokens) == (4, 4, "texts", 1000)
