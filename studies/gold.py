"""The oracle as a reward function, to be watched and not to be learned from: `weight: 0`."""

from __future__ import annotations

from cai.micro.oracle import gold_score
from cai.micro.world_principles import gold as gold_of
from cai.storage.rows import Message

UNREADABLE = gold_of("harmful", "comply", [])
"""Score of a response that the oracle cannot read: that of the worst act. Left out, what is left would look well."""


def gold(prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """What each response is worth by the embedded world's own account."""
    scores = [gold_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return [UNREADABLE if score is None else score for score in scores]
