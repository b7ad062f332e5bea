"""Weaknesses of valid documents: principles that cannot be tested, told apart or applied.

An example contradicts others of its principle where together they rank responses to one prompt in a circle, as two with
`better` and `worse` exchanged do. A response may well be better for one prompt and worse for another.

Each weakness is one sentence with the location of the principle. Left out: whether a judge follows the principle, which
`cai constitution test` measures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher

from cai.constitution.compiled import Constitution, Principle
from cai.storage.rows import HELD_OUT, TOPIC
from cai.text.errors import did_you_mean
from cai.text.formatting import printable, shorten

ALIKE = 0.9
"""Ratio of matching words (Ratcliff and Obershelp 1988) from which two texts count as the same."""

_NO_CRITERION = frozenset(
    re.findall(
        r"[\w']+",
        """a an and answer answers assistant assistant's better best bad choose choice chosen compare completion do does
        following for from good give gives given human in is it its most more of on one or pick please preferable prefer
        preferred question reply replies response responses right say select should that the them these this to two user
        user's what which with would you your""",
    )
)
"""Words that ask for a choice between two responses without saying by which criterion."""


_AUXILIARIES = frozenset(
    re.findall(
        r"[\w']+",
        """am are aren't can can't could couldn't did didn't do does doesn't don't had has hasn't have haven't is isn't
        may might must shall should shouldn't was wasn't were weren't will won't would wouldn't""",
    )
)
"""Words that a question which is answered by yes or no begins with."""
_BOTH_RESPONSES = re.compile(r"\b(a|first|1|the one|this)\b.*\bor\b.*\b(b|second|2|the other|that)\b")
"""A question that names both responses is answered by one of them, whatever it begins with."""


def weaknesses(constitution: Constitution, prompt_tags: Iterable[str] = ()) -> Iterator[str]:
    """The weaknesses of each principle, then those of tags, then the pairs of principles that read the same.

    Tags of prompts are known if they are among `prompt_tags`, or prompts of the embedded world have them.
    """
    for principle in constitution.principles:
        for weakness in _weaknesses_of(principle):
            yield _sentence(principle, weakness)
    yield from _weaknesses_of_tags(constitution, list(prompt_tags))
    for earlier, later in itertools.combinations(constitution.principles, 2):
        for field in ("text", "compare"):
            if _reads_the_same(getattr(earlier, field), getattr(later, field)):
                yield _sentence(later, f"`{field}` reads the same as that of {earlier.id!r}")
                break


def _weaknesses_of(principle: Principle) -> Iterator[str]:
    if not principle.examples:
        yield "has no example, expected one at least, so that it can be tested"
    if _NO_CRITERION.issuperset(_words(principle.compare)):
        yield f"`compare` names no criterion: {shorten(repr(principle.compare), 80)}"
    if _is_yes_no_question(principle.compare):
        question = shorten(repr(principle.compare), 80)
        yield f"`compare` is answered by yes or no, expected a choice such as 'Which response ...?': {question}"
    for number, example in enumerate(principle.examples, 1):
        if example.better.split() == example.worse.split():
            yield f"in example {number} `better` and `worse` are the same text"
    for numbers in _contradicting_examples(principle):
        examples = " and ".join(map(str, numbers))
        yield f"examples {examples} contradict each other: they rank responses to one prompt in a circle"


def _is_yes_no_question(text: str) -> bool:
    """Whether the question that `text` ends with is answered by yes or no instead of by one of two responses."""
    questions = re.findall(r"[^.?!;:]*\?", text)
    if not questions or {"which", "what", "who", "whose"}.intersection(_words(text)):
        return False
    begins_with_auxiliary = any(_AUXILIARIES.intersection(_words(part)[:1]) for part in questions[-1].split(","))
    return begins_with_auxiliary and not _BOTH_RESPONSES.search(" ".join(_words(questions[-1])))


def _contradicting_examples(principle: Principle) -> list[list[int]]:
    """The examples, by number from 1, of each circle in which a response to one prompt is better than itself."""
    numbers_by_prompt: dict[tuple[tuple[str, str], ...], dict[tuple[str, str], int]] = {}
    for number, example in enumerate(principle.examples, 1):
        prompt = tuple((role, " ".join(content.split())) for role, content in example.messages)
        pair = " ".join(example.better.split()), " ".join(example.worse.split())
        if pair[0] != pair[1]:
            numbers_by_prompt.setdefault(prompt, {}).setdefault(pair, number)
    circles: list[list[int]] = []
    for number_by_pair in numbers_by_prompt.values():
        while circle := _circle(list(number_by_pair)):
            circles.append(sorted(number_by_pair.pop(pair) for pair in circle))
    return circles


def _circle(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A shortest circle of (better, worse) pairs; empty where there is none."""
    for first in pairs:
        paths = [[first]]
        reached = {first[1]}
        for path in paths:
            if path[-1][1] == first[0]:
                return path
            for pair in pairs:
                if pair[0] == path[-1][1] and pair[1] not in reached:
                    reached.add(pair[1])
                    paths.append([*path, pair])
    return []


def _weaknesses_of_tags(constitution: Constitution, prompt_tags: list[str]) -> Iterator[str]:
    """Tags of prompts that no known prompt has, and tags that differ from an earlier tag in upper and lower case."""
    from cai.micro.conversations import TAGS

    known_tags = list(dict.fromkeys([*prompt_tags, *TAGS, HELD_OUT]))
    first_spellings: dict[str, tuple[str, str]] = {}
    for principle in constitution.principles:
        for key, tags in (("tags", principle.tags), ("applies_to", principle.applies_to or ())):
            for tag in tags:
                spelling, user = first_spellings.setdefault(tag.lower(), (tag, principle.id))
                if spelling != tag:
                    yield _sentence(
                        principle, f"`{key}` has {tag!r}, which differs from {spelling!r} of {user!r} in case alone"
                    )
        for tag in principle.applies_to or ():
            if tag not in known_tags and not tag.startswith(TOPIC):
                hint = did_you_mean(tag.lower(), known_tags) or "; name your prompts' tags with --tags or --recipe"
                yield _sentence(principle, f"`applies_to` has {tag!r}, a tag that no known prompt has{hint}")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def _reads_the_same(text_a: str, text_b: str) -> bool:
    return SequenceMatcher(None, _words(text_a), _words(text_b), autojunk=False).ratio() >= ALIKE


def _sentence(principle: Principle, weakness: str) -> str:
    return printable(f"{principle.location}: {principle.id!r}: {weakness}")
