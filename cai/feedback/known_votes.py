"""Votes that a judge need not be asked for, since an earlier folder of its stage holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.constitution import Principle
from cai.contracts.earlier import Earlier
from cai.contracts.stage_config import PrincipleField
from cai.feedback.methods import KnownVotes
from cai.storage.rows import Pair, PrincipleVote, Vote, stable_id


def take_over(
    pairs: Sequence[Pair], principles: Mapping[str, Sequence[Principle]], field: PrincipleField,
    earlier_folders: Sequence[Earlier],
) -> KnownVotes:  # fmt: skip
    """The votes in both orders that earlier folders of the stage hold: on the same texts, in the same words.

    By the pair's id and the principle's. A principle is known by its `field`, what the judge is asked, whatever its id
    was.
    """
    if not earlier_folders:
        return {}
    pair_by_content = {_content(pair): pair for pair in pairs}
    known: dict[str, dict[str, list[PrincipleVote]]] = {}
    for earlier in earlier_folders:
        earlier_ids = earlier.ids_by_words(field)
        for row in earlier.rows():
            pair = pair_by_content.get(_content(row))
            if pair is None:
                continue
            votes = known.setdefault(pair["id"], {})
            for principle in principles[pair["id"]]:
                earlier_id = earlier_ids.get(getattr(principle, field))
                both_orders = [vote.copy() for vote in row["votes"] if vote["principle"] == earlier_id]
                if both_orders and principle.id not in votes:
                    for vote in both_orders:
                        vote["principle"] = principle.id
                    votes[principle.id] = both_orders
    return known


def all_votes(
    principles: Sequence[Principle], known: Mapping[str, Sequence[PrincipleVote]]
) -> list[PrincipleVote] | None:
    """The known votes of all principles in their order; None where some are missing."""
    if any(principle.id not in known for principle in principles):
        return None
    return [vote for principle in principles for vote in known[principle.id]]


def _content(row: Pair | Vote) -> str:
    """What a judge is shown of a pair: the conversation and both texts."""
    return stable_id(row["prompt"], row["a"]["text"], row["b"]["text"])
