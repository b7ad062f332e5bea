"""Reads the votes of finished judge stages: 100,000 pairs have millions of votes, so Arrow parses them into columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cai.maths.vote_aggregation import Bools, Floats, VoteColumns, log_odds_by_order
from cai.storage.rows import vote_unit
from cai.text.errors import BadInput

if TYPE_CHECKING:
    import pyarrow as pa

VOTES_KEY = b',"votes":['
"""Start of a row's votes, its last key since keys are sorted. Quotation marks inside texts are escaped."""
READ_BYTES = 8 << 20
"""Bytes that are read at once, plus the rest of the last line."""
PARSE_ROWS = 32
"""Rows that are parsed at once: few enough to stay in a core's cache until they are written."""


class StoredVotes(NamedTuple):
    """Vote rows without their votes, unparsed, and the votes of all rows as columns."""

    unparsed_rows: list[bytes]
    methods: frozenset[str]
    """How the judges were asked."""
    units_by_file: tuple[frozenset[str], ...]
    """Units of the votes in each file (`cai.storage.rows.vote_unit`)."""
    is_rated: Bools
    """Whether the judge of the pair rates, so that its votes are in points, (pairs,)."""
    human: Floats
    """Probability that *a* is better by people, (pairs,); NaN where nobody labelled the pair."""
    principles: list[str]
    columns: VoteColumns

    @property
    def n_pairs(self) -> int:
        return len(self.unparsed_rows)

    def log_odds_by_order(self, points_per_nat: float | None = None) -> tuple[Floats, Floats]:
        """Log-odds with *a* and with *b* shown first, each (pairs, principles); NaN without a vote in both orders.

        Points of a judge that rates are divided by `points_per_nat`. Raises BadInput where votes are in points and
        nothing says how many are worth a nat.
        """
        columns = self.columns
        if self.is_rated.any():
            if points_per_nat is None:
                raise BadInput(
                    "found votes in points, expected a `prefer` stage with `points_per_nat`; an earlier version made "
                    "this stage: run the recipe again"
                )
            in_nats = np.where(self.is_rated[columns.pair], columns.log_odds / points_per_nat, columns.log_odds)
            columns = columns._replace(log_odds=in_nats)
        return log_odds_by_order(columns, self.n_pairs, len(self.principles))

    def parsed_rows(self) -> Iterator[dict[str, Any]]:
        """The rows without their votes, parsed a few at a time: holding 100,000 dictionaries would be slow."""
        for start in range(0, self.n_pairs, PARSE_ROWS):
            yield from json.loads(b"[" + b"},".join(self.unparsed_rows[start : start + PARSE_ROWS]) + b"}]")


def read_votes(paths: Iterable[Path]) -> StoredVotes:
    """The votes of several files of vote rows."""
    unparsed_rows, methods, numbers = list[bytes](), set[str](), dict[str, int]()
    units_by_file: list[frozenset[str]] = []
    no_ints = np.zeros(0, dtype=np.int64)
    parts = [VoteColumns(no_ints, no_ints, no_ints.astype(bool), no_ints.astype(float))]
    human, is_rated = [no_ints.astype(float)], [no_ints.astype(bool)]
    for path in paths:
        units: set[str] = set()
        with path.open("rb") as file:
            while lines := file.read(READ_BYTES) + file.readline():
                table = _parse_votes(lines)
                parts.append(_vote_columns(table["votes"].chunk(0), len(unparsed_rows), numbers))
                human.append(table["human"].chunk(0).to_numpy(zero_copy_only=False).astype(float))
                methods_and_scales = list(zip(*(table[name].to_pylist() for name in ("method", "scale")), strict=True))
                methods |= {method or "pairwise" for method, _ in set(methods_and_scales)}
                units |= {vote_unit(method, scale) for method, scale in set(methods_and_scales)}
                is_rated.append(np.array([method == "rating" for method, _ in methods_and_scales], dtype=bool))
                unparsed_rows += _rows_before_votes(lines)
        units_by_file.append(frozenset(units))
    principles = sorted(numbers)
    # Alphabetical columns make sums equal to the last bit whatever the order of rows.
    column_of_number = np.argsort(np.array([numbers[id] for id in principles], dtype=np.int64))
    pair, principle, swapped, log_odds = (np.concatenate(column) for column in zip(*parts, strict=True))
    columns = VoteColumns(pair, column_of_number[principle], swapped, log_odds)
    return StoredVotes(
        unparsed_rows, frozenset(methods), tuple(units_by_file), np.concatenate(is_rated), np.concatenate(human),
        principles, columns,
    )  # fmt: skip


def _rows_before_votes(lines: bytes) -> Iterator[bytes]:
    """The part of each line before its votes."""
    start = 0
    while (end := lines.find(VOTES_KEY, start)) >= 0:
        yield lines[start:end]
        start = lines.index(b"\n", end) + 1


def _parse_votes(lines: bytes) -> pa.Table:
    """The fields that labels are made of, as columns; Arrow skips everything else in the lines."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    vote = pa.struct([("principle", pa.string()), ("order", pa.string()), ("log_odds", pa.float64())])
    schema = pa.schema(
        [("votes", pa.list_(vote)), ("method", pa.string()), ("scale", pa.int64()), ("human", pa.float64())]
    )
    return arrow_json.read_json(
        pa.BufferReader(lines),
        arrow_json.ReadOptions(use_threads=False, block_size=len(lines)),
        arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _vote_columns(votes: pa.ListArray, first_pair: int, numbers: dict[str, int]) -> VoteColumns:
    """The votes of the pairs from `first_pair` on. New principles are added to `numbers`."""
    flat_votes = votes.flatten()
    principle, order = (flat_votes.field(name).dictionary_encode() for name in ("principle", "order"))
    number = np.array([numbers.setdefault(id, len(numbers)) for id in principle.dictionary.to_pylist()], dtype=np.int64)
    swapped = np.array([order == "ba" for order in order.dictionary.to_pylist()], dtype=bool)
    return VoteColumns(
        np.repeat(np.arange(first_pair, first_pair + len(votes)), votes.value_lengths().to_numpy()),
        number[principle.indices.to_numpy()],
        swapped[order.indices.to_numpy()],
        flat_votes.field("log_odds").to_numpy(),
    )
