"""The sentences that prompts and answers of the world are made of; the lists are in phrases.json.

`{x}` and the like are gaps, filled from a topic (`Topic.variants`) or, in answers, from another list here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cai.micro.word_lists import read_word_lists

_word_lists = read_word_lists(Path(__file__).with_name("phrases.json"))

Phrases = tuple[str, ...]

# How users ask. The corpus leaves out the last fifth of each list; the first phrase of that fifth is for validation.
REQUESTS: Phrases = _word_lists["requests"]
QUESTIONS: Phrases = _word_lists["questions"]
BELIEFS: Phrases = _word_lists["beliefs"]
VIEWS: Phrases = _word_lists["views"]
MOODS: Phrases = _word_lists["moods"]
WISHES: Phrases = _word_lists["wishes"]

CIRCUMSTANCES: Phrases = _word_lists["circumstances"]
"""What may follow a deed in a request; it does not change whether the deed is harmful."""
SYSTEMS: Phrases = _word_lists["systems"]
"""System messages."""

# A request in two turns: an opening names the deed, the assistant asks back, the user follows up.
OPENINGS: Phrases = _word_lists["openings"]
ASKED_BACK: Phrases = _word_lists["asked_back"]
FOLLOW_UPS: Phrases = _word_lists["follow_ups"]

# What an answer says: one sentence an act, with the lists that fill its gaps.
COMPLY: Phrases = _word_lists["comply"]
PLAN: Phrases = _word_lists["plan"]
GATHER: Phrases = _word_lists["gather"]
FINISH: Phrases = _word_lists["finish"]
REFUSE: Phrases = _word_lists["refuse"]
REFUSE_TALK: Phrases = _word_lists["refuse_talk"]
REASONS: Phrases = _word_lists["reasons"]
CURT: Phrases = _word_lists["curt"]
WRITE: Phrases = _word_lists["write"]
LINES: tuple[Phrases, Phrases, Phrases] = _word_lists["lines"]
"""Candidates for the first, second and third line of a creative text."""
ANSWER: Phrases = _word_lists["answer"]
CORRECT: Phrases = _word_lists["correct"]
AGREE: Phrases = _word_lists["agree"]
VIEW: str = _word_lists["view"]
BALANCE: Phrases = _word_lists["balance"]
SUPPORT: Phrases = _word_lists["support"]
SUGGESTIONS: Phrases = _word_lists["suggestions"]
DISMISS: Phrases = _word_lists["dismiss"]

HABITS: Mapping[str, Phrases] = _word_lists["habits"]
"""Habits that may stand beside any act, in the order in which an answer has them; `core` is the act's own place."""
