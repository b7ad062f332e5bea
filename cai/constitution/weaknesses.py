"""What makes a document weak without being wrong: principles that nobody can test, tell apart or apply.

Each weakness is one sentence with the place of the principle. Left out: whether a judge follows the principle (`cai
constitution test` asks one).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from difflib import SequenceMatcher

from cai.constitution.compiled import Constitution, Principle
from cai.text.formatting import printable, shorten

ALIKE = 0.9
"""Share of words in common, in order, from which two texts read the same (Ratcliff and Obershelp 1988)."""

_NO_CRITERION = frozenset(
    re.findall(
        r"[\w']+",
        """a an and answer answers assistant assistant's better best bad choose choice chosen compare completion do does
        following for from good give gives given human in is it its most more of on one or pick please preferable prefer
        preferred question reply replies response responses right say select should that the them these this to two user
        user's what which with would you your""",
    )
)
"""Words that say that one of two is to be chosen, and nothing about why."""


def weaknesses(constitution: Constitution) -> Iterator[str]:
    """Every weakness, principle by principle, then the pairs that read the same."""
    for principle in constitution.principles:
        if not principle.examples:
            yield _said(principle, "has no example, expected one at least, so that it can be tested")
        if _NO_CRITERION.issuperset(_words(principle.compare)):
            yield _said(principle, f"`compare` names no criterion: {shorten(repr(principle.compare), 80)}")
        for number, example in enumerate(principle.examples, 1):
            if " ".join(example.better.split()) == " ".join(example.worse.split()):
                yield _said(principle, f"in example {number} `better` and `worse` are the same text")
    for one, other in itertools.combinations(constitution.principles, 2):
        for field in ("text", "compare"):
            if _alike(getattr(one, field), getattr(other, field)):
                yield _said(other, f"`{field}` reads the same as that of {one.id!r}")
                break


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def _alike(one: str, other: str) -> bool:
    return SequenceMatcher(None, _words(one), _words(other), autojunk=False).ratio() >= ALIKE


def _said(principle: Principle, what: str) -> str:
    return printable(f"{principle.where}: {principle.id!r}: {what}")
