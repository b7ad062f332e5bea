"""What principles do to a run's labels: against a second writing of the figures, and what must make no difference."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from feedback_stages import swapped, vote_row

from cai.cli import main
from cai.feedback.explain import DECIDED, MIN_COMMON_PAIRS, MIN_DECIDED, compare_votes, explain
from cai.feedback.explanation_text import difference_lines, explanation_lines
from cai.feedback.labelled_votes import LabelRule, load_labelled_votes
from cai.storage import run_folder
from cai.storage.journal import RECORDS
from cai.storage.rows import row_lines
from cai.text.errors import BadInput

WEIGHTS = {"calm": 2.0, "safe": 1.0, "short": 0.5}


def random_rows(n=60, seed=0) -> list[dict]:
    """Pairs of different lengths on which not every principle votes."""
    rng = random.Random(seed)
    return [
        vote_row(
            i,
            {id: (rng.gauss(0.4, 1.5), rng.gauss(-0.2, 1.5)) for id in WEIGHTS if rng.random() < 0.8 or id == "calm"},
            a="word " * rng.randrange(1, 9), b="word " * rng.randrange(9, 15),
        )
        for i in range(n)
    ]  # fmt: skip


def run_of(folder: Path, rows: list[dict], weights=WEIGHTS, stage="preferences") -> str:
    """A run on disk whose `prefer` stage is done; its name."""
    name = folder.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "votes-1").mkdir(exist_ok=True)
    (folder / "votes-1" / RECORDS).write_text("".join(row_lines(rows)))
    stage_folder = folder / f"{stage}-1"
    stage_folder.mkdir()
    LabelRule(weights).write(stage_folder)
    facts = {"kind": "prefer", "inputs": {"votes": {"folder": "votes-1"}}}
    (stage_folder / run_folder.STAGE).write_text(json.dumps(facts))
    run_folder.mark_done(stage_folder, run_folder.Outputs("digest", {}))
    (folder / run_folder.RUN).write_text("{}")
    run_folder.set_latest(folder, stage, stage_folder)
    return name


def explained(folder: Path, rows: list[dict], **kwargs):
    return explain(load_labelled_votes(run_of(folder, rows, **kwargs), folder.parent))


def label(row: dict, weights: dict[str, float]) -> float:
    """The log-odds of one pair, in plain loops; 0 without a vote."""
    odds = {id: sum(v["log_odds"] for v in row["votes"] if v["principle"] == id) / 2 for id in weights}
    voted = {v["principle"] for v in row["votes"]}
    total = sum(weights[id] for id in voted)
    return sum(weights[id] * odds[id] for id in voted) / total if total else 0.0


def test_without_a_principle_labels_are_those_of_weight_zero(tmp_path: Path) -> None:
    rows = random_rows()
    explanation = explained(tmp_path / "run", rows)
    for id in WEIGHTS:
        weights_without = {**WEIGHTS, id: 0.0}
        both = [(label(row, WEIGHTS), label(row, weights_without)) for row in rows]
        assert explanation["without"][id]["turned"] == sum(x * y < 0 for x, y in both)
        assert explanation["without"][id]["lost"] == sum(x != 0 and y == 0 for x, y in both)
    assert explanation["without"]["calm"]["lost"] > 0, "no pair has this vote alone: the test shows nothing"
    assert explanation["without"]["calm"]["turned"] > 5


def test_figures_of_one_principle_are_what_plain_loops_count(tmp_path: Path) -> None:
    rows = random_rows()
    influence = explained(tmp_path / "run", rows)["principles"]["short"]
    votes = [(row, {v["order"]: v["log_odds"] for v in row["votes"] if v["principle"] == "short"}) for row in rows]
    votes = [(row, odds) for row, odds in votes if odds]
    mean = [(row, (odds["ab"] + odds["ba"]) / 2) for row, odds in votes]
    decided = [(row, x) for row, x in mean if abs(x) >= DECIDED]
    assert influence["pairs"] == len(votes)
    assert influence["decided"]["value"] == pytest.approx(len(decided) / len(votes))
    assert influence["position_bias"] == pytest.approx(sum(o["ab"] - o["ba"] for _, o in votes) / 2 / len(votes))
    assert influence["agreement"]["value"] == pytest.approx(
        np.mean([label(row, WEIGHTS) * x > 0 for row, x in decided])
    )
    longer = [(len(row["a"]["text"].split()) - len(row["b"]["text"].split())) * x > 0 for row, x in decided]
    assert influence["prefers_longer"]["value"] == pytest.approx(np.mean(longer))


def test_preference_for_own_texts_counts_pairs_with_another_writer_alone(tmp_path: Path) -> None:
    rows = [vote_row(i, {"calm": (odds, odds)}) for i, odds in enumerate([2.0, 1.0, -1.0, -3.0, 0.0, 1.0])]
    for row, side in zip(rows, ["a", "a", "a", "b", "a", None], strict=True):
        if side:
            row[side]["model"] = "judge"
    own = explained(tmp_path / "run", rows)["prefers_own"]
    assert (own["n"], own["value"]) == (4, 0.75), "the even pair and the one of strangers count for nothing"
    assert explained(tmp_path / "strangers", random_rows())["prefers_own"] is None


def test_calling_a_what_was_b_and_the_order_of_rows_change_nothing(tmp_path: Path) -> None:
    rows = random_rows()
    first = explained(tmp_path / "one", rows)
    other_way = [swapped(row) if i % 3 else row for i, row in enumerate(rows)][::-1]
    second = explained(tmp_path / "two", other_way)
    for explanation in (first, second):
        explanation.pop("name")
        for without in explanation["without"].values():
            without.pop("examples")  # they show a and b as they are
    assert json.dumps(first["without"]) == json.dumps(second["without"])
    assert [entry["principles"] for entry in first["correlations"]] == [
        entry["principles"] for entry in second["correlations"]
    ]
    for entry, entry_other_way in zip(first["correlations"], second["correlations"], strict=True):
        assert entry["interval"] == pytest.approx(entry_other_way["interval"])
        assert entry["correlation"] == pytest.approx(entry_other_way["correlation"])
    for id in WEIGHTS:
        for figure in ("mean_strength", "length_correlation", "position_bias", "flip_rate"):
            assert first["principles"][id][figure] == pytest.approx(second["principles"][id][figure])


def test_principles_that_say_the_same_and_the_contrary_are_named(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = []
    for i in range(40):
        x, y = rng.gauss(0, 2), rng.gauss(0, 2)
        rows.append(vote_row(i, {"calm": (x, x), "safe": (x + 0.1, x - 0.1), "short": (-x, -x), "other": (y, y)}))
    explanation = explained(tmp_path / "run", rows, weights={**WEIGHTS, "other": 1.0})
    assert explanation["redundant"][0]["principles"] == ["calm", "safe"]
    assert [entry["principles"] for entry in explanation["conflicting"]] == [["calm", "short"], ["safe", "short"]]
    strongest = {tuple(entry["principles"]): entry for entry in explanation["correlations"]}
    assert strongest["calm", "short"]["correlation"] == pytest.approx(-1)
    low, high = strongest["calm", "other"]["interval"]
    assert low < 0 < high, "two principles that have nothing to do with each other"
    text = "\n".join(explanation_lines(explanation))
    assert "calm and safe say nearly the same: +1.00 [+1.00, +1.00] over 40 pairs" in text
    assert "calm and short contradict each other" in text


def test_principles_that_hardly_decide_or_may_be_unrelated_are_not_named(tmp_path: Path) -> None:
    """The strong correlation of votes that are all near even, and one whose interval contains 0."""
    rng = random.Random(3)
    rows = []
    for i in range(40):
        x, y = rng.gauss(0, 2), rng.gauss(0, 2)
        # Two votes of `short` outweigh all others.
        short = 90.0 if i == 0 else -90.0 if i == 1 else y
        rows.append(vote_row(i, {"calm": (x, x), "safe": (-x / 100, -x / 100), "short": (short, short)}))
        if i < 2:
            rows[-1]["votes"] = vote_row(i, {"calm": (9.0, 9.0) if i else (-30.0, -30.0), "short": (short, short)})[
                "votes"
            ]
    explanation = explained(tmp_path / "run", rows)
    entries = {tuple(entry["principles"]): entry for entry in explanation["correlations"]}
    assert entries["calm", "safe"]["correlation"] == pytest.approx(-1)
    assert entries["calm", "safe"]["decided"][0] >= MIN_DECIDED > entries["calm", "safe"]["decided"][1] == 0
    wide = entries["calm", "short"]
    assert wide["correlation"] < -0.3
    assert wide["interval"][0] < 0 < wide["interval"][1]
    assert min(wide["decided"]) >= MIN_DECIDED
    assert (explanation["redundant"], explanation["conflicting"]) == ([], [])
    text = "\n".join(explanation_lines(explanation))
    assert "contradict each other" not in text


def test_pairs_to_read_change_visibly_and_the_largest_change_is_the_first(tmp_path: Path) -> None:
    changes = [0.001, 0.5, 2.0, 0.02, 1.0]
    rows = [vote_row(i, {"calm": (x, x), "safe": (-1.5 * x, -1.5 * x)}) for i, x in enumerate(changes)]
    explanation = explain(load_labelled_votes(run_of(tmp_path / "run", rows), tmp_path), n_examples=5)
    without = explanation["without"]["calm"]
    assert (without["turned"], without["barely_turned"]) == (5, 2)
    assert [example["pair"] for example in without["examples"]] == [rows[i]["id"] for i in (2, 4, 1)]
    lines = list(explanation_lines(explanation))
    header = next(line for line in lines if "labels turned" in line)
    row = next(line for line in lines[lines.index(header) :] if line.startswith("calm"))
    assert row.split()[-4:] == ["5", "2", "0", "0"]
    assert header.split()[-4:] == ["turned", "barely", "lost", "gained"]


def test_pairs_without_a_label_are_counted_by_reason(tmp_path: Path) -> None:
    votes = [{"calm": (x, x)} for x in (2.0, 0.0, 0.0, 0.3)] + [{}]
    name = run_of(tmp_path / "run", [vote_row(i, vote) for i, vote in enumerate(votes)])
    assert (
        _first_line(tmp_path)
        == f"{name}: 2 of 5 pairs have a label; 2 are exactly even; 1 is without a principle that has a say"
    )
    stage = run_folder.latest(tmp_path / "run")["preferences"]
    LabelRule(WEIGHTS, min_confidence=0.6, abstain_below=0.1).write(stage)
    assert _first_line(tmp_path) == (
        f"{name}: 1 of 5 pairs have a label; 1 is below min_confidence 0.6; 3 are without a principle that has a say"
    )


def _first_line(runs: Path) -> str:
    text = CliRunner().invoke(main, ["votes", "explain", "run", "--runs", str(runs)]).stdout
    return " ".join(text.split("\n\n")[0].split())


def test_what_labels_reward_is_shown_where_the_stage_has_counted_it(tmp_path: Path) -> None:
    run_of(tmp_path / "run", random_rows())
    assert "chosen against rejected" not in _first_line(tmp_path)
    stage = run_folder.latest(tmp_path / "run")["preferences"]
    facts = json.loads((stage / run_folder.STAGE).read_text())
    behaviours = {
        "refusal": {"chosen": 0.29, "rejected": 0.06}, "looping": {"chosen": 0.0, "rejected": 0.0},
        "words": {"chosen": 23.2, "rejected": 25.9},
    }  # fmt: skip
    facts["figures"] = {"labels": {"behaviours": behaviours}}
    (stage / run_folder.STAGE).write_text(json.dumps(facts))
    assert "chosen against rejected: refuses 29 % / 6 %, words 23 / 26" in _first_line(tmp_path)


def test_two_wordings_are_shown_where_their_votes_are_compared(tmp_path: Path) -> None:
    for name, calm, field in (("one", "Which is calmer?", "compare"), ("two", "Which one\x1b shouts less?", "compare")):
        run_of(tmp_path / name, random_rows())
        parts = {
            "principles": [*WEIGHTS, "unasked"], f"principle.calm.{field}": calm,
            "principle.safe.compare": "Which is safer?", "principle.unasked.compare": f"Which {name}?",
        }  # fmt: skip
        (tmp_path / name / "votes-1" / run_folder.STAGE).write_text(json.dumps({"parts": parts}))
    result = CliRunner().invoke(main, ["votes", "diff", "one", "two", "--runs", str(tmp_path)])
    assert result.exit_code == 0
    assert "calm\n  before  Which is calmer?\n  after   Which one\ufffd shouts less?\n" in result.stdout
    assert "Which is safer?" not in result.stdout, "both ask the same"
    assert "unasked" not in result.stdout, "it has no votes"
    assert "same votes" not in result.stdout


def test_a_run_against_itself_or_its_fork_is_called_the_same_votes(tmp_path: Path) -> None:
    for name in ("run", "copied"):
        run_of(tmp_path / name, random_rows())
    shutil.copytree(tmp_path / "run", tmp_path / "forked", copy_function=os.link)
    for name in ("run", "forked"):
        result = CliRunner().invoke(main, ["votes", "diff", "run", name, "--runs", str(tmp_path)])
        assert f"run and {name} are the same votes and labels, from the same files\n" in result.stdout
    result = CliRunner().invoke(main, ["votes", "diff", "run", "copied", "--runs", str(tmp_path)])
    assert "same votes" not in result.stdout


def test_a_principle_that_never_took_a_side_has_no_correlation(tmp_path: Path) -> None:
    rows = [vote_row(i, {"calm": (1.0, 1.0), "short": (0.0, 0.0)}) for i in range(MIN_COMMON_PAIRS)]
    explanation = explained(tmp_path / "run", rows)
    assert explanation["correlations"] == []


def test_correlations_of_a_handful_of_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = random_rows(n=60)
    counts = {
        ids: sum(set(ids) <= {vote["principle"] for vote in row["votes"]} for row in rows)
        for ids in (("calm", "safe"), ("calm", "short"), ("safe", "short"))
    }
    explanation = explained(tmp_path / "run", rows)
    assert {tuple(entry["principles"]): entry["pairs"] for entry in explanation["correlations"]} == counts
    assert explanation["correlations_left_out"] == 0
    few = explained(tmp_path / "few", rows[: MIN_COMMON_PAIRS - 1])
    assert (few["correlations"], few["correlations_left_out"]) == ([], 3)
    sentence = "correlations of two principles: 3 left out, with votes of both on fewer than 20 pairs"
    assert sentence in list(explanation_lines(few))


def test_the_example_shown_is_one_that_turns_and_its_text_cannot_steer_a_terminal(tmp_path: Path) -> None:
    rows = [vote_row(0, {"calm": (1.0, 1.0), "safe": (-1.5, -1.5)}, a="\x1b[31mred")]
    explanation = explained(tmp_path / "run", rows)
    (example,) = explanation["without"]["calm"]["examples"]
    assert example["p_a"] > 0.5 > example["p_a_without"]
    assert "\x1b" not in "\n".join(explanation_lines(explanation))


def test_a_judge_against_itself_never_turns_and_against_its_contrary_always(tmp_path: Path) -> None:
    rows = random_rows()
    contrary = [
        {**row, "votes": [{**principle, "log_odds": -principle["log_odds"]} for principle in row["votes"]]}
        for row in map(swapped, rows)
    ]
    first, same_votes, contrary_votes = (
        load_labelled_votes(run_of(tmp_path / name, run_rows), tmp_path)
        for name, run_rows in (("one", rows), ("same", [swapped(row) for row in rows[:40]]), ("other", contrary))
    )
    differences = compare_votes(first, same_votes)
    assert differences["matched"] == 40
    assert differences["turned"]["value"] == 0
    assert not differences["examples"]
    assert all(principle["correlation"] == pytest.approx(1) for principle in differences["principles"].values())
    differences = compare_votes(first, contrary_votes)
    assert differences["turned"]["value"] == 1
    assert len(differences["examples"]) == 3
    assert all(principle["correlation"] == pytest.approx(-1) for principle in differences["principles"].values())
    assert "labels turned: 1.00" in next(iter(difference_lines(differences)))


def test_runs_without_a_pair_in_common_are_refused(tmp_path: Path) -> None:
    first, second = (
        load_labelled_votes(run_of(tmp_path / name, [vote_row(i, {"calm": (1.0, 1.0)})]), tmp_path)
        for i, name in enumerate(("x", "y"))
    )
    with pytest.raises(BadInput, match="x and y have no pair in common"):
        compare_votes(first, second)


def test_where_several_stages_make_labels_one_must_be_named(tmp_path: Path) -> None:
    run_of(tmp_path / "run", random_rows())
    run_of(tmp_path / "run", random_rows(), stage="other-labels", weights={**WEIGHTS, "calm": 0.0})
    with pytest.raises(BadInput, match="expected run/preferences, run/other-labels"):
        load_labelled_votes("run", tmp_path)
    with pytest.raises(BadInput, match="did you mean 'other-labels'"):
        load_labelled_votes("run/other-label", tmp_path)
    assert explain(load_labelled_votes("run/other-labels", tmp_path))["principles"]["calm"]["share_of_say"] == 0


def test_the_command_prints_json_and_ends_with_2_for_a_run_without_labels(tmp_path: Path) -> None:
    run_of(tmp_path / "run", random_rows())
    result = CliRunner().invoke(main, ["votes", "explain", "run", "--runs", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["pairs"] == 60
    result = CliRunner().invoke(main, ["votes", "diff", "run", "run", "--runs", str(tmp_path)])
    assert result.exit_code == 0
    assert "60 pairs in both" in result.stdout
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / run_folder.RUN).write_text("{}")
    result = CliRunner().invoke(main, ["votes", "explain", "empty", "--runs", str(tmp_path)])
    assert result.exit_code == 2
    assert "a run whose `prefer` stage is done" in result.stderr


def test_a_run_is_found_in_a_folder_relative_to_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "runs" / "run", random_rows())
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["votes", "explain", "run"])
    assert (result.exit_code, "60 pairs" in result.stdout) == (0, True)


def test_what_votes_commands_print_fits_100_columns(tmp_path: Path) -> None:
    long_ids = {id: f"{id}-{'long' * 12}" for id in WEIGHTS}
    rows = [
        {**row, "votes": [{**vote, "principle": long_ids[vote["principle"]]} for vote in row["votes"]], "human": i % 2}
        for i, row in enumerate(random_rows())
    ]
    name = run_of(tmp_path / f"run-{'x' * 60}", rows, weights={long_ids[id]: weight for id, weight in WEIGHTS.items()})
    for arguments in (["explain", name], ["diff", name, name], ["calibrate", name]):
        result = CliRunner().invoke(main, ["votes", *arguments, "--runs", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= 100
