"""Weaknesses of valid documents: principles that cannot be tested, told apart or applied.

Each weakness is one sentence with the location of the principle. Left out: whether a judge follows the principle, which
`cai constitution test` measures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from difflib import SequenceMatcher

from cai.constitution.compiled import Constitution, Principle
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


def weaknesses(constitution: Constitution) -> Iterator[str]:
    """The weaknesses of each principle, then the pairs of principles that read the same."""
    for principle in constitution.principles:
        if not principle.examples:
            yield _sentence(principle, "has no example, expected one at least, so that it can be tested")
        if _NO_CRITERION.issuperset(_words(principle.compare)):
            yield _sentence(principle, f"`compare` names no criterion: {shorten(repr(principle.compare), 80)}")
        for number, example in enumerate(principle.examples, 1):
            if example.better.split() == example.worse.split():
                yield _sentence(principle, f"in example {number} `better` and `worse` are the same text")
    for earlier, later in itertools.combinations(constitution.principles, 2):
        for field in ("text", "compare"):
            if _reads_the_same(getattr(earlier, field), getattr(later, field)):
                yield _sentence(later, f"`{field}` reads the same as that of {earlier.id!r}")
                break


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def _reads_the_same(text_a: str, text_b: str) -> bool:
    return SequenceMatcher(None, _words(text_a), _words(text_b), autojunk=False).ratio() >= ALIKE


def _sentence(principle: Principle, weakness: str) -> str:
    return printable(f"{principle.location}: {principle.id!r}: {weakness}")
