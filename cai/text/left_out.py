"""What a stage leaves out of its input, as one sentence: how many items, why, and what to change.

    150 of 198 responses left out: 150 cut off at max_new_tokens 256; raise `max_new_tokens` of stage 'responses'

A stage says so where it is more than a tenth of what it was to use. Items that a recipe keeps out on purpose, such as
held-out prompts, are no part of either number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cai.text.formatting import shorten

SHARE_TO_REPORT = 0.1
"""Share of the input from which on leaving out is reported: more than this."""
MAX_REASONS = 4
"""Reasons that are named, the most frequent first."""
RETRY = "`cai run --retry-failures` asks again"
REMEDIES = {
    "min_option_probability": "name another `judge:`, or lower `min_option_probability` of its stage",
}
"""What to change where a failure's reason has these words."""

_PLACE = re.compile(r"^(?:no \w+ [^:;]*; first[^:]*: )?(?:(?:prompt|response|pair) [^:]*: )?")
"""Beginning of a failure's reason that names the item, and not why it failed."""
_NUMBER = re.compile(r"\d[\d.,]*(?:e-?\d+)?")


class LeftOut(NamedTuple):
    """Items that are left out for one reason."""

    n: int
    reason: str
    """Follows the number: "150 cut off at max_new_tokens 256"."""
    remedy: str = ""
    """What to change, as a request; empty where nothing helps."""


def left_out_sentence(n_input: int, unit: str, reasons: Iterable[LeftOut]) -> str | None:
    """The sentence about `n_input` items, called by `unit`; None where at most a tenth of them is left out."""
    reasons = sorted((reason for reason in reasons if reason.n), key=lambda reason: -reason.n)
    n_left_out = sum(reason.n for reason in reasons)
    if n_left_out <= SHARE_TO_REPORT * n_input:
        return None
    counts = [f"{reason.n:,} {reason.reason}" for reason in reasons[:MAX_REASONS]]
    if n_others := sum(reason.n for reason in reasons[MAX_REASONS:]):
        counts.append(f"{n_others:,} for other reasons")
    remedies = dict.fromkeys(reason.remedy for reason in reasons[:MAX_REASONS] if reason.remedy)
    return "; ".join([f"{n_left_out:,} of {n_input:,} {unit} left out: {', '.join(counts)}", *remedies])


def cut_off_reason(n: int, max_new_tokens: Mapping[str, int | None], or_else: str = "") -> LeftOut:
    """`n` responses without an end, from stages with these maxima of tokens; `or_else` is another remedy."""
    limits = sorted({limit for limit in max_new_tokens.values() if limit is not None})
    at = f" at max_new_tokens {' and '.join(map(str, limits))}" if limits else ""
    stages = " and ".join(map(repr, max_new_tokens))
    return LeftOut(n, f"cut off{at}", f"raise `max_new_tokens` of stage {stages}{or_else}")


def failure_reasons(reasons: Iterable[str], remedy: str = RETRY) -> list[LeftOut]:
    """Failures counted by why they failed: reasons that differ in their item or in numbers alone are one.

    The key of `REMEDIES` that occurs in a reason says what to change, else it is `remedy`.
    """
    counts: Counter[str] = Counter()
    first_reasons: dict[str, str] = {}
    for reason in reasons:
        reason = _PLACE.sub("", reason)
        kind = _NUMBER.sub("#", reason)
        counts[kind] += 1
        first_reasons.setdefault(kind, reason)
    return [
        LeftOut(n, f"failed: {shorten(first_reasons[kind], 120)}", _remedy(first_reasons[kind]) or remedy)
        for kind, n in counts.most_common()
    ]


def _remedy(reason: str) -> str | None:
    return next((remedy for words, remedy in REMEDIES.items() if words in reason), None)
