"""Preferences from votes: the arithmetic against a second writing of it, and what must not make a difference."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from feedback_stages import PRINCIPLES, Script, human_pairs, run_stage, sample, swapped, vote_row
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.constitution import load_constitution
from cai.feedback import stored_votes
from cai.feedback.labelled_votes import LABEL_RULE, LabelledVotes, LabelRule
from cai.feedback.stored_votes import read_votes
from cai.maths.calibration import fit_temperature
from cai.maths.vote_aggregation import sigmoid
from cai.micro.oracle import gold_score
from cai.stages.prefer import Clamp, Config
from cai.storage.journal import RECORDS
from cai.storage.rows import Failure, stable_id
from cai.storage.run_folder import STAGE
from cai.text.errors import BadInput, StageFailed
from cai.text.progress import StageLine

WEIGHTS = {"calm": 2.0, "short": 0.5, "safe": 1.0}


def random_votes(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        ids = (id for id in WEIGHTS if rng.random() < 0.8 or id == "calm")
        rows.append(vote_row(number, {id: (rng.gauss(0.5, 2), rng.gauss(-0.5, 2)) for id in ids}))
    return rows


def prefer(folder, rows, document=PRINCIPLES, **config):
    return run_stage("prefer", folder, {"votes": rows}, document=document, **config)


def fitted_temperature(folder, rows, document=PRINCIPLES, **config) -> dict:
    return prefer(folder, rows, document, temperature="fitted", **config).figures["labels"]["temperature"]


def by_pair(result) -> dict[str, tuple[str, str, float]]:
    return {row["pair_id"]: (row["chosen"][0]["content"], row["rejected"][0]["content"], row["p_chosen"])
            for row in result.rows}  # fmt: skip


def expected_log_odds(row: dict, *, weights=WEIGHTS, temperature=None, abstain_below=0.0) -> float | None:
    """The log-odds of one pair, written a second time, in plain loops over probabilities."""
    top = bottom = 0.0
    for id in {vote["principle"] for vote in row["votes"]}:
        odds = {vote["order"]: vote["log_odds"] for vote in row["votes"] if vote["principle"] == id}
        if len(odds) < 2:
            continue
        mean = (odds["ab"] + odds["ba"]) / 2
        if weights[id] and abs(mean) >= abstain_below:
            top += weights[id] * mean
            bottom += weights[id]
    if not bottom:
        return None
    return top / (bottom if temperature is None else temperature)


def hashed(*parts: str) -> str:
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def labelled_in_plain_python(rows: list[dict], labels="soft", min_confidence=0.5, **rule) -> list[dict]:
    """Whole preferences from rows of votes, a second time, as one would write them first."""
    preferences = []
    for row in rows:
        odds = expected_log_odds(row, **rule)
        confidence = 0.5 if odds is None else 1 / (1 + math.exp(-abs(odds)))
        if odds is None or confidence < min_confidence or (labels == "hard" and odds == 0):
            continue
        if odds:
            first, second = "ab" if odds > 0 else "ba"
        else:
            first, second = sorted("ab", key=lambda side: hashed(row[side]["id"], row[side]["text"]))
        label = 1.0 if labels == "hard" else min(confidence, labels["clamp"][1] if labels != "soft" else 1)
        preferences.append(
            {
                "id": hashed("prefer", row["id"]), "pair_id": row["id"], "prompt_id": row["prompt_id"],
                "prompt": row["prompt"], "tags": row["tags"], "judge": "judge", "constitution": "trial",
                "chosen": [{"role": "assistant", "content": row[first]["text"]}],
                "rejected": [{"role": "assistant", "content": row[second]["text"]}],
                "p_chosen": pytest.approx(label, abs=1e-12), "log_odds": pytest.approx(abs(odds), abs=1e-12),
                "source": "ai",
            }
        )  # fmt: skip
    return preferences


@pytest.mark.parametrize(
    "config",
    [
        {}, {"temperature": 2.5}, {"abstain_below": 1.0}, {"temperature": 0.5, "abstain_below": 2.0},
        {"min_confidence": 0.7}, {"labels": {"clamp": [0.4, 0.6]}}, {"labels": "hard", "min_confidence": 0.6},
    ],
)  # fmt: skip
def test_labels_equal_a_second_writing_row_for_row(tmp_path, config):
    rows = random_votes(200)
    result = prefer(tmp_path, rows, **config)
    assert result.rows == labelled_in_plain_python(rows, **config)
    figures = result.figures["labels"]
    assert figures["pairs"] + figures["abstained"] + figures["dropped"] + figures["even"] == 200


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["soft", "hard", {"clamp": [0.3, 0.7]}]), st.floats(0, 2))
def test_order_of_rows_and_names_of_sides_change_nothing(seed, kind, abstain_below):
    rows = random_votes(12, seed)
    rows += [vote_row(100, {"calm": (1.0, -1.0)}), vote_row(101, {"calm": (2.0, 0.5), "short": (-5.0, -5.0)})]
    rng = random.Random(seed)
    exchanged = [swapped(row) if rng.random() < 0.5 else row for row in rows]
    rng.shuffle(exchanged)
    with tempfile.TemporaryDirectory() as folder:
        config = {"labels": kind, "abstain_below": abstain_below}
        first = prefer(Path(folder) / "there", rows, **config)
        second = prefer(Path(folder) / "back", exchanged, **config)
    assert by_pair(first) == by_pair(second)
    assert {row["id"] for row in first.rows} == {row["id"] for row in second.rows}


def test_a_row_is_what_trl_reads(tmp_path):
    (row,) = prefer(tmp_path, [vote_row(1, {"calm": (2.0, 1.0)}, "red_team")]).rows
    assert row["chosen"] == [{"role": "assistant", "content": "left 1"}]
    assert row["rejected"] == [{"role": "assistant", "content": "right 1"}]
    assert row["prompt"] == [{"role": "user", "content": "Question 1?"}]
    assert row["p_chosen"] == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert row["log_odds"] == 1.5
    assert (row["source"], row["tags"], row["judge"]) == ("ai", ["red_team"], "judge")
    assert "margin" not in row


def test_weights_decide_and_zero_switches_off(tmp_path):
    rows = [vote_row(1, {"calm": (1.0, 1.0), "short": (-3.0, -3.0)})]
    assert prefer(tmp_path / "1", rows).rows[0]["log_odds"] == pytest.approx((2 * 1 - 0.5 * 3) / 2.5)
    heavier = PRINCIPLES.replace("is brief.}", "is brief., weight: 9}").replace("weight: 0.5", "weight: 4")
    row = prefer(tmp_path / "2", rows, heavier).rows[0]
    assert row["chosen"][0]["content"] == "right 1"
    assert row["log_odds"] == pytest.approx(-(2 * 1 - 4 * 3) / 6)
    without_calm = prefer(tmp_path / "3", rows, PRINCIPLES.replace("weight: 2.0", "weight: 0")).rows[0]
    assert without_calm["log_odds"] == pytest.approx(3.0)


def test_a_pair_on_which_all_abstain_has_no_label(tmp_path):
    rows = [
        vote_row(1, {"calm": (0.1, 0.3), "short": (0.9, 0.9)}), vote_row(2, {"calm": (0.1, -0.1)}),
        vote_row(3, {"safe": (5, 5)}),
    ]  # fmt: skip
    result = prefer(tmp_path, rows, PRINCIPLES.replace("id: safe,", "id: safe, weight: 0,"), abstain_below=0.5)
    assert {row["pair_id"]: row["log_odds"] for row in result.rows} == {"pair-1": pytest.approx(0.9)}
    assert result.figures["labels"]["abstained"] == 2
    reason = r"none of the pairs gets a label: 3 judged pairs; 3 on which every principle abstains \(abstain_below 50\)"
    with pytest.raises(StageFailed, match=reason):
        prefer(tmp_path / "none", rows, abstain_below=50)


def test_weights_that_are_all_zero_are_called_that(tmp_path):
    weightless = re.sub(r"weight: [\d.]+", "weight: 0", PRINCIPLES).replace("id: safe,", "id: safe, weight: 0,")
    with pytest.raises(StageFailed, match="none of the pairs gets a label: every principle that voted has weight 0; "):
        prefer(tmp_path, [vote_row(1, {"calm": (0.1, 0.3), "short": (0.9, 0.9)})], weightless)


def test_confidence_is_measured_before_clamping(tmp_path):
    rows = [vote_row(1, {"calm": (3.0, 3.0)}), vote_row(2, {"calm": (0.3, 0.3)}), vote_row(3, {"calm": (-0.1, -0.1)})]
    result = prefer(tmp_path, rows, labels={"clamp": [0.4, 0.6]}, min_confidence=0.55)
    assert {row["pair_id"]: row["p_chosen"] for row in result.rows} == {
        "pair-1": 0.6, "pair-2": pytest.approx(1 / (1 + math.exp(-0.3)))
    }  # fmt: skip
    assert result.figures["labels"]["dropped"] == 1


@pytest.mark.parametrize("bounds", [[0.4, 0.7], [0.6, 0.4], [0.5, 0.5], [-0.1, 1.1]])
def test_clamps_that_favour_a_side_are_refused(bounds):
    with pytest.raises(ValueError, match="add up to 1"):
        Clamp(clamp=bounds)


def test_an_even_pair_is_named_by_hash_or_left_out_of_hard_labels(tmp_path):
    rows = [vote_row(n, {"calm": (1.0, -1.0)}) for n in range(40)]
    soft = prefer(tmp_path / "soft", rows)
    assert {row["p_chosen"] for row in soft.rows} == {0.5}
    first = sum(row["chosen"][0]["content"].startswith("left") for row in soft.rows)
    assert 8 <= first <= 32, "neither side is favoured"
    rows.append(vote_row(99, {"calm": (1.0, 1.0)}))
    hard = prefer(tmp_path / "hard", rows, labels="hard")
    assert [row["pair_id"] for row in hard.rows] == ["pair-99"]
    assert hard.figures["labels"]["even"] == 40


def test_a_principle_with_one_order_never_counts(tmp_path):
    row = vote_row(1, {"calm": (4.0, 2.0), "short": (9.0, 9.0)})
    row["votes"] = [vote for vote in row["votes"] if (vote["principle"], vote["order"]) != ("short", "ba")]
    assert prefer(tmp_path, [row]).rows[0]["log_odds"] == pytest.approx(3.0)


CANDIDATES = [
    sample(f"Question {n}?", text, "red_team" if n % 2 else "helpful", number=k)
    for n in range(12) for k, text in enumerate([f"good {n}", f"bad {n}"])
]  # fmt: skip


def judged_and_preferred(folder, prefers, rows=CANDIDATES, **config):
    votes = run_stage("judge", folder, {"candidates": rows}, script=Script(prefers=prefers), **config)
    return votes, prefer(folder, votes.rows)


def shown_first(question, text: str) -> bool:
    text_shown = question.messages[0]["content"]
    position = text_shown.index(f"\n{text} ")
    return position == min(text_shown.index("\ngood "), text_shown.index("\nbad ")) and position > 0


def test_an_additive_position_bias_leaves_no_trace_in_the_labels(tmp_path):
    def judge(bias):
        return lambda question: ((1.2 if shown_first(question, "good") else -1.2) + bias, 0.8)

    _, fair = judged_and_preferred(tmp_path / "fair", judge(0.0))
    votes, biased = judged_and_preferred(tmp_path / "biased", judge(2.0))
    assert votes.figures["votes"]["judge"]["flip_rate"] == 1.0
    assert all(row["chosen"][0]["content"].startswith("good") for row in biased.rows)
    assert [row["p_chosen"] for row in biased.rows] == pytest.approx([row["p_chosen"] for row in fair.rows], abs=1e-9)


def test_a_judge_that_looks_at_positions_alone_is_even(tmp_path):
    _, result = judged_and_preferred(tmp_path, lambda question: (3.0, 1.0))
    assert [row["p_chosen"] for row in result.rows] == pytest.approx([0.5] * len(result.rows), abs=1e-12)


def test_a_failed_vote_never_becomes_an_even_one(tmp_path):
    def prefers(question):
        text = question.messages[0]["content"]
        if "Question 3?" in text or question.id.endswith("ab/calm"):
            return Failure(question.id, "overloaded")
        return (2.0 if shown_first(question, "good") else -2.0), 1.0

    votes, result = judged_and_preferred(tmp_path, prefers)
    assert len(votes.rows) == len(result.rows) == 11
    assert [row["log_odds"] for row in result.rows] == pytest.approx([2.0] * 11)


def test_the_line_of_the_stage_counts_labels_that_prefer_a_response_and_all_pairs(tmp_path):
    line = StageLine("preferences")
    result = prefer(tmp_path, [vote_row(i, {"calm": (x, x)}) for i, x in enumerate([2, -1, 0])], progress=line)
    assert len(result.rows) == 3, "an even soft label is one too"
    assert line.summary(failures=0).startswith("2 labels of 3 pairs, ")


def test_figures_say_who_is_agreed_with_and_whether_length_wins(tmp_path):
    rows = [vote_row(n, {"calm": (2, 2), "short": (-1, -1)}, a="a much longer answer", b="brief") for n in range(5)]
    figures = prefer(tmp_path, rows).figures["labels"]
    assert figures["longer_wins"]["value"] == 1.0
    assert figures["principles"]["calm"] == {"pairs": 5, "mean_strength": 2.0, "agreement": 1.0}
    assert figures["principles"]["short"]["agreement"] == 0.0
    assert "accuracy" not in figures, "these prompts have no known truth"


def micro_pair(number: int, right: bool, *tags: str) -> dict:
    """A vote, right or wrong, on an example of the micro constitution that the oracle sees the same way."""
    examples = [
        example for principle in load_constitution("micro").principles for example in principle.examples
        if gold_score(example.conversation, example.better) > gold_score(example.conversation, example.worse)
    ]  # fmt: skip
    assert len(examples) >= 8
    example = examples[number % len(examples)]
    row = vote_row(number, {"calm": (1.0, 1.0) if right else (-1.0, -1.0)}, *tags)
    row["prompt"] = example.conversation
    row["a"]["text"], row["b"]["text"] = example.better, example.worse
    return row


def test_labels_are_measured_by_the_oracle_on_held_out_prompts(tmp_path):
    rows = [micro_pair(n, n % 4 != 0, f"topic:{n % 5}") for n in range(16)]
    even = micro_pair(16, True, "topic:6")
    even["b"] = {**even["b"], "text": even["a"]["text"]}
    unclear = micro_pair(17, True, "topic:6")
    unclear["b"] = {**unclear["b"], "text": "Colourless green ideas sleep furiously."}
    of_all = prefer(tmp_path / "all", [*rows, even, unclear]).figures["labels"]
    assert of_all["accuracy"]["value"] == 12 / 16
    assert (of_all["accuracy"]["n"], of_all["accuracy"]["topics"]) == (16, 5)
    assert (of_all["ties"], of_all["unclear"], of_all["measured_on"]) == (1, 1, "all")
    assert of_all["principles"]["calm"]["agreement_with_gold"] == 12 / 16
    assert sum(n for counts in of_all["acts"].values() for n in counts.values()) == 18

    held_out = [micro_pair(n, False, "topic:9", "held_out") for n in range(20, 23)]
    measured = prefer(tmp_path / "some", [*rows, *held_out]).figures["labels"]
    assert (measured["accuracy"]["value"], measured["accuracy"]["n"], measured["measured_on"]) == (0.0, 3, "held_out")

    stage = tmp_path / "prefer-reads-votes" / STAGE
    figures = {"votes": {"votes": {"failed_with_truth": {"oracle": {"all": 9, "held_out": 1}}}}}
    stage.parent.mkdir()
    stage.write_text(json.dumps({"figures": figures}))
    failed = prefer(tmp_path, [*rows, *held_out]).figures["labels"]["accuracy"]
    assert (failed["missing"], failed["bounds"]) == (1, [0.0, 0.25])


def test_people_can_label_pairs_instead_of_a_judge_or_beside_it(tmp_path):
    pairs = [
        (["Hello?", "Hello!"], ["Hello?", "Go away."]),
        (["Hello?", "Hi.", "So?", "So!"], ["Hello?", "Hi.", "So?", "No."]),
        (["One?", "Yes."], ["Another?", "No."]),
    ]
    source = human_pairs(tmp_path, pairs, "red_team")
    result = run_stage("prefer", tmp_path, document=None, pairs=source)
    assert [row["source"] for row in result.rows] == ["human", "human"]
    assert [row["p_chosen"] for row in result.rows] == [1.0, 1.0]
    assert len(result.rows[1]["prompt"]) == 3
    assert result.figures["labels"]["human"]["rows"] == 3
    assert sum(result.figures["labels"]["human"]["left_out"].values()) == 1

    votes = run_stage("prefer", tmp_path / "both", {"votes": [vote_row(1, {"calm": (9.0, 9.0)})]},
                      pairs={**source, "source": "../people.jsonl"}, labels={"clamp": [0.2, 0.8]})  # fmt: skip
    assert [(row["source"], row["p_chosen"]) for row in votes.rows] == [("ai", 0.8), ("human", 0.8), ("human", 0.8)]
    with pytest.raises(ValueError, match="neither"):
        run_stage("prefer", tmp_path)


def test_the_temperature_is_a_number_or_a_word():
    assert Config.model_validate({"id": "p", "from": "v", "temperature": 2}).temperature == 2.0
    for word in ("fitted", "sum_of_weights"):
        assert Config.model_validate({"id": "p", "from": "v", "temperature": word}).temperature == word
    for number in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            Config.model_validate({"id": "p", "from": "v", "temperature": number})


def test_probabilities_do_not_overflow():
    p = sigmoid(np.array([-1e4, -1.0, 0.0, 1.0, 1e4]))
    assert p == pytest.approx([0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1])


def test_labels_of_reasoned_votes_are_clamped_unless_the_recipe_says_otherwise(tmp_path):
    rows = random_votes(30)
    reasoned = [{**row, "method": "reasoned"} for row in rows]
    p = [row["p_chosen"] for row in prefer(tmp_path / "usual", reasoned).rows]
    assert min(p) >= 0.5
    assert max(p) == 0.6
    assert max(row["p_chosen"] for row in prefer(tmp_path / "soft", reasoned, labels="soft").rows) > 0.6
    mixed = prefer(tmp_path / "mixed", [*reasoned[:-1], rows[-1]])
    assert max(row["p_chosen"] for row in mixed.rows) > 0.6


def by_people(n: int, seed: int = 0) -> list[dict]:
    """Votes with three times the calibrated log-odds, on pairs that people labelled."""
    rng = random.Random(seed)
    rows = []
    for row in random_votes(n, seed):
        p = 1 / (1 + math.exp(-expected_log_odds(row) / 3))
        rows.append({**row, "human": float(rng.random() < p)})
    return rows


def test_a_fitted_temperature_is_the_one_of_greatest_likelihood_of_what_people_chose(tmp_path):
    rows = by_people(400)
    result = prefer(tmp_path / "fitted", rows, temperature="fitted")
    fitted = result.figures["labels"]["temperature"]
    sums = [expected_log_odds(row, temperature=1.0) for row in rows]

    def loss(t):
        return sum(math.log1p(math.exp(-x / t if row["human"] else x / t)) for x, row in zip(sums, rows, strict=True))

    assert loss(fitted["value"]) <= min(loss(fitted["value"] * step) for step in (0.98, 0.99, 1.01, 1.02))
    assert fitted["ece_after"] < fitted["ece_before"]
    assert fitted["brier_after"] < fitted["brier_before"]
    assert (fitted["truth"], fitted["pairs"], fitted["measured_on"]) == ("human", 400, "cross_validation")
    by_number = prefer(tmp_path / "number", rows, temperature=fitted["value"])
    assert by_pair(result) == by_pair(by_number)


def test_a_temperature_is_never_fitted_on_held_out_prompts(tmp_path):
    rows = by_people(300)
    held_out = [{**row, "tags": ["held_out"]} for row in rows[200:]]
    first = fitted_temperature(tmp_path / "1", [*rows[:200], *held_out])
    exchanged = [{**row, "human": 1 - row["human"]} for row in held_out]
    second = fitted_temperature(tmp_path / "2", [*rows[:200], *exchanged])
    assert first["value"] == second["value"]
    assert first["brier_after"] != second["brier_after"]
    assert (first["measured_on"], first["pairs"], first["measured_pairs"]) == ("held_out", 200, 100)
    for without_truth in (held_out, random_votes(20), [{**rows[0], "human": 0.5}]):
        with pytest.raises(StageFailed, match="no truth outside of held-out prompts"):
            prefer(tmp_path / "none", without_truth, temperature="fitted")


def test_without_people_the_temperature_is_fitted_to_the_oracle(tmp_path):
    rows = [micro_pair(n, n % 4 != 0, f"topic:{n % 5}") for n in range(16)]
    fitted = fitted_temperature(tmp_path, rows)
    assert (fitted["truth"], fitted["pairs"], fitted["prompts"]) == ("oracle", 16, 5)
    # All votes are of one strength, weight 2: three of four are right where 1 / (1 + exp(-2 / T)) is 3/4.
    assert fitted["value"] == pytest.approx(2 / math.log(3), rel=1e-3)


TAGGED = PRINCIPLES.replace("weight: 2.0", "weight: 2.0, tags: [manner, tone]").replace(
    "weight: 0.5", "weight: 0.5, tags: [manner]"
)


def test_weights_by_tag_multiply_those_of_the_constitution(tmp_path):
    rows = [vote_row(1, {"calm": (1.0, 1.0), "short": (-3.0, -3.0), "safe": (1.0, 1.0)})]

    def log_odds(name, **by_tag):
        return prefer(tmp_path / name, rows, TAGGED, tag_weights=by_tag).rows[0]["log_odds"]

    assert log_odds("both", manner=2.0, tone=3.0) == pytest.approx((12 - 3 + 1) / 14)
    assert log_odds("one", manner=0.5) == pytest.approx((1 - 0.75 + 1) / 2.25)
    assert log_odds("off", manner=0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Config.model_validate({"id": "p", "from": "v", "tag_weights": {"manner": -1}})


def people_choose_left(folder, n: int, *tags: str) -> dict:
    """A file of pairs as `vote_row` makes them, and how a recipe names it."""
    return human_pairs(
        folder, [([f"Question {i}?", f"left {i}"], [f"Question {i}?", f"right {i}"]) for i in range(n)], *tags
    )


def votes_on(numbers, odds=1.0, *tags: str) -> list[dict]:
    """Votes on pairs with the ids that prompts have in files."""
    rows = [vote_row(n, {"calm": (odds, odds)}, *tags) for n in numbers]
    return [{**row, "prompt_id": stable_id("prompt", row["prompt"])} for row in rows]


def test_people_label_helpfulness_and_the_constitution_the_rest(tmp_path):
    rows = votes_on(range(6), 1.0, "helpful") + votes_on(range(6, 10), 1.0, "red_team")
    pairs = people_choose_left(tmp_path, 8, "helpful")
    result = prefer(tmp_path, rows, pairs=pairs, mix={"human_tags": ["helpful"]})
    assert [(row["source"], row["tags"]) for row in result.rows] == 4 * [("ai", ["red_team"])] + 8 * [
        ("human", ["helpful"])
    ]
    figures = result.figures["labels"]
    assert (figures["mixed_out_ai"], figures["mixed_out_human"], figures["pairs"]) == (6, 0, 12)
    assert (figures["agreement_with_people"]["value"], figures["agreement_with_people"]["n"]) == (1.0, 8)


@pytest.mark.parametrize(("share", "n_ai", "n_human"), [(0.5, 40, 40), (0.2, 60, 15), (0.75, 13, 40)])
def test_people_have_their_share_and_as_few_pairs_as_possible_go(tmp_path, share, n_ai, n_human):
    rows = votes_on(range(100, 160))
    pairs = people_choose_left(tmp_path, 40)
    result = prefer(tmp_path, rows, pairs=pairs, mix={"human_share": share})
    sources = [row["source"] for row in result.rows]
    assert (sources.count("ai"), sources.count("human")) == (n_ai, n_human)
    pairs["source"] = "../people.jsonl"
    exchanged = [swapped(row) for row in rows[::-1]]
    exchanged_result = prefer(tmp_path / "again", exchanged, pairs=pairs, mix={"human_share": share})
    assert {row["pair_id"] for row in exchanged_result.rows} == {row["pair_id"] for row in result.rows}
    agreement = result.figures["labels"]["agreement_with_people"]
    assert (agreement["value"], agreement["why"]) == (None, "no pair has labels of both")


def test_a_pair_that_both_labelled_takes_one_label_and_shows_how_far_they_agree(tmp_path):
    rows = votes_on(range(30)) + votes_on(range(30, 40), -1.0)
    result = prefer(tmp_path, rows, pairs=people_choose_left(tmp_path, 40), mix={"human_share": 0.5})
    prompts = [row["prompt"][-1]["content"] for row in result.rows]
    assert len(prompts) == len(set(prompts)) >= 20
    agreement = result.figures["labels"]["agreement_with_people"]
    assert (agreement["value"], agreement["n"], agreement["topics"]) == (0.75, 40, 40)
    assert agreement["interval"][0] < 0.75 < agreement["interval"][1]


@pytest.mark.parametrize(
    ("n_judged", "n_people", "share", "n_ai", "n_human"),
    [(200, 100, 0.5, 100, 100), (100, 100, 0.2, 80, 20), (50, 200, 0.5, 50, 50), (200, 100, 0.25, 150, 50)],
)
def test_pairs_that_both_labelled_go_to_whom_labels_are_short(tmp_path, n_judged, n_people, share, n_ai, n_human):
    pairs = people_choose_left(tmp_path, n_people)
    result = prefer(tmp_path, votes_on(range(n_judged)), pairs=pairs, mix={"human_share": share})
    sources = [row["source"] for row in result.rows]
    assert (sources.count("ai"), sources.count("human")) == (n_ai, n_human)
    assert len({row["prompt_id"] for row in result.rows}) == n_ai + n_human, "one label a pair"


def test_which_of_contradicting_labels_stays_does_not_depend_on_the_order_of_rows(tmp_path):
    pairs = people_choose_left(tmp_path, 20)
    file = tmp_path / "people.jsonl"
    lines = file.read_text().splitlines()
    lines += [json.dumps({"chosen": row["rejected"], "rejected": row["chosen"]}) for row in map(json.loads, lines)]
    kept_ids = []
    for name, order in (("there", lines), ("back", lines[::-1])):
        file.write_text("".join(line + "\n" for line in order))
        result = prefer(tmp_path, votes_on(range(100, 115)), pairs=pairs, mix={"human_share": 0.5})
        kept_ids.append({row["id"] for row in result.rows if row["source"] == "human"})
        assert len(kept_ids[-1]) == 15, name
    assert kept_ids[0] == kept_ids[1]


def test_agreement_is_shown_of_votes_on_pairs_that_people_labelled(tmp_path):
    rows = [{**row, "human": 1.0} for row in votes_on(range(3))] + [{**votes_on([3], 0.0)[0], "human": 0.0}]
    assert prefer(tmp_path, rows).figures["labels"]["agreement_with_people"]["value"] == 3.5 / 4
    assert "agreement_with_people" not in prefer(tmp_path / "none", votes_on(range(3))).figures["labels"]


@pytest.mark.parametrize("mix", [{"human_share": 0.5}, {"human_tags": ["helpful"]}])
def test_a_mix_without_a_usable_pair_of_people_is_refused(tmp_path, mix):
    equal = human_pairs(tmp_path, [(["Why?", "So."], ["Why?", "So."])], "helpful")
    with pytest.raises(StageFailed, match=r"`mix` found no pair that people labelled: 1 rows, .*the same answer twice"):
        prefer(tmp_path, votes_on(range(4)), pairs=equal, mix=mix)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({}, "either human_share"),
        ({"human_share": 0.5, "human_tags": ["x"]}, "either human_share"),
        ({"human_share": 1}, "less than 1"),
    ],
)
def test_a_mix_is_by_share_or_by_tag_of_two_sources(mix, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"id": "p", "from": "v", "pairs": {"source": "x"}, "mix": mix})
    with pytest.raises(ValueError, match="`from:` and `pairs:` beside it"):
        Config.model_validate({"id": "p", "from": "v", "mix": {"human_share": 0.5}})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [',"votes":[', '"},"b":{"', "\\", "\u2028\n\r\t\0", "}]}", "\U0001f600é"]
)
ODDS = st.floats(-30, 30, allow_subnormal=False) | st.sampled_from([0.0, 1e-300, -0.5])


@st.composite
def vote_files(draw) -> list[dict]:
    """Vote rows as a judge may leave them: any text, any numbers, some principles without a vote, even pairs."""
    rows = []
    for n in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.sampled_from(list(WEIGHTS)), min_size=1, unique=True))
        row = vote_row(
            n, {id: (draw(ODDS), draw(ODDS)) for id in ids}, *draw(st.lists(st.sampled_from(["x", "é"]), unique=True))
        )
        row["a"]["text"], row["b"]["text"] = draw(TEXTS), draw(TEXTS)
        row["prompt"][0]["content"] = draw(TEXTS)
        if draw(st.booleans()):
            row |= {"method": "rating", "scale": 7}
            for principle_vote in row["votes"]:
                principle_vote["scores"] = [1.0, 2]
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(vote_files(), st.sampled_from([1, 300, 8 << 20]))
def test_preferences_equal_a_second_writing_whatever_stands_in_the_votes(rows, read_bytes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_votes, "READ_BYTES", read_bytes)
        patch.setattr(stored_votes, "PARSE_ROWS", 3)
        has_points = any("scale" in row for row in rows)
        result = prefer(Path(folder), rows, **{"points_per_nat": 2.5} if has_points else {})
        written = result.bytes
    in_nats = [
        {**row, "votes": [{**vote, "log_odds": vote["log_odds"] / 2.5} for vote in row["votes"]]}
        if "scale" in row
        else row
        for row in rows
    ]
    assert result.rows == labelled_in_plain_python([json.loads(json.dumps(row)) for row in in_nats])
    assert written == b"".join(
        json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        for row in result.rows
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([{}, {"human_share": 0.4}, {"human_tags": ["helpful"]}]))
def test_neither_fit_nor_mix_depends_on_the_order_of_rows_or_on_names_of_sides(seed, mix):
    rng = random.Random(seed)
    rows = [{**row, "tags": rng.choice([["helpful"], ["red_team"]])} for row in by_people(30, seed)]
    exchanged = [{**swapped(row), "human": 1 - row["human"]} if rng.random() < 0.5 else row for row in rows]
    rng.shuffle(exchanged)
    with tempfile.TemporaryDirectory() as name:
        pairs = people_choose_left(Path(name), 20, "helpful")
        mix_config = {"pairs": pairs, "mix": mix} if mix else {}
        first = prefer(Path(name), rows, temperature="fitted", **mix_config)
        second = prefer(Path(name), exchanged, temperature="fitted", **mix_config)
    first_fit, second_fit = (result.figures["labels"]["temperature"] for result in (first, second))
    assert first_fit["value"] == pytest.approx(second_fit["value"], rel=1e-3)
    assert first_fit["brier_after"] == pytest.approx(second_fit["brier_after"], rel=1e-3)
    assert by_pair(first).keys() == by_pair(second).keys()
    for pair_id, (chosen, rejected, p) in by_pair(first).items():
        assert by_pair(second)[pair_id] == (chosen, rejected, pytest.approx(p, rel=1e-3))


def test_a_temperature_of_one_topic_is_fitted_and_not_measured(tmp_path):
    rows = [micro_pair(n, n % 4 != 0, "topic:0") for n in range(16)]
    fitted = fitted_temperature(tmp_path, rows)
    assert fitted["value"] == pytest.approx(2 / math.log(3), rel=1e-3)
    assert (fitted["ece_after"], fitted["brier_after"]) == (None, None)


def rated(rows: list[dict], scale: int = 7) -> list[dict]:
    """The same numbers as points of a judge that rates."""
    return [
        {**row, "method": "rating", "scale": scale,
         "votes": [{**vote, "log_odds": expected_vote(row, vote["principle"])} for vote in row["votes"]]}
        for row in rows
    ]  # fmt: skip


def expected_vote(row: dict, principle: str) -> float:
    return sum(vote["log_odds"] for vote in row["votes"] if vote["principle"] == principle) / 2


def test_points_become_nats_before_any_threshold_and_rated_pairs_stand_beside_compared_ones(tmp_path):
    compared = [vote_row(n, {"calm": (odds, odds)}) for n, odds in enumerate((1.0, 3.0))]
    points = rated([vote_row(n + 2, {"calm": (odds, odds)}) for n, odds in enumerate((1.0, 3.0))])
    result = prefer(tmp_path, compared + points, points_per_nat=2.0, abstain_below=0.6)
    p = {row["pair_id"]: row["p_chosen"] for row in result.rows}
    sigmoid_of = {odds: pytest.approx(1 / (1 + math.exp(-odds))) for odds in (1.0, 1.5, 3.0)}
    assert p == {"pair-0": sigmoid_of[1.0], "pair-1": sigmoid_of[3.0], "pair-3": sigmoid_of[1.5]}
    strength = result.figures["labels"]["principles"]["calm"]["mean_strength"]
    assert strength == pytest.approx((1 + 3 + 1.5) / 3), "in nats"


def test_the_fitted_points_per_nat_are_the_temperature_of_rated_pairs_alone(tmp_path):
    rows = by_people(400)
    compared, points = rows[:100], rated(rows[100:])
    result = prefer(tmp_path / "mixed", compared + points, points_per_nat="fitted", abstain_below=0.1)
    alone = prefer(tmp_path / "alone", points, points_per_nat="fitted")
    fitted = result.figures["labels"]["points_per_nat"]
    assert fitted == alone.figures["labels"]["points_per_nat"]
    means, truth = np.array([(expected_log_odds(row), row["human"]) for row in points]).T
    assert fitted["value"] == pytest.approx(fit_temperature(means, truth), rel=1e-6)
    assert fitted["pairs"] == 300
    rule = LabelRule.read(result.folder)
    assert (rule.points_per_nat, rule.is_points_per_nat_fitted) == (fitted["value"], True)
    assert fitted["ece_after"] < fitted["ece_before"]


@pytest.mark.parametrize(
    ("scales", "config", "message"),
    [
        ((7,), {}, "found votes in points from 1 to 7, expected `points_per_nat`"),
        ((7, None), {}, "found votes in nats and in points from 1 to 7, expected `points_per_nat`"),
        ((7, 10), {"points_per_nat": 1.0}, "expected one scale of ratings; make a `prefer` stage for each"),
        ((None,), {"points_per_nat": 1.0}, "found `points_per_nat`, expected it with votes of judges that rate"),
    ],
)
def test_points_are_never_taken_for_nats(tmp_path, scales, config, message):
    rows = []
    for number, scale in enumerate(scales):
        row = vote_row(number, {"calm": (1.0, 1.0)})
        rows += [row] if scale is None else rated([row], scale)
    with pytest.raises(BadInput, match=message):
        prefer(tmp_path, rows, **config)


def test_without_any_vote_a_number_of_points_per_nat_is_no_mistake(tmp_path):
    with pytest.raises(StageFailed, match="none of the pairs gets a label"):
        prefer(tmp_path, [], points_per_nat=2.0)


def test_without_a_judge_points_per_nat_are_refused():
    with pytest.raises(ValueError, match="found `points_per_nat`, expected `from:` beside it"):
        Config(id="prefer", pairs={"source": "people.jsonl"}, points_per_nat=2.0)


def test_the_labels_of_rated_pairs_are_explained_in_nats_and_an_earlier_rule_is_refused(tmp_path):
    result = prefer(tmp_path, rated(by_people(30)), points_per_nat=2.0)
    rule = LabelRule.read(result.folder)
    votes = read_votes([tmp_path / "prefer-reads-votes" / RECORDS])
    rows = list(votes.parsed_rows())
    labels = LabelledVotes("run", rows, votes.principles, *votes.log_odds_by_order(rule.points_per_nat), rule).labels()
    assert {row["pair_id"]: row["log_odds"] for row in result.rows} == {
        row["id"]: abs(label) for row, label in zip(rows, labels, strict=True)
    }
    with pytest.raises(BadInput, match="found votes in points, expected a `prefer` stage with `points_per_nat`"):
        votes.log_odds_by_order()


def test_a_temperature_that_ran_into_its_bound_is_said_to(tmp_path):
    rows = [{**row, "human": float(expected_log_odds(row) > 0)} for row in random_votes(20)]
    fitted = fitted_temperature(tmp_path, rows)
    size = np.mean([abs(expected_log_odds(row, temperature=1.0)) for row in rows])
    assert (fitted["at_bound"], fitted["value"]) == (True, pytest.approx(0.05 * size, rel=0.01))
    assert fitted["bounds"] == pytest.approx([0.05 * size, 100 * size])


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_size_of_weights_changes_the_fitted_temperature_and_no_label(tmp_path, factor):
    rows = by_people(100)
    document = PRINCIPLES.replace("weight: 2.0", "weight: 2.0, tags: [all]").replace(
        "weight: 0.5", "weight: 0.5, tags: [all]"
    ).replace("[red_team]", "[red_team], tags: [all]")  # fmt: skip
    unscaled = prefer(tmp_path / "one", rows, document, temperature="fitted")
    scaled = prefer(tmp_path / "many", rows, document, temperature="fitted", tag_weights={"all": factor})
    before, after = (result.figures["labels"]["temperature"] for result in (unscaled, scaled))
    assert after["value"] == pytest.approx(factor * before["value"], rel=1e-3)
    assert (before["at_bound"], after["at_bound"]) == (False, False)
    for pair_id, (chosen, rejected, p) in by_pair(unscaled).items():
        assert by_pair(scaled)[pair_id] == (chosen, rejected, pytest.approx(p, rel=1e-3))


def test_a_temperature_is_fitted_to_people_where_they_labelled_enough_prompts(tmp_path):
    of_world = [micro_pair(n, n % 4 != 0, f"topic:{n % 5}") for n in range(30)]

    def truth(folder, *rows):
        fitted = fitted_temperature(tmp_path / folder, list(rows))
        return fitted["truth"], fitted["pairs"]

    people = by_people(100)
    assert truth("few", *of_world, *({**row, "prompt_id": people[0]["prompt_id"]} for row in people)) == ("oracle", 30)
    assert truth("enough", *of_world, *people[:20]) == ("human", 20)
    assert truth("both few", *of_world[:7], *people[:6]) == ("oracle", 7)
    assert truth("even", *of_world[:6], *people[:6]) == ("human", 6)


RULE_ODDS = [(2.0, 1.0), (-0.5, -0.7), (0.1, 0.1), (3.0, -1.0)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"labels": "clamp", "clamp": (0.4, 0.6), "temperature": None}),
        ({"labels": "hard", "temperature": 2.0}, {"labels": "hard", "temperature": 2.0}),
        ({"tag_weights": {"tone": 3.0}, "abstain_below": 0.2}, {"weights": {"calm": 6.0, "short": 0.5}}),
        ({"temperature": "fitted", "min_confidence": 0.55, "labels": "soft"}, {"is_temperature_fitted": True}),
    ],
)
def test_the_rule_of_a_stage_gives_its_labels_again(tmp_path, config, expected):
    rows = []
    for number, (calm, short) in enumerate(itertools.product(RULE_ODDS, RULE_ODDS)):
        people_choose_a = (sum(calm) > 0) != (number % 5 == 0)
        row = vote_row(number, {"calm": calm, "short": short})
        rows.append({**row, "method": "reasoned", "human": float(people_choose_a)})
    document = PRINCIPLES.replace("weight: 2.0", "weight: 2.0, tags: [tone]")
    result = prefer(tmp_path, rows, document, **config)
    rule = LabelRule.read(result.folder)
    assert {name: getattr(rule, name) for name in expected} == expected
    assert rule.methods == ("reasoned",)
    votes = read_votes([tmp_path / "prefer-reads-votes" / RECORDS])
    labels = LabelledVotes("run", rows, votes.principles, *votes.log_odds_by_order(), rule).labels()
    by_pair = {row["pair_id"]: row for row in result.rows}
    strength = {row["id"]: abs(label) for row, label in zip(rows, labels, strict=True)}
    assert {id: row["log_odds"] for id, row in by_pair.items()} == {id: strength[id] for id in by_pair}
    assert all(strength[row["id"]] == 0 for row in rows if row["id"] not in by_pair)
    p_chosen = rule.p_chosen(np.array([row["log_odds"] for row in result.rows]))
    assert [row["p_chosen"] for row in result.rows] == p_chosen.tolist()


def test_a_stage_without_a_rule_is_refused(tmp_path):
    with pytest.raises(BadInput, match=f"found no {LABEL_RULE}"):
        LabelRule.read(tmp_path)
