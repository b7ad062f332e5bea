"""What a stage leaves out of its input, as one sentence: how many items, why, and what to change.

    150 of 198 responses left out: 150 cut off at max_new_tokens 256; raise `max_new_tokens` of stage 'responses'

A stage says so where it is more than a tenth of what it was to use. Items that a recipe keeps out on purpose, such as
held-out prompts, are no part of either number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from cai.text.formatting import shorten

SHARE_TO_REPORT = 0.1
"""Share of the input from which on leaving out is reported: more than this."""
MAX_REASONS = 4
"""Reasons that are named, the most frequent first."""
RETRY = "`cai run --retry-failures` asks again"
FailureKind = Literal["transient", "too_long", "cut_off", "unclear", "no_option", "other"]
"""Why an item failed: the same request may succeed later; it is too long for the context; a text that had to end came
to its maximum of tokens; a judge's options hold too little probability; a judge named no option; anything else."""
REMEDIES: Mapping[FailureKind, str] = {
    "transient": RETRY,
    "too_long": "shorten the prompts, or use a model with a longer context",
    "cut_off": "raise `max_new_tokens`",
    "unclear": "name another `judge:`, or lower `min_option_probability` of its stage",
    "no_option": "name another `judge:`",
    "other": "",
}
"""What to change, by the kind of a failure."""

_NUMBER = re.compile(r"\d[\d.,]*(?:e-?\d+)?")


class FailedItem(Protocol):
    """What is read of a failure."""

    @property
    def kind(self) -> FailureKind: ...

    @property
    def cause(self) -> str:
        """Why the item failed, without its name."""


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


def cut_off_reason(n: int, max_new_tokens: Mapping[str, int | None], other_remedy: str = "") -> LeftOut:
    """`n` responses without an end, written by stages with these maxima of tokens, None where it is unknown."""
    stages = [repr(stage) for stage, limit in max_new_tokens.items() if limit is not None]
    limits = sorted({limit for limit in max_new_tokens.values() if limit is not None})
    limits_in_words = f" at max_new_tokens {' and '.join(map(str, limits))}" if limits else ""
    remedies = [f"raise `max_new_tokens` of stage {' and '.join(stages)}"] if stages else []
    return LeftOut(n, f"cut off{limits_in_words}", " or ".join([*remedies, *([other_remedy] if other_remedy else [])]))


def count_causes(failures: Iterable[FailedItem]) -> dict[str, int]:
    """Causes of failures with their counts, the most frequent first: causes that differ in numbers alone are one."""
    counts: Counter[str] = Counter()
    first_causes: dict[str, str] = {}
    for failure in failures:
        cause = first_causes.setdefault(_NUMBER.sub("#", failure.cause), failure.cause)
        counts[cause] += 1
    return dict(counts.most_common())


def causes_text(causes: Mapping[str, int]) -> str:
    """The most frequent of `count_causes`: `the options hold 0.02 of the probability (3); too long (1)`."""
    texts = [f"{shorten(cause, 120)} ({n:,})" for cause, n in list(causes.items())[:MAX_REASONS]]
    if n_others := sum(list(causes.values())[MAX_REASONS:]):
        texts.append(f"other reasons ({n_others:,})")
    return "; ".join(texts)


def failure_reasons(
    failures: Iterable[FailedItem], remedies: Mapping[FailureKind, str] = MappingProxyType({})
) -> list[LeftOut]:
    """Failures counted by kind and cause: causes that differ in numbers alone are one.

    `remedies` replaces those of `REMEDIES` where the stage knows better.
    """
    counts: Counter[tuple[FailureKind, str]] = Counter()
    first_causes: dict[tuple[FailureKind, str], str] = {}
    for failure in failures:
        key = failure.kind, _NUMBER.sub("#", failure.cause)
        counts[key] += 1
        first_causes.setdefault(key, failure.cause)
    return [
        LeftOut(n, f"failed: {shorten(first_causes[key], 120)}", {**REMEDIES, **remedies}[key[0]])
        for key, n in counts.most_common()
    ]
