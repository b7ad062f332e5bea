"""Which responses are compared: the pairs that a judge is asked about.

Pairs, and which response of each is *a*, depend on the stage's seed and the prompt, not on the order of rows. Responses
with the same text count as one.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cai.contracts.context import Context
from cai.feedback.votes import is_empty
from cai.storage.rows import Candidate, Pair, Preference, Sample, stable_id

PairKind = Literal["disjoint", "all", "random", "against"]
"""How the responses to a prompt are paired."""


def select_responses(responses: Sequence[Sample], cut_off: str) -> tuple[list[Sample], dict[str, int]]:
    """The responses that may be in a pair, and counts of the others by reason: cut_off, empty."""
    kept = []
    left_out: Counter[str] = Counter()
    for row in responses:
        if is_empty(row["response"]):
            left_out["empty"] += 1
        elif cut_off == "leave_out" and row["finish_reason"] == "length":
            left_out["cut_off"] += 1
        else:
            kept.append(row)
    return kept, {reason: left_out[reason] for reason in ("cut_off", "empty")}


def pair_responses(
    responses: Sequence[Sample], kind: PairKind, n_random: int, context: Context
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of each prompt, prompts in the order of their first response, and counts of responses in no pair.

    Pairs, and which response of each is *a*, depend on the stage's seed and the prompt, not on the order of rows.
    """
    responses_by_prompt: dict[str, dict[str, Sample]] = {}
    for row in responses:
        responses_by_prompt.setdefault(row["prompt_id"], {}).setdefault(row["response"], row)
    pairs = []
    paired_ids: set[str] = set()
    for prompt_id, row_by_text in responses_by_prompt.items():
        rng = random.Random(context.seed_for(prompt_id))
        rows = sorted(row_by_text.values(), key=lambda row: row["id"])
        rng.shuffle(rows)
        for a, b in _choose_pairs(rows, kind, n_random, rng):
            paired_ids |= {a["id"], b["id"]}
            pairs.append(_of_samples(context.stage_id, a, b))
    n_different = sum(map(len, responses_by_prompt.values()))
    return pairs, {"same_text": len(responses) - n_different, "unpaired": n_different - len(paired_ids)}


def pair_against(stages: Sequence[Sequence[Sample]], stage_id: str) -> tuple[list[Pair], dict[str, Any]]:
    """The responses of the first stage as *a*, each paired with those of the other stages to the same prompt under the
    same seed, and counts of responses in no pair. Cut-off and empty responses are compared like all others."""
    opponents_by_stage = [{(row["prompt_id"], row["seed"]): row for row in rows} for rows in stages[1:]]
    pairs = []
    n_same_text, paired_ids = 0, set[str]()
    for a in stages[0]:
        for opponents in opponents_by_stage:
            if (b := opponents.get((a["prompt_id"], a["seed"]))) is None:
                continue
            if a["response"] == b["response"]:
                n_same_text += 1
                continue
            paired_ids |= {a["id"], b["id"]}
            pairs.append(_of_samples(stage_id, a, b))
    return pairs, {"same_text": n_same_text, "unpaired": sum(map(len, stages)) - len(paired_ids)}


def pairs_of_people(preferences: Sequence[Preference], source: str, stage_id: str) -> list[Pair]:
    """Each pair that people labelled once, *a* the response with the lower id; `human` is the share of labels for it.

    `source` stands for the model of the responses.
    """
    pairs: dict[str, Pair] = {}
    labels: dict[str, list[float]] = {}
    for preference in preferences:
        chosen, rejected = (
            Candidate(id=stable_id(preference["prompt_id"], text), text=text, model=source)
            for text in (preference["chosen"][-1]["content"], preference["rejected"][-1]["content"])
        )
        a, b = sorted((chosen, rejected), key=lambda candidate: candidate["id"])
        labels.setdefault(preference["pair_id"], []).append(float(a is chosen))
        pairs[preference["pair_id"]] = _to_pair(stage_id, preference, preference["tags"], a, b)
    return [{**pair, "human": float(np.mean(labels[pair_id]))} for pair_id, pair in pairs.items()]


def _of_samples(stage_id: str, a: Sample, b: Sample) -> Pair:
    """The pair of two sampled responses to one prompt."""
    sides = (Candidate(id=row["id"], text=row["response"], model=row["model"]) for row in (a, b))
    return _to_pair(stage_id, a, list(dict.fromkeys([*a["tags"], *b["tags"]])), *sides)


def _to_pair(stage_id: str, row: Sample | Preference, tags: list[str], a: Candidate, b: Candidate) -> Pair:
    """The pair of two responses to the prompt of `row`."""
    return {
        "id": stable_id(stage_id, a["id"], b["id"]),
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "tags": tags,
        "a": a,
        "b": b,
    }


def _choose_pairs(rows: list[Sample], kind: PairKind, n_random: int, rng: random.Random) -> list[tuple[Sample, Sample]]:
    """The pairs among shuffled responses to one prompt."""
    if kind == "disjoint":
        return list(zip(rows[::2], rows[1::2], strict=False))
    all_pairs = list(itertools.combinations(rows, 2))
    return all_pairs if kind == "all" else rng.sample(all_pairs, min(n_random, len(all_pairs)))
