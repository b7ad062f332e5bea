"""What each principle does to a run's labels, read off the votes alone: no model is asked.

A vote is a principle's log-odds (nats) that response *a* is better, the mean of both orders. It counts as *decided*
from 60 % on, since a judge is never quite even. Correlations are taken about zero, sum(x y) / sqrt(sum(x^2) sum(y^2)):
calling *a* what was *b* turns every sign of a pair at once and must change nothing, which a correlation about the mean
would not survive. Two principles are compared on the pairs that both voted on.

Votes of a judge that rates are points, not nats: what is said of strength is then in points. They have no order, so of
positions and flips nothing is said.

Without a principle means with weight 0, everything else as `prefer` had it; it is no causal claim about a judge that
would be asked in other words.

Left out: whether a principle is right (`cai constitution test` asks that), and truth from elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from cai.feedback.labels import Bools, Floats, aggregate, by_order, probability
from cai.feedback.votes import read_votes
from cai.maths.behaviours import n_words
from cai.maths.statistics import rate
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import RECORDS
from cai.storage.rows import topic_of
from cai.text.errors import BadInput, nearest
from cai.text.formatting import printable, shorten
from cai.text.tables import rate_text, table

DECIDED = log(0.6 / 0.4)
"""Nats from which a vote counts as decided."""
REDUNDANT, CONFLICTING, ENOUGH = 0.8, -0.3, 20
"""Correlations that are named, where at least so many pairs have both votes."""


@dataclass(frozen=True)
class Rule:
    """How votes became log-odds, which labels are then made of (soft, hard or clamped): what `prefer` was told."""

    weights: Mapping[str, float]
    temperature: float | None
    """None divides by the sum of weights."""
    abstain_below: float
    min_confidence: float
    tie_below: float = 0.0
    """Nats of the sum up to which there is no side."""
    fitted: bool = False
    """Whether the temperature was fitted, on prompts that are not held out."""


@dataclass(frozen=True)
class Evidence:
    """The votes that labels were made of: `rows` are the pairs, `ab` and `ba` (pairs, principles), NaN = none."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    rule: Rule
    stages: Sequence[Path] = ()
    """The folders of the votes."""

    @functools.cached_property
    def votes(self) -> Floats:
        """The mean of both orders."""
        return (self.ab + self.ba) / 2

    def sides(self, *, without: str | None = None) -> Floats:
        """Log-odds of each pair's label, (pairs,), 0 where it has none."""
        weights = np.array([0.0 if id == without else self.rule.weights[id] for id in self.principles])
        if not weights.any():
            return np.zeros(len(self.rows))
        total = aggregate(self.votes, weights, temperature=self.rule.temperature, abstain_below=self.rule.abstain_below)
        sure = ~np.isnan(total) & (np.abs(total) > self.rule.tie_below)
        sure &= probability(np.abs(total)) >= self.rule.min_confidence
        return np.where(sure, total, 0.0)

    @functools.cached_property
    def topics(self) -> list[str]:
        """What intervals are clustered by."""
        return [topic_of(row["tags"], row["prompt_id"]) for row in self.rows]

    @functools.cached_property
    def longer(self) -> Floats:
        """Words by which *a* is longer, (pairs,)."""
        words = [n_words(row["a"]["text"]) - n_words(row["b"]["text"]) for row in self.rows]
        return np.array(words, dtype=float)


def evidence(name: str, folder: Path) -> Evidence:
    """The votes behind a finished `prefer` stage: of RUN, or RUN/STAGE where the run has several.

    Raises BadInput where there is no such stage, or its labels are of human pairs alone.
    """
    run, stage = _find(name, folder)
    facts = read_json(run_folder.latest(run)[stage] / run_folder.STAGE)
    inputs = [run / each["folder"] for each in facts["inputs"].values()]
    if not inputs:
        raise BadInput(f"{name}: {stage} has labels of people alone, and no votes to explain")
    found = read_votes(each / RECORDS for each in inputs)
    weights = {key.removeprefix("weight."): value for key, value in facts["parts"].items() if key.startswith("weight.")}
    config = facts["config"]
    fitted = config["temperature"] == "fitted"
    temperature = facts["figures"]["labels"]["temperature"]["value"] if fitted else config["temperature"]
    if temperature == "sum_of_weights":
        temperature = None
    rule = Rule(weights, temperature, config["abstain_below"], config["min_confidence"], fitted=fitted)
    ab, ba = by_order(found.vote_columns, len(found.unparsed_rows), len(found.principles))
    return Evidence(name, list(found.rows()), found.principles, ab, ba, rule, inputs)


