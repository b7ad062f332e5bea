"""One pair of responses put to a judge, principle by principle, in both orders: the questions, and the votes they give.

And the votes of a whole stage, read back.

The judge's log-odds that *a* is better is the difference of the next-token log-probabilities of the two options (Lee et
al. 2023, arXiv 2309.00267). Left out: which pairs and principles are asked about (stages choose) and what votes mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cai.constitution import Principle
from cai.contracts.engine import Choice, Question
from cai.feedback.labels import Floats, VoteColumns
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.rows import Failure, Message, PrincipleVote
from cai.templates import OPTIONS, TemplateSet

if TYPE_CHECKING:
    import pyarrow as pa

ORDERS: tuple[Literal["ab", "ba"], ...] = ("ab", "ba")
"""Which response is shown first."""
MIN_OPTION_PROBABILITY = 0.1
"""Probability that the options must hold together, unless a recipe says otherwise."""
VOTES = b',"votes":['
"""Where the votes begin, the last key of a line, all sorted. Inside of a text its quotation marks are escaped."""
READ_AT_ONCE = 8 << 20
"""Bytes, and the rest of the line they end in."""
PARSED_AT_ONCE = 32
"""Rows: few enough to stay in a core's cache until they are written."""


class ResponsePair(NamedTuple):
    """Two responses to one conversation. `id` is unique among what is asked at once."""

    id: str
    messages: Sequence[Message]
    a: str
    b: str


def empty(text: str) -> bool:
    """Whether there is nothing in a response to read: nothing, blanks, marks without a shape."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def to_questions(pair: ResponsePair, principles: Sequence[Principle], templates: TemplateSet) -> Iterator[Question]:
    """Questions with a common beginning stand side by side: pair, then order, then principle."""
    texts = {"a": pair.a, "b": pair.b}
    for order in ORDERS:
        first, second = (texts[side] for side in order)
        for principle in principles:
            yield Question(
                question_id(pair, order, principle),
                templates.compare(pair.messages, first, second, principle),
                OPTIONS,
            )


def to_votes(
    pair: ResponsePair,
    principles: Sequence[Principle],
    answers: Mapping[str, Choice | Failure],
    min_option_probability: float,
) -> tuple[list[PrincipleVote], list[Failure]]:
    """Votes of the principles that were answered in both orders, and what failed; the pair itself where none was.

    One order alone leaks the judge's preference for a position, so a principle's votes are kept together or not at all.
    Options that hold less than `min_option_probability` of the probability between them are no answer.
    """
    by_principle = [
        [_to_vote(pair, order, principle, answers, min_option_probability) for order in ORDERS]
        for principle in principles
    ]
    return together(pair, by_principle)


def together(
    pair: ResponsePair, by_principle: Sequence[Sequence[PrincipleVote | Failure]]
) -> tuple[list[PrincipleVote], list[Failure]]:
    """Each principle's votes where both orders have one, and what failed; the pair itself where no principle has."""
    votes: list[PrincipleVote] = []
    failures: list[Failure] = []
    for both in by_principle:
        failed = [vote for vote in both if isinstance(vote, Failure)]
        failures += failed
        if not failed:
            votes += [vote for vote in both if not isinstance(vote, Failure)]
    if failures and not votes:
        reason = f"no principle was answered in both orders; first of {len(failures)}: {failures[0].reason}"
        failures = [Failure(pair.id, reason)]
    return votes, failures


def _to_vote(
    pair: ResponsePair,
    order: Literal["ab", "ba"],
    principle: Principle,
    answers: Mapping[str, Choice | Failure],
    min_option_probability: float,
) -> PrincipleVote | Failure:
    """The log-odds that *a* is better, whichever was shown first."""
    answer = with_enough_probability(answers[question_id(pair, order, principle)], min_option_probability)
    if isinstance(answer, Failure):
        return Failure(answer.id, f"pair {pair.id}, {principle.id!r}, order {order}: {answer.reason}")
    first_better = answer.log_probs[0] - answer.log_probs[1]
    log_odds = first_better if order == "ab" else -first_better
    return PrincipleVote(
        principle=principle.id, order=order, log_odds=log_odds, option_probability=answer.option_probability
    )


def with_enough_probability(answer: Choice | Failure, min_option_probability: float) -> Choice | Failure:
    """The answer, a failure if its options hold too little of the probability to be one."""
    if (
        isinstance(answer, Choice) and not answer.option_probability >= min_option_probability
    ):  # NaN is no answer either
        held = f"the options hold {answer.option_probability:.3g} of the probability"
        held += f", less than min_option_probability {min_option_probability:g}"
        return Failure(answer.id, held)
    return answer


