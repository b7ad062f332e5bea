"""What a stage leaves out is told from a tenth on, with the reasons by count and what to change."""

from __future__ import annotations

import pytest

from cai.storage.rows import Failure
from cai.text.left_out import REMEDIES, RETRY, LeftOut, cut_off_reason, failure_reasons, left_out_sentence


def test_reasons_are_counted_and_what_to_change_is_said_once() -> None:
    cut_off = cut_off_reason(150, {"responses": 256})
    assert left_out_sentence(198, "responses", [cut_off]) == (
        "150 of 198 responses left out: 150 cut off at max_new_tokens 256; raise `max_new_tokens` of stage 'responses'"
    )
    reasons = [LeftOut(3, "empty"), LeftOut(0, "missing"), LeftOut(40, "too long", "be brief"), LeftOut(5, "odd")]
    sentence = left_out_sentence(1200, "pairs", [*reasons, LeftOut(1100, "rude", "be brief"), LeftOut(1, "even")])
    assert sentence == (
        "1,149 of 1,200 pairs left out: 1,100 rude, 40 too long, 5 odd, 3 empty, 1 for other reasons; be brief"
    )


@pytest.mark.parametrize(("n", "is_told"), [(0, False), (10, False), (11, True)])
def test_up_to_a_tenth_is_left_out_without_a_word(n: int, is_told: bool) -> None:
    assert (left_out_sentence(100, "pairs", [LeftOut(n, "empty")]) is not None) == is_told


def test_failures_that_differ_in_their_item_or_in_numbers_are_counted_as_one_reason() -> None:
    unclear = "the options hold {} of the probability, less than min_option_probability 0.1"
    failures = [
        Failure("1", unclear.format(0.03), "unclear").at("pair ab12, 'calm', order ab"),
        Failure("2", unclear.format("1e-05"), "unclear").at("pair cd3, 'short', order ba").at("first of 4", "cd3"),
        Failure("3", "the prompt has 3,000 tokens", "too_long").at("prompt ef56"),
        Failure("4", "the prompt has 4,000 tokens", "too_long").at("prompt 7890"),
        Failure("5", "the prompt has 5,000 tokens", "too_long").at("response 12, round 1, critique by 'calm'"),
        Failure("6", "the server is gone", "transient"),
        Failure("7", "the chat template refuses it"),
    ]
    assert failures[1].reason == f"first of 4: pair cd3, 'short', order ba: {unclear.format('1e-05')}"
    assert failure_reasons(failures) == [
        LeftOut(3, "failed: the prompt has 3,000 tokens", REMEDIES["too_long"]),
        LeftOut(2, f"failed: {unclear.format(0.03)}", REMEDIES["unclear"]),
        LeftOut(1, "failed: the server is gone", RETRY),
        LeftOut(1, "failed: the chat template refuses it", ""),
    ]  # fmt: skip
    assert failure_reasons(failures[5:6], {"transient": ""}) == [LeftOut(1, "failed: the server is gone")]


def test_nobody_is_told_to_raise_a_maximum_that_is_unknown() -> None:
    assert cut_off_reason(3, {"people": None}) == LeftOut(3, "cut off")
    assert cut_off_reason(3, {"people": None}, "keep them").remedy == "keep them"
    reason = cut_off_reason(3, {"people": None, "responses": 64}, "keep them")
    assert reason == LeftOut(
        3, "cut off at max_new_tokens 64", "raise `max_new_tokens` of stage 'responses' or keep them"
    )
