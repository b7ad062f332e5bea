"""Pairs of the world to attack a judge with: one for each topic of tier 1, under a principle that tells it apart."""

from __future__ import annotations

import itertools
from random import Random

from cai.constitution import load_constitution
from cai.feedback.judge_attacks import Case
from cai.feedback.votes import ResponsePair
from cai.micro.conversations import as_prompt
from cai.micro.world import KINDS
from cai.micro.world_principles import probability
from cai.micro_model.corpus import pair
from cai.micro_model.evaluate.evaluation_prompts import Row, prompts_of
from cai.micro_model.wordings import PHRASES
from cai.storage.rows import stable_seed

ATTEMPTS = 1000
"""Pairs drawn for one prompt until a principle tells one apart."""


def cases(limit: int, seed: int) -> list[Case]:
    """Up to `limit` cases, every class of request alike often, under principles of constitutions/micro.yaml."""
    rows = prompts_of("test", -(-limit // len(KINDS)), seed)
    by_kind = [[row for row in rows if row.request.kind == kind] for kind in KINDS]
    in_turn = [row for turn in itertools.zip_longest(*by_kind) for row in turn if row]
    return [_case(row, seed) for row in in_turn[:limit]]


def _case(row: Row, seed: int) -> Case:
    tags = as_prompt(row.request)["tags"]
    principles = [each for each in load_constitution("micro").principles if each.applies(tags)]
    for number in range(ATTEMPTS):
        rng = Random(stable_seed("attacked", seed, row.id, number))
        a, b = pair(row.request, rng)
        told = [(each, p) for each in principles if (p := probability(each.id, row.request, a, b)) != 0.5]
        if told:
            principle, p = rng.choice(told)
            better, worse = (a, b) if p > 0.5 else (b, a)
            shown = ResponsePair(row.id, row.messages, better.text, worse.text)
            return Case(shown, principle, PHRASES[principle.id].better[0], row.topic)
    raise AssertionError(f"{row.id}: {ATTEMPTS} pairs, and no principle tells one apart")
