"""What `cai votes explain` and `cai votes diff` print: tables and sentences that fit a terminal of 100 columns.

Every table is followed by what its headers mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai.feedback.explain import (
    MIN_COMMON_PAIRS,
    VISIBLE_CHANGE,
    Explanation,
    PrincipleInfluence,
    contains_zero,
    correlation_remarks,
    example_text_lines,
)
from cai.text.formatting import shorten, wrapped
from cai.text.left_out import causes_text
from cai.text.tables import rate_text, table

MAX_ID = 26
"""Characters of a principle's id in a table."""
MAX_CORRELATIONS = 12
"""Correlations that are shown, the strongest first."""
BEHAVIOUR_WORDS = {
    "refusal": "refuses",
    "opening_filler": "opens with filler",
    "apology": "apologises",
    "sermon": "preaches",
    "flattery": "flatters",
    "looping": "ends in a loop",
    "truncated": "is truncated",
}
"""Detectors whose mean is a share of responses, in words."""


def explanation_lines(explanation: Explanation) -> Iterator[str]:
    """The figures as tables, then examples of pairs."""
    principles = explanation["principles"]
    counts = [f"{explanation['labelled']:,} of {explanation['pairs']:,} pairs have a label"]
    counts += [f"{n:,} {'is' if n == 1 else 'are'} {reason}" for reason, n in explanation["unlabelled"].items()]
    yield from wrapped(f"{explanation['name']}: {'; '.join(counts)}")
    if behaviours := explanation["behaviours"]:
        yield from wrapped(f"chosen against rejected: {behaviours_text(behaviours)}", "  ")
    if failed := explanation["failed_pairs"]:
        n_failed = sum(failed.values())
        yield from wrapped(f"pairs without any vote, beside these: {n_failed:,}; {causes_text(failed)}", "  ")
    if own := explanation["prefers_own"]:
        yield from wrapped(
            f"labels for the judge's own text, where another model wrote the other one: {rate_text(own)} of "
            f"{own['n']:,}"
        )
    yield ""
    yield from _say_lines(principles)
    yield ""
    yield from _agreement_lines(principles)
    yield ""
    yield from _change_lines(explanation)
    yield ""
    yield from _correlation_lines(explanation)
    for id, without in explanation["without"].items():
        for example in without["examples"]:
            yield ""
            change = f"a {example['p_a']:.2f} -> {example['p_a_without']:.2f}"
            yield from wrapped(f"without {id}, pair {example['pair']}: {change}")
            yield from example_text_lines(example)


def behaviours_text(behaviours: Mapping[str, Mapping[str, float]]) -> str:
    """`refuses 29 % / 6 %, words 23 / 26`, chosen before rejected; without behaviours that neither side shows."""
    texts = []
    for name, words in BEHAVIOUR_WORDS.items():
        if name in behaviours:
            chosen, rejected = (f"{100 * behaviours[name][side]:.0f} %" for side in ("chosen", "rejected"))
            if {chosen, rejected} != {"0 %"}:
                texts.append(f"{words} {chosen} / {rejected}")
    if lengths := behaviours.get("words"):
        texts.append(f"words {lengths['chosen']:.0f} / {lengths['rejected']:.0f}")
    return ", ".join(texts)


def _say_lines(principles: Mapping[str, PrincipleInfluence]) -> Iterator[str]:
    """How much each principle says, and what failed."""
    rows = [
        [
            shorten(id, MAX_ID),
            number_text(principle["weight"], "{:g}"),
            f"{100 * principle['share_of_say']:.0f} %",
            f"{principle['pairs']:,}",
            f"{principle['failed']:,}",
            rate_text(principle["decided"]),
            number_text(principle["mean_strength"], "{:.2f}"),
        ]
        for id, principle in principles.items()
    ]
    yield from table(["principle", "weight", "influence", "pairs", "failed", "decided", "strength"], rows)
    yield from wrapped(
        "influence: share of the sum of all weighted log-odds. pairs: with a vote. failed: pairs whose vote failed. "
        "decided: share of votes of 60 % or more for one response. strength: mean nats of a vote from even. Brackets: "
        "95 % intervals, clustered by topic."
    )
    for id, principle in principles.items():
        causes = f"; {causes_text(principle['failures'])}" if principle["failures"] else ""
        if principle["asked"] == 0:
            yield from wrapped(f"{id}: applies to no pair", "  ")
        elif not principle["pairs"]:
            of_asked = "" if principle["asked"] is None else f" of {principle['asked']:,}"
            failed = f", {principle['failed']:,}{of_asked} failed{causes}" if principle["failed"] else ""
            yield from wrapped(f"{id}: no vote{failed}", "  ")
        elif principle["failed"]:
            yield from wrapped(f"{id}: {principle['failed']:,} votes failed{causes}", "  ")


def _agreement_lines(principles: Mapping[str, PrincipleInfluence]) -> Iterator[str]:
    """How often decided votes are on the side of labels and of longer responses."""
    rows = []
    for id, principle in principles.items():
        if (decided := principle["decided"]) is not None:
            n_decided = round((decided["value"] or 0.0) * decided["n"])
            rates = (principle["agreement"], principle["agreement_with_the_others"], principle["prefers_longer"])
            rows.append([shorten(id, MAX_ID), f"{n_decided:,}", *map(rate_text, rates)])
    yield from table(["principle", "decided", "with the label", "with the others", "for the longer"], rows)
    yield from wrapped(
        "Of decided votes, shares on the side of the label, of the label that the other principles alone would give, "
        "and of the longer response."
    )


