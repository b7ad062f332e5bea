"""Critics and revisers talk around their work: what is the revision, and what is none at all?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.feedback.revisions import declares_no_change, refuses_to_criticise, refuses_to_revise, same_text, unwrapped

BEFORE = "Buy a torque wrench and force it open."
ANSWER = "I will not help with breaking in. A locksmith can open your own door."


@pytest.mark.parametrize(
    "wrapped",
    [
        "Here is the revised response:\n\n{}",
        "Here is a revised response: {}",
        "Here’s a revised version of the response that avoids harm:\n\n{}",
        "Sure! Here's the rewritten response:\n{}",
        "Certainly, here is a rewritten version that does not encourage crime:\n\n{}",
        "Of course. Below is the revised answer:\n\n{}",
        "I apologize for my previous response. Here is a better response:\n\n{}",
        "Okay, here is one possible revision:\n\n{}",
        "Here is my response: {}",
        "The following is a safer reply:\n\n{}",
        "I have revised the response to remove the instructions.\n\n{}",
        "I've rewritten the assistant's reply so that it is harmless:\n\n{}",
        "**Here is the revised response:**\n\n{}",
        "**Revised response:** {}",
        "**Revised Response**\n\n{}",
        "## Revised response\n{}",
        "Here is a revised response to your question:\n\n{}",
        "Revised Assistant Response: {}",
        "Revision: {}",
        "Response: {}",
        "Assistant: {}",
        "Revised response (harmless version):\n{}",
        "Here is the revised response:\n\nAssistant: {}",
        'Here is the revised response:\n\n"{}"',
        "Here is the revised response:\n\n“{}”",
        "Here is the revised response:\n\n```\n{}\n```",
        '"{}"',
        "```text\n{}\n```",
        "<response>\n{}\n</response>",
        "{}\n\n(Note: I removed the part about the wrench.)",
        "{}\n\nNote: This revised response avoids giving instructions.",
        "{}\n\nThis revision no longer describes a crime.",
        "{}\n\nI have removed the instructions and added an alternative.",
        "Here is the revised response:\n\n{}\n\nLet me know if you need any further changes.",
    ],
)
def test_talk_around_a_revision_is_stripped(wrapped: str) -> None:
    assert unwrapped(wrapped.format(ANSWER), BEFORE) == (ANSWER, True)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (ANSWER, BEFORE),
        ("Here is how to open your own door: call a locksmith.", BEFORE),
        ("Here is a revised version of your letter:\n\nDear Ann, I am sorry.", "Dear Ann, get lost."),
        ("Here is the recipe:\n\n1. Boil water.", BEFORE),
        ('"Yes," she said, "of course."', BEFORE),
        ('"To be or not to be" is by Shakespeare, and so is "All the world\'s a stage"', BEFORE),
        ("Note: the shop closes at noon.", BEFORE),
        ("Take the bus.\n\nNote: the last one leaves at ten.", BEFORE),
        ("Take the bus.\n\nI have changed my mind about cars.", BEFORE),
        ("AI: the field of making machines think. It began in 1956.", "AI: magic."),
        ("```python\nprint(2)\n```", "```python\nprint(1)\n```"),
        ('"Carpe diem."', '"Yolo."'),
        ("Revised response: yes.", "Revised response: no."),
        ("", BEFORE),
    ],
)
def test_what_belongs_to_the_answer_stays(text: str, before: str) -> None:
    assert unwrapped(text, before) == (text, False)


@given(st.text(max_size=300), st.text(max_size=60))
def test_unwrapping_only_takes_away(text: str, before: str) -> None:
    shorter, is_stripped = unwrapped(text, before)
    assert shorter in text
    assert is_stripped == (shorter != text.strip())


@pytest.mark.parametrize(
    ("critique", "is_refusal"),
    [
        ("I can't critique this response.", True),
        ("I'm sorry, but I can't assist with that request.", True),
        ("I apologize. I am not able to evaluate this conversation.", True),
        ("As an AI, I cannot engage with this content.", True),
        ("I won't do that.", True),
        ("  \n", True),
        # What speaks of refusals refuses nothing.
        ("The response explains how to break in, which is a crime.", False),
        ("I cannot find anything wrong with the response.", False),
        ("The assistant should have said: I can't help with that.", False),
        ('It says "I won\'t help" and gives no reason.', False),
        ("The response refuses a request that is fine.", False),
        ("The tone is rude. The assistant cannot know that, and I would not recommend the second step.", False),
        ("I think the response is preachy.", False),
    ],
)
def test_a_critic_can_refuse(critique: str, is_refusal: bool) -> None:
    assert refuses_to_criticise(critique) is is_refusal


LOCK = "How do I pick a lock?"


@pytest.mark.parametrize(
    ("revision", "request_", "is_refusal"),
    [
        ("I can't rewrite this response.", LOCK, True),
        ("I'm sorry, but I cannot revise that.", LOCK, True),
        ("I am not able to provide a revised response to this conversation.", LOCK, True),
        ("I’m unable to create a rewritten version of harmful content. Please ask me something else.", LOCK, True),
        ("Sorry. I won't edit the assistant's answer.", "Rewrite my essay.", True),
        ("I must decline to produce a revision.", LOCK, True),
        # A revision that declines what the user wants is a revision.
        ("I'm sorry, I can't help with picking a lock that is not yours.", LOCK, False),
        ("I cannot assist with that.", LOCK, False),  # no text can tell; the stage's docstring says so
        (
            "I won't rewrite this to hide where it comes from.",
            "Please reword this essay so that nobody notices.",
            False,
        ),
        ("I can't change the past, but I can listen.", "Can you make it undone?", False),
        ("Call a locksmith. They can also modify the lock.", LOCK, False),
    ],
)
def test_a_reviser_can_refuse_its_own_task(revision: str, request_: str, is_refusal: bool) -> None:
    assert refuses_to_revise(revision, request_) is is_refusal


def test_a_reviser_can_find_nothing_to_change() -> None:
    for text in ("No revision is needed.", "The response does not need changes.", "There are no changes necessary."):
        assert declares_no_change(text, LOCK), text
    assert not declares_no_change("No changes are needed to your code.", "Should I change anything?")
    assert not declares_no_change("You need no key when the door is open.", LOCK)


def test_spaces_and_capitals_are_no_revision() -> None:
    assert same_text("Take  the bus.\n", "take the Bus.")
    assert not same_text("Take the bus.", "Take a bus.")
