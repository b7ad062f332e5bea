"""Pairs of the world to attack a judge with: one a topic of tier 1, under a principle that separates it."""

from __future__ import annotations

import itertools
from random import Random

from cai.constitution import applicable_principles, load_constitution
from cai.feedback.judge_attacks import Case
from cai.feedback.votes import ResponsePair
from cai.micro.conversations import tags_of
from cai.micro.world import KINDS
from cai.micro.world_principles import probability
from cai.micro_model.corpus import sample_pair
from cai.micro_model.evaluate.evaluation_prompts import EvaluationPrompt, select_prompts
from cai.micro_model.principle_wordings import PHRASES
from cai.storage.rows import stable_seed

ATTEMPTS = 1000
"""Pairs sampled for one prompt until a principle separates one."""


def cases(limit: int, seed: int) -> list[Case]:
    """Up to `limit` cases, equally many of every class of request, under principles of constitutions/micro.yaml."""
    prompts = select_prompts("test", -(-limit // len(KINDS)), seed)
    by_kind = [[prompt for prompt in prompts if prompt.request.kind == kind] for kind in KINDS]
    in_turn = [prompt for turn in itertools.zip_longest(*by_kind) for prompt in turn if prompt]
    return [_case(prompt, seed) for prompt in in_turn[:limit]]


def _case(prompt: EvaluationPrompt, seed: int) -> Case:
    request = prompt.request
    principles = applicable_principles(load_constitution("micro").principles, tags_of(request))
    for attempt in range(ATTEMPTS):
        rng = Random(stable_seed("attacked", seed, prompt.id, attempt))
        a, b = sample_pair(request, rng)
        truths = [(principle, probability(principle.id, request, a, b)) for principle in principles]
        separating = [(principle, p_a) for principle, p_a in truths if p_a != 0.5]
        if separating:
            principle, p_a = rng.choice(separating)
            better, worse = (a, b) if p_a > 0.5 else (b, a)
            pair = ResponsePair(prompt.id, prompt.messages, better.text, worse.text)
            return Case(pair, principle, PHRASES[principle.id].better[0], prompt.topic)
    raise AssertionError(f"{prompt.id}: no principle separates any of {ATTEMPTS} pairs")
