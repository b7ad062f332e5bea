"""What a judge was asked about, in which words, and why votes are missing: a principle that always failed has no vote.

A judge stage counts both in its figures. For a stage of an earlier version, which does not, failed votes are counted
from failures.jsonl, where a pair without any vote is one failure that names no principle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.journal import read_failures
from cai.storage.rows import Failure
from cai.text.left_out import count_causes


class MissingVote(NamedTuple):
    """A vote that a judge was asked for and that is not there."""

    principle: str
    failure: Failure


class AskedVotes(TypedDict):
    """What a judge was asked for by one principle; counts are of pairs."""

    asked: int | None
    """None for a stage of an earlier version."""
    failed: int
    failures: dict[str, int]
    """Why votes are missing, with the number of pairs."""


def missing_votes(failures: Iterable[Failure], asked: Mapping[str, Sequence[str]]) -> Iterator[MissingVote]:
    """Each vote that is missing once; `asked` are the ids of the principles that each pair was judged by.

    A failure is a pair's, for all its principles, or a question's, whose id begins with pair, order and principle.
    """
    missing: set[tuple[str, str]] = set()
    for failure in failures:
        pair, _, question = failure.id.partition("/")
        for principle in question.split("/")[1:2] or asked.get(pair, ()):
            if (pair, principle) not in missing:
                missing.add((pair, principle))
                yield MissingVote(principle, failure)


def count_asked_votes(
    principles: Iterable[str], asked: Mapping[str, Sequence[str]], missing: Iterable[MissingVote]
) -> dict[str, AskedVotes]:
    """What was asked for by each of the `principles`, also by one that applied to no pair."""
    counts = dict.fromkeys(principles, 0)
    for ids in asked.values():
        for id in ids:
            counts[id] += 1
    failures: defaultdict[str, list[Failure]] = defaultdict(list)
    for vote in missing:
        failures[vote.principle].append(vote.failure)
    return {
        id: {"asked": n, "failed": len(failures[id]), "failures": count_causes(failures[id])}
        for id, n in counts.items()
    }


def read_asked_votes(judge_folders: Iterable[Path]) -> dict[str, AskedVotes]:
    """What finished judge stages were asked for by each principle, all stages together."""
    total: dict[str, AskedVotes] = {}
    for folder in judge_folders:
        for id, votes in _of_stage(folder).items():
            sum_so_far = total.setdefault(id, {"asked": 0, "failed": 0, "failures": {}})
            is_known = sum_so_far["asked"] is not None and votes["asked"] is not None
            sum_so_far["asked"] = (sum_so_far["asked"] or 0) + (votes["asked"] or 0) if is_known else None
            sum_so_far["failed"] += votes["failed"]
            for cause, n in votes["failures"].items():
                sum_so_far["failures"][cause] = sum_so_far["failures"].get(cause, 0) + n
    return total


def read_failed_pairs(judge_folders: Iterable[Path]) -> dict[str, int]:
    """Why pairs of finished judge stages have no vote of any principle, with their number."""
    failures = (Failure.from_json(fields) for folder in judge_folders for fields in read_failures(folder))
    return count_causes(failure for failure in failures if "/" not in failure.id)


def changed_wordings(before: Iterable[Path], after: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Id of a principle to its words `before` and `after`, where two lists of judge stages asked about it in others."""
    words_before, words_after = _wordings(before), _wordings(after)
    return {
        id: {"before": words, "after": words_after[id]}
        for id, words in words_before.items()
        if words_after.get(id, words) != words
    }


def _wordings(judge_folders: Iterable[Path]) -> dict[str, str]:
    """What judge stages asked about each principle; several texts where stages ask differently, as by points."""
    texts: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for folder in judge_folders:
        parts: dict[str, Any] = (read_json(folder / run_folder.STAGE) or {}).get("parts", {})
        for id in parts.get("principles", []):
            for field in ("compare", "critique"):
                if text := parts.get(f"principle.{id}.{field}"):
                    texts[id][text] = None
    return {id: " / ".join(of_principle) for id, of_principle in texts.items()}


def _of_stage(folder: Path) -> dict[str, AskedVotes]:
    facts: dict[str, Any] = read_json(folder / run_folder.STAGE) or {}
    for figures in facts.get("figures", {}).get("votes", {}).values():
        if "principles" in figures:
            counted: dict[str, AskedVotes] = figures["principles"]
            return counted
    named = facts.get("config", {}).get("principles")
    ids: list[str] = named if isinstance(named, list) else facts.get("parts", {}).get("principles", [])
    missing = list(missing_votes(map(Failure.from_json, read_failures(folder)), {}))
    counts = count_asked_votes([*ids, *(vote.principle for vote in missing)], {}, missing)
    return {id: {**votes, "asked": None} for id, votes in counts.items()}
