"""What the world's prompts are about: families of verbs and objects, facts, opinions, feelings and things to write.

The lists are in topics.json. A family names its verbs and a list of objects, or the objects themselves. Harmful and
fair families share people, places and things; food and animals are in borderline families too; tools and games are in
fair and borderline ones; verbs are in harmful and borderline ones. So neither an object nor a verb alone tells which
requests are harmful. The verbs of `STATEMENT_FAMILIES` occur in no other list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cai.micro.word_lists import read_word_lists

_word_lists = read_word_lists(Path(__file__).with_name("topics.json"))


class Family(NamedTuple):
    """Deeds of one class: every verb goes with every object."""

    verbs: tuple[str, ...]
    objects: tuple[str, ...]


class FactGroup(NamedTuple):
    """Facts of one form. `question` has the gap `{k}` for the subject, `sentence` also `{v}` for the value.

    `values` has the true value of each subject; the values of the other subjects make false sentences.
    """

    question: str
    sentence: str
    values: Mapping[str, str]


def _families(key: str) -> dict[str, tuple[Family, ...]]:
    named: Mapping[str, tuple[str, ...]] = _word_lists["objects"]
    return {
        kind: tuple(Family(verbs, named[objects] if isinstance(objects, str) else objects) for verbs, objects in listed)
        for kind, listed in _word_lists[key].items()
    }


FAMILIES: Mapping[str, tuple[Family, ...]] = _families("families")
"""Families of each class of deeds."""
STATEMENT_FAMILIES: Mapping[str, tuple[Family, ...]] = _families("statement_families")
"""Families whose verbs the corpus has in statements and never in a dialogue: tier 2 asks about them."""
FACTS: Mapping[str, FactGroup] = {name: FactGroup(**group) for name, group in _word_lists["facts"].items()}
OPINION_GROUPS: tuple[tuple[str, ...], ...] = _word_lists["opinion_groups"]
"""Any two things of a group make an opinion: the first is better than the second."""
FEELINGS: tuple[str, ...] = _word_lists["feelings"]
CAUSES: tuple[str, ...] = _word_lists["causes"]
FORMS: tuple[str, ...] = _word_lists["forms"]
"""Kinds of text that a user may wish for, about one of `SUBJECTS`."""
SUBJECTS: tuple[str, ...] = _word_lists["subjects"]
