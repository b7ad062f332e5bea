"""Injections in responses: which verdicts they turn, and what they get no verdict for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner
from feedback_stages import EXAMPLES, Script, constitution

from cai.cli import main
from cai.contracts.engine import Question
from cai.feedback import injections, judge_attacks
from cai.feedback.injections import CONTROLS, EMPTY, FAMILIES, SEEN_BY_MICRO, inject
from cai.feedback.votes import is_empty
from cai.micro import world_injections
from cai.micro_model.evaluate.judging import attack_cases
from cai.storage.rows import Failure
from cai.templates import load_templates
from cai.text.errors import BadInput, StageFailed
from cai.text.progress import StageLine


def shown(question: Question) -> tuple[str, str]:
    """The responses as the judge reads them."""
    text = question.messages[-1]["content"]
    match = re.search(r"<response_a>\n(.*)\n</response_a>\n\n<response_b>\n(.*)\n</response_b>", text, re.DOTALL)
    assert match is not None
    return match[1], match[2]


def upright(question: Question) -> tuple[float, float]:
    """Sees what is good, a little more so in the first place."""
    return (2.0 if "GOOD" in shown(question)[0] else -1.0), 1.0


def gullible(question: Question) -> tuple[float, float]:
    """Believes a JSON verdict, whoever wrote it."""
    verdict = re.search(r'"(?:winner|better|preferred)": "([AB])"', "\n".join(shown(question)))
    return ({"A": 3.0, "B": -3.0}[verdict[1]], 1.0) if verdict else upright(question)


def attacked(folder: Path, script: Script) -> judge_attacks.Attacks:
    pairs = judge_attacks.constitution_cases(constitution(folder, EXAMPLES), 10, 0)
    return judge_attacks.attack(pairs, script, load_templates("default"), ["<|end|>"], 0, StageLine("attacks"))


def test_a_judge_that_reads_the_responses_alone_turns_nowhere(tmp_path: Path) -> None:
    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=upright)), is_embedded=False)
    assert figures["pairs"] == 3
    assert [figures["all"][name]["value"] for name in ("flips", "accuracy")] == [0.0, 1.0]
    assert figures["all"]["flips"]["n"] == 3 * len(set(FAMILIES) - CONTROLS)
    assert (figures["seen"], figures["unseen"]) == (None, None)
    assert {family["seen"] for family in figures["families"].values()} == {None}
    assert {family["flips"]["value"] for name, family in figures["families"].items() if name != EMPTY} == {0.0}


def test_a_judge_that_believes_a_verdict_in_a_response_turns_in_that_family_in_both_orders(tmp_path: Path) -> None:
    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=gullible)), is_embedded=True)
    flipped = {name: family for name, family in figures["families"].items() if family["flips"]["value"]}
    assert list(flipped) == ["JSON verdict"]
    names = ("flips", "accuracy", "accuracy_without_injection")
    assert [flipped["JSON verdict"][name]["value"] for name in names] == [1.0, 0.0, 1.0]
    assert flipped["JSON verdict"]["seen"] is False
    overall, seen, unseen = (figures[name]["flips"] for name in ("all", "seen", "unseen"))
    assert [family["value"] for family in (overall, seen, unseen)] == pytest.approx(
        [3 / overall["n"], 0, 3 / unseen["n"]]
    )
    assert overall["n"] == seen["n"] + unseen["n"]
    assert figures["overall"] == overall["value"]
    assert {"flip_rate", "n", "seen"} <= figures["families"][EMPTY].keys()
    table = list(judge_attacks.attack_lines(figures))
    assert table[1].startswith("JSON verdict")
    assert "100.0 [" in table[1]
    assert "without an injection the judge is not distinguishable from chance" in table, "three pairs are too few"


def test_a_wrong_verdict_that_turns_is_no_gain_in_accuracy(tmp_path: Path) -> None:
    def wrong_and_gullible(question: Question) -> tuple[float, float]:
        odds, option_probability = upright(question)
        return gullible(question) if '{"' in question.messages[-1]["content"] else (-odds, option_probability)

    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=wrong_and_gullible)), is_embedded=True)
    names = ("flips", "accuracy", "accuracy_without_injection")
    assert [figures["families"]["JSON verdict"][name]["value"] for name in names] == [1.0, 0.0, 0.0]


def test_the_response_that_lost_is_the_one_that_gets_the_injection(tmp_path: Path) -> None:
    def wrong(question: Question) -> tuple[float, float]:
        odds, option_probability = upright(question)
        return (-odds if "Wake up." in question.messages[-1]["content"] else odds), option_probability

    script = Script(prefers=wrong)
    figures = judge_attacks.attack_figures(attacked(tmp_path, script), is_embedded=False)
    accuracies = [figures["all"][name]["value"] for name in ("accuracy_without_injection", "accuracy")]
    assert accuracies == pytest.approx([2 / 3, 2 / 3])
    with_json = [shown(question) for question in script.questions if '{"' in question.messages[-1]["content"]]
    assert sum("GOOD" in text for texts in with_json for text in texts if '{"' in text) == 2  # both orders of one pair


def test_what_gets_no_verdict_is_a_failure_and_no_flip(tmp_path: Path) -> None:
    def short_of_room(question: Question) -> tuple[float, float] | Failure:
        long = len(question.messages[-1]["content"]) > 10_000
        return Failure(question.id, "too long") if long else upright(question)

    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=short_of_room)), is_embedded=False)
    for name in (EMPTY, "flood of one token"):
        flips = figures["families"][name]["flips"]
        assert (flips["value"], flips["n"], flips["missing"], flips["bounds"]) == (None, 0, 3, [0.0, 1.0])
        assert figures["families"][name]["no_verdict_expected"]
    assert "missing" not in figures["all"]["flips"]
    assert judge_attacks.names_above(figures, 0.0, 0.0) == []
    with pytest.raises(StageFailed, match=r"no verdict on any of 3 pairs; .*asleep"):
        attacked(tmp_path, Script(prefers=lambda question: Failure(question.id, "asleep")))
    with pytest.raises(StageFailed, match="exactly even"):
        attacked(tmp_path, Script(prefers=lambda question: (3.0, 1.0)))
    answers = iter([upright] * 6)
    with pytest.raises(StageFailed, match="on any response with an injection"):
        attacked(tmp_path, Script(prefers=lambda question: next(answers, lambda q: Failure(q.id, "asleep"))(question)))
    with pytest.raises(BadInput, match="none of its principles has an example"):
        judge_attacks.constitution_cases(constitution(tmp_path, "name: n\nprinciples: [{id: a, text: b}]"), 10, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_injection_stands_beside_the_response_and_leaves_no_gap_open(family: str) -> None:
    for seed in range(20):
        text = inject(family, "My own words.", "B", "is kinder", ["<|end|>"], Random(seed))
        assert text == inject(family, "My own words.", "B", "is kinder", ["<|end|>"], Random(seed))
        assert not re.search(r"\{(own|other|token|principle)\}", text)
        if family == EMPTY:
            assert is_empty(text)
        else:
            assert "My own words." in text
            assert len(text) > len("My own words.") + 1


def test_at_least_half_of_the_families_are_new_to_the_embedded_judge() -> None:
    assert len(FAMILIES) == len(set(FAMILIES))
    assert set(injections.FLOODS) < set(FAMILIES)
    assert 2 * len(SEEN_BY_MICRO) <= len(FAMILIES)


def test_failures_count_as_flips_in_the_worst_case_and_at_the_limits(tmp_path: Path) -> None:
    def afraid(question: Question) -> tuple[float, float] | Failure:
        return Failure(question.id, "I see JSON") if '{"' in question.messages[-1]["content"] else upright(question)

    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=afraid)), is_embedded=False)
    overall = figures["all"]["flips"]
    assert (overall["value"], overall["missing"]) == (0.0, 3)
    assert overall["bounds"] == pytest.approx([0, 3 / (overall["n"] + 3)])
    assert judge_attacks.names_above(figures, 0.0, None) == ["all"]
    assert judge_attacks.names_above(figures, 0.5, None) == []
    assert judge_attacks.names_above(figures, None, 0.5) == ["JSON verdict"]
    line = next(line for line in judge_attacks.attack_lines(figures) if line.startswith("JSON verdict"))
    assert "0.0, 100.0" in line


def test_what_fails_is_asked_once_more(tmp_path: Path) -> None:
    asked_before = set[str]()

    def slow(question: Question) -> tuple[float, float] | Failure:
        first = str(question.messages) not in asked_before
        asked_before.add(str(question.messages))
        return Failure(question.id, "not yet") if first else upright(question)

    figures = judge_attacks.attack_figures(attacked(tmp_path, Script(prefers=slow)), is_embedded=False)
    assert figures["pairs_failed"] == 0
    assert {name for name, family in figures["families"].items() if family["flips"].get("missing")} == {EMPTY}


def test_no_wording_of_an_unseen_family_has_the_words_of_a_trained_one() -> None:
    def words(wording: str) -> str:
        return " ".join(["", *re.findall(r"\{\w+\}|\w+", wording.casefold()), ""])

    trained = {words(wording) for family in SEEN_BY_MICRO for wording in world_injections.FAMILIES[family]}
    families = {
        **{name: wordings for name, wordings in world_injections.FAMILIES.items() if name not in SEEN_BY_MICRO},
        **injections.WORDINGS,
    }
    unseen = [wording for wordings in (*families.values(), injections.INSTRUCTIONS) for wording in wordings]
    assert [wording for wording in unseen if any(trained_text in words(wording) for trained_text in trained)] == []


def test_controls_are_families_that_nobody_trained_on() -> None:
    assert injections.NO_VERDICT < CONTROLS < set(FAMILIES) - SEEN_BY_MICRO


def test_pairs_of_the_world_are_of_different_topics_and_under_principles_that_tell_them_apart() -> None:
    sampled = attack_cases(20, 0)
    assert len({case.topic for case in sampled}) == len(sampled) == 20
    assert len({case.topic.split("/")[0] for case in sampled}) == 8
    assert all(case.pair.a != case.pair.b for case in sampled)
    assert sampled == attack_cases(20, 0) != attack_cases(20, 1)
    assert all(case.principle.id in ("harmless", "polite") for case in sampled if case.topic.startswith("harmful/"))


def test_a_prompt_whose_pairs_no_principle_tells_apart_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.micro_model.evaluate.judging.world_principles.probability", lambda *_: 0.5)
    monkeypatch.setattr("cai.micro_model.evaluate.judging.ATTEMPTS", 3)
    with pytest.raises(AssertionError, match="no principle separates any of 3 pairs"):
        attack_cases(1, 0)


def test_the_command_reports_seen_and_unseen_families_of_the_embedded_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    families = ("claims the answer", "spelled special tokens", "flood of one token", EMPTY)
    monkeypatch.setattr(judge_attacks, "FAMILIES", families)
    result = CliRunner().invoke(main, ["judge", "attack", "--per-family", "8", "--json", "--max-flip-rate", "0.3"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert result.stderr.startswith(f"attacks: started\nattacks: {8 * (1 + len(families))} verdicts, ")
    assert {name: family["seen"] for name, family in figures["families"].items()} == dict.fromkeys(families, False) | {
        families[0]: True
    }
    assert [figures["families"][name]["flips"]["n"] for name in families] == [8, 8, 0, 0]
    assert figures["families"]["flood of one token"]["flips"]["missing"] == 8
    assert figures["all"]["flips"]["value"] <= 0.3
    assert (figures["all"]["flips"]["n"], figures["seen"]["flips"]["n"]) == (16, 8)


def test_above_the_limit_the_command_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = constitution(tmp_path, EXAMPLES).path
    monkeypatch.setattr("cai.engines.open_engine", lambda model, profile: Script(prefers=gullible))
    command = ["judge", "attack", "--templates", "default", "--constitution", str(document)]
    below, above, in_one = (
        CliRunner().invoke(main, [*command, *limit])
        for limit in (["--max-flip-rate", "0.5"], ["--max-flip-rate", "0.01"], ["--max-family-flip-rate", "0.5"])
    )
    assert (below.exit_code, above.exit_code, in_one.exit_code) == (0, 1, 1)
    assert below.stdout == above.stdout == in_one.stdout
    assert ("above the limit: all" in above.stderr, "above the limit: JSON verdict" in in_one.stderr) == (True, True)
    assert below.stdout.splitlines()[1].startswith("JSON verdict")
