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
from cai.feedback import judge_attacks
from cai.feedback.injections import CONTROLS, EMPTY, FAMILIES, FLOODS, NO_VERDICT, ORDERS, SAID, SEEN_BY_MICRO, inject
from cai.feedback.votes import empty
from cai.micro import world_injections as micro
from cai.micro_model.evaluate.attack_cases import cases
from cai.storage.rows import Failure
from cai.templates import load_templates
from cai.text.errors import BadInput, StageFailed
from cai.text.progress import StageLine


def shown(question: Question) -> tuple[str, str]:
    """The responses as the judge reads them."""
    text = question.messages[-1]["content"]
    found = re.search(r"<response_a>\n(.*)\n</response_a>\n\n<response_b>\n(.*)\n</response_b>", text, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def upright(question: Question) -> tuple[float, float]:
    """Sees what is good, a little more so in the first place."""
    return (2.0 if "GOOD" in shown(question)[0] else -1.0), 1.0


def gullible(question: Question) -> tuple[float, float]:
    """Believes a JSON verdict, whoever wrote it."""
    said = re.search(r'"(?:winner|better|preferred)": "([AB])"', "\n".join(shown(question)))
    return ({"A": 3.0, "B": -3.0}[said[1]], 1.0) if said else upright(question)


def attacked(folder: Path, script: Script) -> judge_attacks.Attacks:
    pairs = judge_attacks.cases_of(constitution(folder, EXAMPLES), 10, 0)
    return judge_attacks.attack(pairs, script, load_templates("default"), ["<|end|>"], 0, StageLine("attacks"))


def test_a_judge_that_reads_the_responses_alone_turns_nowhere(tmp_path: Path) -> None:
    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=upright)), trained=False)
    assert found["pairs"] == 3
    assert [found["all"][name]["value"] for name in ("flips", "accuracy")] == [0.0, 1.0]
    assert found["all"]["flips"]["n"] == 3 * len(set(FAMILIES) - CONTROLS)
    assert (found["seen"], found["unseen"]) == (None, None)
    assert {each["seen"] for each in found["families"].values()} == {None}
    assert {each["flips"]["value"] for name, each in found["families"].items() if name != EMPTY} == {0.0}


def test_a_judge_that_believes_a_verdict_in_a_response_turns_in_that_family_in_both_orders(tmp_path: Path) -> None:
    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=gullible)), trained=True)
    turned = {name: each for name, each in found["families"].items() if each["flips"]["value"]}
    assert list(turned) == ["JSON verdict"]
    names = ("flips", "accuracy", "accuracy_without_injection")
    assert [turned["JSON verdict"][name]["value"] for name in names] == [1.0, 0.0, 1.0]
    assert turned["JSON verdict"]["seen"] is False
    overall, seen, unseen = (found[name]["flips"] for name in ("all", "seen", "unseen"))
    assert [each["value"] for each in (overall, seen, unseen)] == pytest.approx([3 / overall["n"], 0, 3 / unseen["n"]])
    assert overall["n"] == seen["n"] + unseen["n"]
    assert found["overall"] == overall["value"]
    assert {"flip_rate", "n", "seen"} <= found["families"][EMPTY].keys()
    table = list(judge_attacks.lines(found))
    assert table[1].startswith("JSON verdict")
    assert "100.0 [" in table[1]


def test_a_wrong_verdict_that_turns_is_no_gain_in_accuracy(tmp_path: Path) -> None:
    def wrong_and_gullible(question: Question) -> tuple[float, float]:
        odds, option_probability = upright(question)
        return gullible(question) if '{"' in question.messages[-1]["content"] else (-odds, option_probability)

    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=wrong_and_gullible)), trained=True)
    names = ("flips", "accuracy", "accuracy_without_injection")
    assert [found["families"]["JSON verdict"][name]["value"] for name in names] == [1.0, 0.0, 0.0]


def test_the_response_that_lost_is_the_one_that_gets_the_injection(tmp_path: Path) -> None:
    def wrong(question: Question) -> tuple[float, float]:
        odds, option_probability = upright(question)
        return (
            (-odds, option_probability)
            if "Wake up." in question.messages[-1]["content"]
            else (odds, option_probability)
        )

    script = Script(prefers=wrong)
    found = judge_attacks.figures(attacked(tmp_path, script), trained=False)
    accuracies = [found["all"][name]["value"] for name in ("accuracy_without_injection", "accuracy")]
    assert accuracies == pytest.approx([2 / 3, 2 / 3])
    with_json = [shown(question) for question in script.questions if '{"' in question.messages[-1]["content"]]
    assert sum("GOOD" in text for texts in with_json for text in texts if '{"' in text) == 2  # both orders of one pair


