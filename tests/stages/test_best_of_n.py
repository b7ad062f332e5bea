"""Best-of-n: the response with the best weighted reward is kept, and whatever cannot be scored is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from feedback_stages import Script, run_stage, sample
from training_stages import Steps

from cai.contracts.engine import Question
from cai.contracts.model import Model
from cai.stages.best_of_n import kl_bound
from cai.text.errors import StageFailed

FUNCTIONS = """
def length(prompts, responses):
    return [None if "odd" in text else len(text) for text in responses]
def polite(prompts, responses):
    return [float("please" in text) for text in responses]
"""
ROWS = [
    sample("How?", "short", number=0), sample("How?", "a longer one", number=1), sample("How?", "odd one", number=2),
    sample("Why?", "so please", number=0), sample("Why?", "because of that", number=1),
    sample("Who?", "odd", number=0), sample("Who?", "odd too", number=1),
    {**sample("What?", "this was cut", number=0), "finish_reason": "length"}, sample("What?", "\u200b", number=1),
]  # fmt: skip
REWARDS = [{"function": "mine.py:length"}, {"function": "mine.py:polite", "weight": 100.0}]


def chosen(folder: Path, rows: list[dict[str, Any]] = ROWS, **config: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(FUNCTIONS)
    return run_stage("best-of-n", folder, {"samples": rows}, **{"rewards": REWARDS, **config})


def test_the_response_with_the_highest_weighted_reward_stays_with_its_scores(tmp_path: Path) -> None:
    result = chosen(tmp_path)
    assert [row["response"] for row in result.rows] == ["a longer one", "so please"]
    first, second = result.rows
    assert first["rewards"] == {"length": 12.0, "polite": 0.0}
    assert (first["reward"], first["mean_reward"], first["of"]) == (12.0, 8.5, 2)
    assert (second["reward"], second["of"]) == (109.0, 2)
    assert {key: first[key] for key in ROWS[1]} == ROWS[1]


def test_responses_that_cannot_be_chosen_are_counted_by_reason(tmp_path: Path) -> None:
    result = chosen(tmp_path)
    figures = result.figures["best_of_n"]["best-of-n"]
    assert figures["left_out"] == {"cut_off": 1, "empty": 1}
    assert (figures["prompts"], figures["chosen"], figures["failed_prompts"], figures["failed"]) == (3, 2, 1, 2)
    assert figures["best_reward"] == pytest.approx((12 + 109) / 2)
    assert figures["mean_reward"] == pytest.approx((8.5 + (109 + 15) / 2) / 2)
    assert figures["kl_bound"] == pytest.approx(math.log(2) - 0.5)
    reasons = {failure["reason"] for failure in result.failures}
    assert any("no response has a reward; first: " in reason for reason in reasons)
    assert any("length: it returned NoneType" in reason for reason in reasons)
    with pytest.raises(StageFailed, match="1 are cut off and 1 empty"):
        chosen(tmp_path / "none", ROWS[-2:])


def test_progress_advances_with_each_rating(tmp_path: Path) -> None:
    progress, counts = Steps(), []

    def rates(_: Question) -> list[float]:
        counts.append(progress.n_finished)
        return [0.14] * 7

    judge = {"rewards": [{"judge": "me"}], "script": Script(rates=rates), "progress": progress}
    result = chosen(tmp_path, ROWS[:5], **judge, named={"me": Model("me", "nowhere")})
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts) > 5
    assert progress.n_finished == pytest.approx(progress.total)
    assert progress.total == len(result.rows) == 2


def test_batches_change_nothing(tmp_path: Path) -> None:
    assert chosen(tmp_path / "whole").bytes == chosen(tmp_path / "cut", journal_batch=1).bytes


def test_a_judge_chooses_by_its_ratings_and_prompts_without_a_principle_are_left_out(tmp_path: Path) -> None:
    def rates(question: Question) -> list[float]:
        best = 6 if "splendid" in question.messages[-1]["content"] else 0
        return [0.94 if n == best else 0.01 for n in range(7)]

    rows = [*ROWS[:2], sample("Harm?", "no", "red_team"), sample("Harm?", "a splendid no", "red_team")]
    result = chosen(
        tmp_path, rows, rewards=[{"judge": "me", "principles": ["safe"]}], script=Script(rates=rates),
        named={"me": Model("scripted", "nowhere")},
    )  # fmt: skip
    assert [row["response"] for row in result.rows] == ["a splendid no"]
    assert result.figures["best_of_n"]["best-of-n"]["without_principle"] == 1


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_is_reached_where_no_two_responses_are_equal(n: int) -> None:
    """The best of n uniform numbers has the density n x^(n-1) against 1: its divergence by quadrature."""
    x = [(k + 0.5) / 100_000 for k in range(100_000)]
    density = [n * value ** (n - 1) for value in x]
    assert sum(p * math.log(p) for p in density if p > 0) / len(x) == pytest.approx(kl_bound(n), abs=1e-3)