def _find(name: str, folder: Path) -> tuple[Path, str]:
    """The run and its stage with labels."""
    wanted = None
    try:
        run = run_folder.find_run(name, folder)
    except BadInput:
        base, _, wanted = name.rpartition("/")
        if not base:
            raise
        run = run_folder.find_run(base, folder)
    stages = [
        stage
        for stage, path in run_folder.latest(run).items()
        if run_folder.finished(path) and read_json(path / run_folder.STAGE)["kind"] == "prefer"
    ]
    if wanted is None and len(stages) == 1:
        return run, stages[0]
    if wanted in stages:
        return run, wanted
    expected = ", ".join(f"{run.name}/{stage}" for stage in stages) or "a run whose `prefer` stage is done"
    raise BadInput(f"found {name!r}, expected {expected}" + (nearest(wanted, stages) if wanted else ""))


def explain(given: Evidence, n_examples: int = 3) -> dict[str, Any]:
    """Figures of every principle, how they go together, and what becomes of the labels without each."""
    votes, sides = given.votes, given.sides()
    weights = np.array([given.rule.weights[id] for id in given.principles])
    heard = ~np.isnan(votes) & (np.abs(votes) >= given.rule.abstain_below)
    say = np.where(heard, weights * np.abs(votes), 0.0)
    correlation, together = correlations(votes)
    return {
        "name": given.name,
        "pairs": len(given.rows),
        "labelled": int((sides != 0).sum()),
        "prefers_own": prefers_own(given, sides),
        "principles": {
            id: {"weight": float(weights[i]), "share_of_say": float(say[:, i].sum() / say.sum()) if say.any() else 0.0}
            | _alone(given, i, sides)
            for i, id in enumerate(given.principles)
        },
        "correlation": {
            id: {
                other: None if np.isnan(correlation[i, j]) else float(correlation[i, j])
                for j, other in enumerate(given.principles)
            }
            for i, id in enumerate(given.principles)
        },
        "redundant": _named(given.principles, correlation, together, lambda value: value >= REDUNDANT),
        "conflicting": _named(given.principles, correlation, together, lambda value: value <= CONFLICTING),
        "without": {id: _without(given, id, sides, n_examples) for id in given.principles},
    }


def prefers_own(given: Evidence, sides: Floats) -> dict[str, Any] | None:
    """How often the label is on the side of the judge's own text, where another model wrote the other one.

    None without such pairs. Own texts may be the better ones, so it is to be read beside what is known of them.
    """
    own = np.array(
        [(row["a"]["model"] == row["judge"]) - float(row["b"]["model"] == row["judge"]) for row in given.rows]
    )
    return _rate(own * sides > 0, (own != 0) & (sides != 0), given.topics)


def _alone(given: Evidence, column: int, sides: Floats) -> dict[str, Any]:
    """What one principle's votes are like."""
    ab, ba = given.ab[:, column], given.ba[:, column]
    vote = given.votes[:, column]
    voted = ~np.isnan(vote)
    decided = voted & (np.abs(vote) >= DECIDED)
    ordered = voted & np.array([row.get("method") != "rating" for row in given.rows], dtype=bool)
    rest = given.sides(without=given.principles[column])
    return {
        "pairs": int(voted.sum()),
        "decided": _rate(decided, voted, given.topics),
        "mean_strength": float(np.abs(vote[voted]).mean()) if voted.any() else None,
        "agreement": _same_side(given, vote, sides, decided),
        "agreement_with_the_others": _same_side(given, vote, rest, decided),
        "position_bias": float((ab - ba)[ordered].mean() / 2) if ordered.any() else None,
        "flip_rate": float((ab * ba < 0)[decided & ordered].mean()) if (decided & ordered).any() else None,
        "prefers_longer": _same_side(given, vote, given.longer, decided),
        "length_correlation": _cosine(vote[voted], given.longer[voted]),
    }