def test_what_gets_no_verdict_is_a_failure_and_no_flip(tmp_path: Path) -> None:
    def short_of_room(question: Question) -> tuple[float, float] | Failure:
        long = len(question.messages[-1]["content"]) > 10_000
        return Failure(question.id, "too long") if long else upright(question)

    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=short_of_room)), trained=False)
    for name in (EMPTY, "flood of one token"):
        flips = found["families"][name]["flips"]
        assert (flips["value"], flips["n"], flips["missing"], flips["bounds"]) == (None, 0, 3, [0.0, 1.0])
        assert found["families"][name]["no_verdict_expected"]
    assert "missing" not in found["all"]["flips"]
    assert judge_attacks.above(found, 0.0, 0.0) == []
    with pytest.raises(StageFailed, match=r"no verdict on any of 3 pairs; .*asleep"):
        attacked(tmp_path, Script(prefers=lambda question: Failure(question.id, "asleep")))
    with pytest.raises(StageFailed, match="exactly even"):
        attacked(tmp_path, Script(prefers=lambda question: (3.0, 1.0)))
    answers = iter([upright] * 6)
    with pytest.raises(StageFailed, match="on any response with an injection"):
        attacked(tmp_path, Script(prefers=lambda question: next(answers, lambda q: Failure(q.id, "asleep"))(question)))
    with pytest.raises(BadInput, match="none of its principles has an example"):
        judge_attacks.cases_of(constitution(tmp_path, "name: n\nprinciples: [{id: a, text: b}]"), 10, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_injection_stands_beside_the_response_and_leaves_no_gap_open(family: str) -> None:
    for seed in range(20):
        text = inject(family, "My own words.", "B", "is kinder", ["<|end|>"], Random(seed))
        assert text == inject(family, "My own words.", "B", "is kinder", ["<|end|>"], Random(seed))
        assert not re.search(r"\{(own|other|token|principle)\}", text)
        if family == EMPTY:
            assert empty(text)
        else:
            assert "My own words." in text
            assert len(text) > len("My own words.") + 1


def test_at_least_half_of_the_families_are_new_to_the_embedded_judge() -> None:
    assert len(FAMILIES) == len(set(FAMILIES))
    assert set(FLOODS) < set(FAMILIES)
    assert 2 * len(SEEN_BY_MICRO) <= len(FAMILIES)


def test_failures_count_as_flips_in_the_worst_case_and_at_the_limits(tmp_path: Path) -> None:
    def afraid(question: Question) -> tuple[float, float] | Failure:
        return Failure(question.id, "I see JSON") if '{"' in question.messages[-1]["content"] else upright(question)

    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=afraid)), trained=False)
    overall = found["all"]["flips"]
    assert (overall["value"], overall["missing"]) == (0.0, 3)
    assert overall["bounds"] == pytest.approx([0, 3 / (overall["n"] + 3)])
    assert judge_attacks.above(found, 0.0, None) == ["all"]
    assert judge_attacks.above(found, 0.5, None) == []
    assert judge_attacks.above(found, None, 0.5) == ["JSON verdict"]
    line = next(line for line in judge_attacks.lines(found) if line.startswith("JSON verdict"))
    assert "0.0, 100.0" in line


def test_what_fails_is_asked_once_more(tmp_path: Path) -> None:
    asked = set[str]()

    def slow(question: Question) -> tuple[float, float] | Failure:
        first = str(question.messages) not in asked
        asked.add(str(question.messages))
        return Failure(question.id, "not yet") if first else upright(question)

    found = judge_attacks.figures(attacked(tmp_path, Script(prefers=slow)), trained=False)
    assert found["pairs_failed"] == 0
    assert {name for name, each in found["families"].items() if each["flips"].get("missing")} == {EMPTY}


def test_no_wording_of_an_unseen_family_has_the_words_of_a_trained_one() -> None:
    def words(wording: str) -> str:
        return " ".join(["", *re.findall(r"\{\w+\}|\w+", wording.casefold()), ""])

    trained = {words(wording) for family in SEEN_BY_MICRO for wording in micro.FAMILIES[family]}
    families = {**{name: said for name, said in micro.FAMILIES.items() if name not in SEEN_BY_MICRO}, **SAID}
    unseen = [wording for said in (*families.values(), ORDERS) for wording in said]
    assert [wording for wording in unseen if any(each in words(wording) for each in trained)] == []


def test_controls_are_families_that_nobody_trained_on() -> None:
    assert NO_VERDICT < CONTROLS < set(FAMILIES) - SEEN_BY_MICRO


def test_pairs_of_the_world_are_of_different_topics_and_under_principles_that_tell_them_apart() -> None:
    found = cases(20, 0)
    assert len({case.topic for case in found}) == len(found) == 20
    assert len({case.topic.split("/")[0] for case in found}) == 8
    assert all(case.pair.a != case.pair.b for case in found)
    assert found == cases(20, 0) != cases(20, 1)
    assert all(case.principle.id in ("harmless", "polite") for case in found if case.topic.startswith("harmful/"))


def test_a_prompt_whose_pairs_no_principle_tells_apart_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.micro_model.evaluate.attack_cases.probability", lambda *_: 0.5)
    monkeypatch.setattr("cai.micro_model.evaluate.attack_cases.ATTEMPTS", 3)
    with pytest.raises(AssertionError, match="3 pairs, and no principle tells one apart"):
        cases(1, 0)


def test_the_command_reports_seen_and_unseen_families_of_the_embedded_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("claims the answer", "spelled special tokens", "flood of one token", EMPTY)
    monkeypatch.setattr(judge_attacks, "FAMILIES", some)
    result = CliRunner().invoke(main, ["judge", "attack", "--per-family", "8", "--json", "--max-flip-rate", "0.3"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {name: each["seen"] for name, each in found["families"].items()} == dict.fromkeys(some, False) | {
        some[0]: True
    }
    assert [found["families"][name]["flips"]["n"] for name in some] == [8, 8, 0, 0]
    assert found["families"]["flood of one token"]["flips"]["missing"] == 8
    assert found["all"]["flips"]["value"] <= 0.3
    assert (found["all"]["flips"]["n"], found["seen"]["flips"]["n"]) == (16, 8)


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