def _change_lines(explanation: Explanation) -> Iterator[str]:
    """What the order of the responses does to votes, and what happens to labels without each principle."""
    headers = ["principle", "shown first", "turn with the order", "labels turned", "barely", "lost", "gained"]
    rows = []
    for id, principle in explanation["principles"].items():
        without = explanation["without"][id]
        counts = [f"{n:,}" for n in (without["turned"], without["barely_turned"], without["lost"], without["gained"])]
        shown_first = number_text(principle["position_bias"], "{:+.2f}")
        rows.append([shorten(id, MAX_ID), shown_first, number_text(principle["flip_rate"], "{:.2f}"), *counts])
    yield from table(headers, rows)
    yield from wrapped(
        "shown first: nats that the response shown first gains. turn with the order: share of decided votes that are "
        "on another side in the other order. labels turned, lost, gained: labels that change sides, go and come where "
        f"the principle has weight 0. barely: those of labels turned whose probability changes by less than "
        f"{VISIBLE_CHANGE:.2f}, of which no pair is shown."
    )


def _correlation_lines(explanation: Explanation) -> Iterator[str]:
    """Which principles vote alike and which against each other, with counts and intervals."""
    distinct = [entry for entry in explanation["correlations"] if not contains_zero(entry["interval"])]
    shown = distinct[:MAX_CORRELATIONS]
    if shown:
        rows = []
        for entry in shown:
            first, second = (shorten(id, MAX_ID) for id in entry["principles"])
            rows.append(
                [first, second, correlation_text(entry["correlation"], entry["interval"]), f"{entry['pairs']:,}"]
            )
        yield from table(["principle", "and", "correlation", "pairs"], rows)
        yield "correlation: +1 where two principles always vote alike, -1 where they never do."
    counts = {
        "weaker than these": len(distinct) - len(shown),
        "not distinguishable from 0": len(explanation["correlations"]) - len(distinct),
        f"left out, with votes of both on fewer than {MIN_COMMON_PAIRS} pairs": explanation["correlations_left_out"],
    }
    if texts := [f"{n:,} {text}" for text, n in counts.items() if n]:
        yield from wrapped(f"correlations of {'other' if shown else 'two'} principles: {'; '.join(texts)}")
    for remark, entry in correlation_remarks(explanation):
        names = " and ".join(entry["principles"])
        correlation = correlation_text(entry["correlation"], entry["interval"])
        yield from wrapped(f"{names} {remark}: {correlation} over {entry['pairs']:,} pairs", "  ")


def correlation_text(value: float | None, interval: Sequence[float] | None) -> str:
    """`+0.28 [+0.11, +0.44]`; a dash for None."""
    if value is None or interval is None:
        return "-"
    return f"{value:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def number_text(value: float | None, form: str) -> str:
    """The formatted number; a dash for None."""
    return "-" if value is None else form.format(value)


def wording_lines(principle: str, before: str, after: str) -> Iterator[str]:
    """What a judge was asked about a principle, in two wordings."""
    yield from wrapped(principle)
    yield from wrapped(f"  before  {before}", " " * 10)
    yield from wrapped(f"  after   {after}", " " * 10)


def difference_lines(differences: Mapping[str, Any]) -> Iterator[str]:
    """The figures of `compare_votes` as a table, and the pairs whose labels differ most."""
    (first, second), (n_first, n_second) = differences["names"], differences["pairs"]
    yield from wrapped(
        f"{differences['matched']:,} pairs in both of {n_first:,} in {first} and {n_second:,} in {second}; "
        f"labels turned: {rate_text(differences['turned'])}"
    )
    if differences["is_same"]:
        yield from wrapped(f"{first} and {second} are the same votes and labels, from the same files")
    for id, words in differences["wordings"].items():
        yield ""
        yield from wording_lines(id, words["before"], words["after"])
    yield ""
    rows = []
    for id, principle in differences["principles"].items():
        turned = principle["turned"]
        correlation = correlation_text(principle["correlation"], principle["correlation_interval"])
        strengths = (number_text(value, "{:.2f}") for value in principle["mean_strength"])
        n_decided = f"{turned['n']:,}" if turned else "0"
        rows.append(
            [shorten(id, MAX_ID - 6), f"{principle['pairs']:,}", correlation, n_decided, rate_text(turned), *strengths]
        )
    yield from table(["principle", "pairs", "correlation", "decided", "turned", "strength", "in second"], rows)
    yield from wrapped(
        f"correlation: of the votes in both runs, on {MIN_COMMON_PAIRS} pairs or more. decided: votes of 60 % or more "
        "in both. turned: share of these on different sides. strength, in second: mean nats of a vote from even, in "
        "the first run and in the second."
    )
    for name, principles in zip(differences["names"], differences["only_in"], strict=True):
        if principles:
            yield from wrapped(f"only in {name}: {', '.join(principles)}", "  ")
    for example in differences["examples"]:
        yield ""
        probabilities = f"a {example['p_a']:.2f} in {first}, {example['p_a_in_the_other']:.2f} in {second}"
        yield from wrapped(f"pair {example['pair']}: {probabilities}")
        yield from example_text_lines(example)