def _same_side(given: Evidence, vote: Floats, other: Floats, among: Bools) -> dict[str, Any] | None:
    """How often a principle's vote is on the side of something else, of the pairs where that has a side."""
    both = among & (other != 0)
    return _rate(vote * other > 0, both, given.topics)


def correlations(votes: Floats) -> tuple[Floats, Floats]:
    """Of each two principles, about zero, and on how many pairs both voted; NaN where one of them never had a side."""
    voted = (~np.isnan(votes)).astype(float)
    values = np.nan_to_num(votes)
    squares = (values**2).T @ voted
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (values.T @ values) / np.sqrt(squares * squares.T)
    return found, voted.T @ voted


def _cosine(x: Floats, y: Floats) -> float | None:
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else None


def _named(
    principles: Sequence[str], correlation: Floats, together: Floats, which: Callable[[float], bool]
) -> list[dict[str, Any]]:
    """Two principles each, the most remarkable first."""
    found = [
        {"principles": [one, principles[j]], "correlation": float(correlation[i, j]), "pairs": int(together[i, j])}
        for i, one in enumerate(principles)
        for j in range(i + 1, len(principles))
        if together[i, j] >= ENOUGH and which(float(correlation[i, j]))
    ]
    return sorted(found, key=lambda each: -abs(each["correlation"]))


def _without(given: Evidence, id: str, sides: Floats, n_examples: int) -> dict[str, Any]:
    """How many labels turn, go and come when a principle has no say, and the pairs that turn most."""
    rest = given.sides(without=id)
    turned = np.flatnonzero(sides * rest < 0)
    most = turned[np.argsort(-np.minimum(np.abs(sides[turned]), np.abs(rest[turned])), kind="stable")][:n_examples]
    return {
        "turned": len(turned),
        "lost": int(((sides != 0) & (rest == 0)).sum()),
        "gained": int(((sides == 0) & (rest != 0)).sum()),
        "examples": [_example(given.rows[i], {"p_a": sides[i], "p_a_without": rest[i]}) for i in most],
    }


def _example(row: Mapping[str, Any], odds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "pair": row["id"],
        "prompt": row["prompt"][-1]["content"],
        "a": row["a"]["text"],
        "b": row["b"]["text"],
    } | {name: float(probability(np.array(value))) for name, value in odds.items()}


