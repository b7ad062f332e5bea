"""What a stage leaves out is told from a tenth on, with the reasons by count and what to change."""

from __future__ import annotations

import pytest

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
    reasons = [
        f"pair ab12, 'calm', order ab: {unclear.format(0.03)}",
        f"no principle was answered in both orders; first of 4: pair cd3, 'short', order ba: {unclear.format('1e-05')}",
        "prompt ef56: the prompt has 3,000 tokens",
        "prompt 7890: the prompt has 4,000 tokens",
        "response 12, round 1, critique by 'calm': the prompt has 5,000 tokens",
        "the server is gone",
    ]
    assert failure_reasons(reasons) == [
        LeftOut(3, "failed: the prompt has 3,000 tokens", RETRY),
        LeftOut(2, f"failed: {unclear.format(0.03)}", REMEDIES["min_option_probability"]),
        LeftOut(1, "failed: the server is gone", RETRY),
    ]  # fmt: skip
