"""What principles do to a run's labels: against a second writing of the figures, and what must make no difference."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cai.cli import main
from cai.feedback.explain import DECIDED, diff, diff_lines, evidence, explain, explain_lines
from cai.storage import run_folder
from cai.storage.journal import RECORDS
from cai.storage.rows import row_lines
from cai.text.errors import BadInput

WEIGHTS = {"calm": 2.0, "safe": 1.0, "short": 0.5}


def vote(number: int, odds: dict[str, tuple[float, float]], a="left", b="right") -> dict:
    """A row of a judge: log-odds that `a` is better by principle, with `a` and with `b` shown first."""
    return {
        "id": f"pair-{number}", "prompt_id": f"prompt-{number}", "tags": [],
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "a": {"id": f"a{number}", "text": f"{a} {number}", "model": "m"},
        "b": {"id": f"b{number}", "text": f"{b} {number}", "model": "m"},
        "votes": [
            {"principle": id, "order": order, "log_odds": both[i], "option_probability": 1.0}
            for i, order in enumerate(("ab", "ba")) for id, both in odds.items()
        ],
        "judge": "judge", "constitution": "trial",
    }  # fmt: skip


def swapped(row: dict) -> dict:
    votes = [{**each, "order": each["order"][::-1], "log_odds": -each["log_odds"]} for each in row["votes"]]
    return {**row, "a": row["b"], "b": row["a"], "votes": votes}


def random_rows(n=60, seed=0) -> list[dict]:
    """Pairs of different lengths on which not every principle votes."""
    rng = random.Random(seed)
    return [
        vote(
            i,
            {id: (rng.gauss(0.4, 1.5), rng.gauss(-0.2, 1.5)) for id in WEIGHTS if rng.random() < 0.8 or id == "calm"},
            a="word " * rng.randrange(1, 9), b="word " * rng.randrange(9, 15),
        )
        for i in range(n)
    ]  # fmt: skip


def run_of(folder: Path, rows: list[dict], weights=WEIGHTS, stage="preferences", **config) -> str:
    """A run on disk whose `prefer` stage is done; its name."""
    name = folder.name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"temperature": "sum_of_weights", "abstain_below": 0.0, "min_confidence": 0.5, **config}
    (folder / "votes-1").mkdir(exist_ok=True)
    (folder / "votes-1" / RECORDS).write_text("".join(row_lines(rows)))
    done = folder / f"{stage}-1"
    done.mkdir()
    facts = {
        "kind": "prefer", "config": config, "inputs": {"votes": {"folder": "votes-1"}},
        "parts": {f"weight.{id}": weight for id, weight in weights.items()},
    }  # fmt: skip
    (done / run_folder.STAGE).write_text(json.dumps(facts))
    run_folder.mark_done(done, "digest")
    (folder / run_folder.RUN).write_text("{}")
    run_folder.set_latest(folder, stage, done)
    return name


def explained(folder: Path, rows: list[dict], **kwargs):
    return explain(evidence(run_of(folder, rows, **kwargs), folder.parent))


def label(row: dict, weights: dict[str, float]) -> float:
    """The log-odds of one pair, in plain loops; 0 where nobody voted."""
    odds = {id: sum(v["log_odds"] for v in row["votes"] if v["principle"] == id) / 2 for id in weights}
    voted = {v["principle"] for v in row["votes"]}
    total = sum(weights[id] for id in voted)
    return sum(weights[id] * odds[id] for id in voted) / total if total else 0.0


def test_without_a_principle_labels_are_those_of_weight_zero(tmp_path: Path) -> None:
    rows = random_rows()
    found = explained(tmp_path / "run", rows)
    for id in WEIGHTS:
        rest = {**WEIGHTS, id: 0.0}
        both = [(label(row, WEIGHTS), label(row, rest)) for row in rows]
        assert found["without"][id]["turned"] == sum(x * y < 0 for x, y in both)
        assert found["without"][id]["lost"] == sum(x != 0 and y == 0 for x, y in both)
    assert found["without"]["calm"]["lost"] > 0, "no pair has this vote alone: the test shows nothing"
    assert found["without"]["calm"]["turned"] > 5


def test_figures_of_one_principle_are_what_plain_loops_count(tmp_path: Path) -> None:
    rows = random_rows()
    found = explained(tmp_path / "run", rows)["principles"]["short"]
    votes = [(row, {v["order"]: v["log_odds"] for v in row["votes"] if v["principle"] == "short"}) for row in rows]
    votes = [(row, odds) for row, odds in votes if odds]
    mean = [(row, (odds["ab"] + odds["ba"]) / 2) for row, odds in votes]
    decided = [(row, x) for row, x in mean if abs(x) >= DECIDED]
    assert found["pairs"] == len(votes)
    assert found["decided"]["value"] == pytest.approx(len(decided) / len(votes))
    assert found["position_bias"] == pytest.approx(sum(o["ab"] - o["ba"] for _, o in votes) / 2 / len(votes))
    assert found["agreement"]["value"] == pytest.approx(np.mean([label(row, WEIGHTS) * x > 0 for row, x in decided]))
    longer = [(len(row["a"]["text"].split()) - len(row["b"]["text"].split())) * x > 0 for row, x in decided]
    assert found["prefers_longer"]["value"] == pytest.approx(np.mean(longer))


def test_preference_for_own_texts_counts_pairs_with_another_writer_alone(tmp_path: Path) -> None:
    rows = [vote(i, {"calm": (odds, odds)}) for i, odds in enumerate([2.0, 1.0, -1.0, -3.0, 0.0, 1.0])]
    for row, side in zip(rows, ["a", "a", "a", "b", "a", None], strict=True):
        if side:
            row[side]["model"] = "judge"
    found = explained(tmp_path / "run", rows)["prefers_own"]
    assert (found["n"], found["value"]) == (4, 0.75), "the even pair and the one of strangers count for nothing"
    assert explained(tmp_path / "strangers", random_rows())["prefers_own"] is None


def test_calling_a_what_was_b_and_the_order_of_rows_change_nothing(tmp_path: Path) -> None:
    rows = random_rows()
    one = explained(tmp_path / "one", rows)
    other_way = [swapped(row) if i % 3 else row for i, row in enumerate(rows)][::-1]
    two = explained(tmp_path / "two", other_way)
    for found in (one, two):
        found.pop("name")
        for without in found["without"].values():
            without.pop("examples")  # they show a and b as they are
    assert json.dumps(one["without"]) == json.dumps(two["without"])
    for id in WEIGHTS:
        assert one["correlation"][id] == pytest.approx(two["correlation"][id])
        for figure in ("mean_strength", "length_correlation", "position_bias", "flip_rate"):
            assert one["principles"][id][figure] == pytest.approx(two["principles"][id][figure])


def test_principles_that_say_the_same_and_the_contrary_are_named(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = []
    for i in range(40):
        x, y = rng.gauss(0, 2), rng.gauss(0, 2)
        rows.append(vote(i, {"calm": (x, x), "safe": (x + 0.1, x - 0.1), "short": (-x, -x), "other": (y, y)}))
    found = explained(tmp_path / "run", rows, weights={**WEIGHTS, "other": 1.0})
    assert found["redundant"][0]["principles"] == ["calm", "safe"]
    assert [each["principles"] for each in found["conflicting"]] == [["calm", "short"], ["safe", "short"]]
    assert found["correlation"]["calm"]["short"] == pytest.approx(-1)
    text = "\n".join(explain_lines(found))
    assert "calm and safe say nearly the same: +1.00 over 40 pairs" in text
    assert "calm and short contradict each other" in text


def test_a_principle_that_never_took_a_side_has_no_correlation(tmp_path: Path) -> None:
    rows = [vote(i, {"calm": (1.0, 1.0), "short": (0.0, 0.0)}) for i in range(3)]
    found = explained(tmp_path / "run", rows)
    assert found["correlation"]["calm"]["short"] is None
    assert "-" in "\n".join(explain_lines(found))


def test_the_example_shown_is_one_that_turns_and_its_text_cannot_steer_a_terminal(tmp_path: Path) -> None:
    rows = [vote(0, {"calm": (1.0, 1.0), "safe": (-1.5, -1.5)}, a="\x1b[31mred")]
    found = explained(tmp_path / "run", rows)
    (example,) = found["without"]["calm"]["examples"]
    assert example["p_a"] > 0.5 > example["p_a_without"]
    assert "\x1b" not in "\n".join(explain_lines(found))


def test_a_judge_against_itself_never_turns_and_against_its_contrary_always(tmp_path: Path) -> None:
    rows = random_rows()
    contrary = [
        {**row, "votes": [{**each, "log_odds": -each["log_odds"]} for each in row["votes"]]}
        for row in map(swapped, rows)
    ]
    one, same, other = (
        evidence(run_of(tmp_path / name, some), tmp_path)
        for name, some in (("one", rows), ("same", [swapped(row) for row in rows[:40]]), ("other", contrary))
    )
    found = diff(one, same)
    assert found["matched"] == 40
    assert found["turned"]["value"] == 0
    assert not found["examples"]
    assert all(each["correlation"] == pytest.approx(1) for each in found["principles"].values())
    found = diff(one, other)
    assert found["turned"]["value"] == 1
    assert len(found["examples"]) == 3
    assert all(each["correlation"] == pytest.approx(-1) for each in found["principles"].values())
    assert "labels turned: 1.00" in next(iter(diff_lines(found)))


def test_runs_without_a_pair_in_common_are_refused(tmp_path: Path) -> None:
    one, two = (
        evidence(run_of(tmp_path / name, [vote(i, {"calm": (1.0, 1.0)})]), tmp_path)
        for i, name in enumerate(("x", "y"))
    )
    with pytest.raises(BadInput, match="x and y have no pair in common"):
        diff(one, two)


def test_where_several_stages_make_labels_one_must_be_named(tmp_path: Path) -> None:
    run_of(tmp_path / "run", random_rows())
    run_of(tmp_path / "run", random_rows(), stage="other-labels", weights={**WEIGHTS, "calm": 0.0})
    with pytest.raises(BadInput, match="expected run/preferences, run/other-labels"):
        evidence("run", tmp_path)
    with pytest.raises(BadInput, match="did you mean 'other-labels'"):
        evidence("run/other-label", tmp_path)
    assert explain(evidence("run/other-labels", tmp_path))["principles"]["calm"]["share_of_say"] == 0


def test_the_command_prints_json_and_ends_with_2_for_a_run_without_labels(tmp_path: Path) -> None:
    run_of(tmp_path / "run", random_rows())
    done = CliRunner().invoke(main, ["votes", "explain", "run", "--runs", str(tmp_path), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["pairs"] == 60
    done = CliRunner().invoke(main, ["votes", "diff", "run", "run", "--runs", str(tmp_path)])
    assert done.exit_code == 0
    assert "60 pairs in both" in done.stdout
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / run_folder.RUN).write_text("{}")
    done = CliRunner().invoke(main, ["votes", "explain", "empty", "--runs", str(tmp_path)])
    assert done.exit_code == 2
    assert "a run whose `prefer` stage is done" in done.stderr


def test_a_run_is_found_in_a_folder_relative_to_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "runs" / "run", random_rows())
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["votes", "explain", "run"])
    assert (done.exit_code, "60 pairs" in done.stdout) == (0, True)