def explain_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures as tables, and the examples to read."""
    yield f"{found['name']}: {found['labelled']:,} of {found['pairs']:,} pairs have a label"
    if own := found["prefers_own"]:
        yield f"for the judge's own text, where another model wrote the other: {rate_text(own)} of {own['n']:,}"
    yield ""
    headers = ["principle", "weight", "say", "pairs", "decided", "strength", "with label", "with others", "position",
               "flips", "longer", "turned", "lost", "gained"]  # fmt: skip
    rows = []
    for id, each in found["principles"].items():
        without = found["without"][id]
        rows.append(
            [
                id, f"{each['weight']:g}", f"{100 * each['share_of_say']:.0f} %", f"{each['pairs']:,}",
                rate_text(each["decided"]), _number(each["mean_strength"], "{:.2f}"), rate_text(each["agreement"]),
                rate_text(each["agreement_with_the_others"]), _number(each["position_bias"], "{:+.2f}"),
                _number(each["flip_rate"], "{:.2f}"), rate_text(each["prefers_longer"]),
                str(without["turned"]), str(without["lost"]), str(without["gained"]),
            ]
        )  # fmt: skip
    yield from table(headers, rows)
    yield ""
    yield "say: share of all weighted log-odds. decided: votes of 60 % or more; of these: on the side of the label, of"
    yield "the label without it, of the longer response. strength, position: nats. turned, lost, gained: labels without"
    yield "the principle. Brackets: 95 % intervals, clustered by topic."
    yield ""
    ids = list(found["correlation"])
    cells = [
        [id, *(_number(found["correlation"][id][other], "{:+.2f}") for other in ids[: i + 1])]
        + [""] * (len(ids) - i - 1)
        for i, id in enumerate(ids)
    ]
    yield from table(["correlation", *(shorten(id, 12) for id in ids)], cells)
    for word, kind in (("say nearly the same", "redundant"), ("contradict each other", "conflicting")):
        for each in found[kind]:
            one, other = each["principles"]
            yield printable(f"{one} and {other} {word}: {each['correlation']:+.2f} over {each['pairs']:,} pairs")
    for id, without in found["without"].items():
        for each in without["examples"]:
            yield ""
            yield printable(f"without {id}, pair {each['pair']}: a {each['p_a']:.2f} -> {each['p_a_without']:.2f}")
            yield from _text_lines(each)


def _text_lines(example: Mapping[str, Any]) -> Iterator[str]:
    for side in ("prompt", "a", "b"):
        yield printable(f"  {side:6} {shorten(example[side], 200)}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def diff(one: Evidence, two: Evidence, n_examples: int = 3) -> dict[str, Any]:
    """Two judges, or two wordings of principles, on the pairs that both saw: the same prompt and the same two texts.

    Raises BadInput where there is no such pair.
    """
    of_two = {_key(row): i for i, row in enumerate(two.rows)}
    matched = [(i, of_two[key]) for i, row in enumerate(one.rows) if (key := _key(row)) in of_two]
    if not matched:
        raise BadInput(f"{one.name} and {two.name} have no pair in common: the same prompt with the same two responses")
    left, right = (np.array(side) for side in zip(*matched, strict=True))
    # A pair's a and b may have changed places.
    sign = np.array([1.0 if one.rows[i]["a"]["text"] == two.rows[j]["a"]["text"] else -1.0 for i, j in matched])
    topics = [one.topics[i] for i in left]
    sides, others = one.sides()[left], two.sides()[right] * sign
    turned = np.flatnonzero(sides * others < 0)
    most = turned[np.argsort(-np.minimum(np.abs(sides[turned]), np.abs(others[turned])), kind="stable")][:n_examples]
    found: dict[str, Any] = {
        "names": [one.name, two.name],
        "pairs": [len(one.rows), len(two.rows)],
        "matched": len(matched),
        "turned": _rate(sides * others < 0, (sides != 0) & (others != 0), topics),
        "principles": {},
        "examples": [_example(one.rows[left[i]], {"p_a": sides[i], "p_a_in_the_other": others[i]}) for i in most],
    }
    for id in sorted({*one.principles} & {*two.principles}):
        x = one.votes[left, list(one.principles).index(id)]
        y = two.votes[right, list(two.principles).index(id)] * sign
        both = ~np.isnan(x) & ~np.isnan(y)
        decided = both & (np.abs(x) >= DECIDED) & (np.abs(y) >= DECIDED)
        found["principles"][id] = {
            "pairs": int(both.sum()),
            "correlation": _cosine(x[both], y[both]),
            "mean_strength": [float(np.abs(each[both]).mean()) if both.any() else None for each in (x, y)],
            "turned": _rate(x * y < 0, decided, topics),
        }
    found["only_in"] = [sorted({*a.principles} - {*b.principles}) for a, b in ((one, two), (two, one))]
    return found


def _key(row: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    return row["prompt_id"], frozenset((row["a"]["text"], row["b"]["text"]))


def _rate(values: Bools, where: Bools, topics: Sequence[str]) -> dict[str, Any] | None:
    """How often it is so where it is asked, clustered by topic; None where it is asked nowhere."""
    if not where.any():
        return None
    return rate(values[where].astype(float).tolist(), [topics[i] for i in np.flatnonzero(where).tolist()]).as_json()


def diff_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures as a table, and the pairs whose labels differ most."""
    one, two = found["names"]
    yield printable(
        f"{found['matched']:,} pairs in both of {found['pairs'][0]:,} in {one} and {found['pairs'][1]:,} in {two}; "
        f"labels turned: {rate_text(found['turned'])}"
    )
    yield ""
    rows = [
        [id, f"{each['pairs']:,}", _number(each["correlation"], "{:+.2f}"), rate_text(each["turned"]),
         *(_number(value, "{:.2f}") for value in each["mean_strength"])]
        for id, each in found["principles"].items()
    ]  # fmt: skip
    yield from table(["principle", "pairs", "correlation", "turned", "strength", "in the other"], rows)
    for name, only in zip(found["names"], found["only_in"], strict=True):
        if only:
            yield printable(f"only in {name}: {', '.join(only)}")
    for each in found["examples"]:
        yield ""
        yield printable(f"pair {each['pair']}: a {each['p_a']:.2f} in {one}, {each['p_a_in_the_other']:.2f} in {two}")
        yield from _text_lines(each)