def question_id(pair: ResponsePair, order: str, principle: Principle) -> str:
    """Names the question about a pair in one order under one principle."""
    return f"{pair.id}/{order}/{principle.id}"


def failed_pairs(stages: Iterable[Path], kind: str, measured_on: str) -> int:
    """Pairs that finished `judge` stages have no vote on and whose truth, `human` or `oracle`, could have been known.

    `measured_on`: `held_out` prompts, or `all`.
    """
    figures = ((read_json(stage / run_folder.STAGE) or {}).get("figures", {}) for stage in stages)
    votes = [each for found in figures for each in found.get("votes", {}).values()]
    return sum(each["failed_with_truth"][kind][measured_on] for each in votes)


class Read(NamedTuple):
    """Vote rows, what stands before the votes unparsed, and the votes of all of them as columns."""

    unparsed_rows: list[bytes]
    methods: frozenset[str]
    """How the judges were asked."""
    human: Floats
    """Probability that *a* is better by people, (rows,); NaN where none labelled the pair."""
    principles: list[str]
    vote_columns: VoteColumns

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows without their votes, parsed a few at a time: 100,000 dictionaries at once would be slow to keep."""
        for first in range(0, len(self.unparsed_rows), PARSED_AT_ONCE):
            yield from json.loads(b"[" + b"},".join(self.unparsed_rows[first : first + PARSED_AT_ONCE]) + b"}]")


def read_votes(paths: Iterable[Path]) -> Read:
    """All votes of several files: of 100,000 pairs there are millions, so Arrow parses them, column by column."""
    unparsed_rows, methods, numbers = list[bytes](), set[str](), dict[str, int]()
    none = np.zeros(0, dtype=np.int64)
    parts, human = [VoteColumns(none, none, none.astype(bool), none.astype(float))], [none.astype(float)]
    for path in paths:
        with path.open("rb") as file:
            while lines := file.read(READ_AT_ONCE) + file.readline():
                table = _parsed(lines)
                parts.append(_vote_columns(table["votes"].chunk(0), len(unparsed_rows), numbers))
                human.append(table["human"].chunk(0).to_numpy(zero_copy_only=False).astype(float))
                methods |= {method or "pairwise" for method in table["method"].unique().to_pylist()}
                unparsed_rows += _unparsed_rows(lines)
    principles = sorted(numbers)
    # In alphabetical order, so that sums come out the same to the last bit whichever row was read first.
    column = np.argsort(np.array([numbers[id] for id in principles], dtype=np.int64))
    pair, principle, swapped, log_odds = (np.concatenate(each) for each in zip(*parts, strict=True))
    columns = VoteColumns(pair, column[principle], swapped, log_odds)
    return Read(unparsed_rows, frozenset(methods), np.concatenate(human), principles, columns)


def _unparsed_rows(lines: bytes) -> Iterator[bytes]:
    """What stands in each line before its votes."""
    start = 0
    while (end := lines.find(VOTES, start)) >= 0:
        yield lines[start:end]
        start = lines.index(b"\n", end) + 1


def _parsed(lines: bytes) -> pa.Table:
    """What labels are made of, in columns; everything else in the lines is passed over."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    vote = pa.struct([("principle", pa.string()), ("order", pa.string()), ("log_odds", pa.float64())])
    schema = pa.schema([("votes", pa.list_(vote)), ("method", pa.string()), ("human", pa.float64())])
    return arrow_json.read_json(
        pa.BufferReader(lines),
        arrow_json.ReadOptions(use_threads=False, block_size=len(lines)),
        arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _vote_columns(votes: pa.ListArray, first: int, numbers: dict[str, int]) -> VoteColumns:
    """The votes of rows from `first` on. `numbers` learns of new principles."""
    each = votes.flatten()
    principle, order = (each.field(name).dictionary_encode() for name in ("principle", "order"))
    number = np.array([numbers.setdefault(id, len(numbers)) for id in principle.dictionary.to_pylist()], dtype=np.int64)
    swapped = np.array([order == "ba" for order in order.dictionary.to_pylist()], dtype=bool)
    return VoteColumns(
        np.repeat(np.arange(first, first + len(votes)), votes.value_lengths().to_numpy()),
        number[principle.indices.to_numpy()],
        swapped[order.indices.to_numpy()],
        each.field("log_odds").to_numpy(),
    )
