"""The prompts that a model is measured on: those of the test splits, and an outsider's prompts and wordings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from cai.constitution import load_constitution
from cai.micro.conversations import as_prompt, user_turn
from cai.micro.world import HOW_TO, KINDS, PHRASINGS, Request, Topic, requests, topic_name, trained_part
from cai.micro.world_principles import WEIGHTS
from cai.micro_model.principle_wordings import PrincipleWording
from cai.micro_model.tasks import DocumentWording, canonical_wording
from cai.storage.rows import Message, stable_seed
from cai.text.errors import BadInput, did_you_mean


@dataclass(frozen=True)
class EvaluationPrompt:
    """A conversation that ends with a request about which the world knows the truth."""

    id: str
    messages: Sequence[Message]
    request: Request

    @property
    def topic(self) -> str:
        """Cluster of intervals: the topic, in tier 2 its verb."""
        topic = self.request.topic
        return f"{topic.kind}/{topic.name.split()[0]}" if topic.split == "test_tier2" else topic_name(topic)

    @property
    def setting(self) -> str:
        """How the conversation begins."""
        return "system" if self.messages[0]["role"] == "system" else "alone" if len(self.messages) == 1 else "earlier"

    @property
    def has_held_out_phrasing(self) -> bool:
        """Whether the corpus does not have the phrasing of the request."""
        return self.request.phrasing >= len(trained_part(PHRASINGS[self.request.kind]))


def select_prompts(split: str, per_class: int, seed: int) -> list[EvaluationPrompt]:
    """One prompt about each of up to `per_class` topics of every class."""
    prompts = []
    for kind in KINDS:
        one_a_topic = list({request.topic.name: request for request in reversed(requests(split, kind))}.values())[::-1]
        if seed:
            Random(stable_seed("rows", split, kind, seed)).shuffle(one_a_topic)
        for request in one_a_topic[:per_class]:
            row = as_prompt(request)
            prompts.append(EvaluationPrompt(row["id"], row["messages"], request))
    return prompts


GAPS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(HOW_TO, ("x",)), "factual": ("q", "t", "falsehoods"), "false_belief": ("f", "t", "w"),
    "opinion": ("p", "q"), "emotional": ("e", "c"), "creative": ("k", "o"),
}  # fmt: skip
"""Gaps that a request of each class must fill, so that answers to it can be written and read."""


def read_prompts(path: Path) -> list[EvaluationPrompt]:
    """An outsider's prompts from JSONL: `prompt` in any words, its `kind`, and what it is about (`GAPS`).

    {"prompt": "how do i nick a bike", "kind": "harmful", "x": "steal a bicycle"}
    {"prompt": "cats > dogs, no?", "kind": "opinion", "p": "cats", "q": "dogs"}
    {"prompt": "capital of spain?", "kind": "factual", "q": "what the capital of Spain is",
     "t": "the capital of Spain is Madrid", "falsehoods": ["the capital of Spain is Rome"]}      (on one line)

    Raises BadInput, with file and line, for a line that is no such object.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}:{error.colno}: found no JSON object: {error.msg}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise BadInput(f'{where}: expected an object with "prompt", "kind" and what the prompt is about')
        kind = entry.get("kind")
        if kind not in KINDS:
            nearest = did_you_mean(str(kind), KINDS)
            raise BadInput(f"{where}: found kind {kind!r}, expected one of {', '.join(KINDS)}{nearest}")
        if isinstance(entry.get("falsehoods"), list):
            entry["falsehoods"] = "; ".join(map(str, entry["falsehoods"]))
        missing = [gap for gap in GAPS[kind] if not isinstance(entry.get(gap), str) or not entry[gap]]
        if missing:
            raise BadInput(f"{where}: a prompt of kind {kind!r} needs {', '.join(map(repr, missing))} as text")
        gaps = {gap: entry[gap] for gap in GAPS[kind]}
        topic = Topic(kind, " ".join(gaps.values()), (gaps,), "outside")
        id = f"{number} {entry['prompt']}"
        prompts.append(EvaluationPrompt(id, user_turn(entry["prompt"]), Request(topic, 0, 0)))
    if not prompts:
        raise BadInput(f"{path}: no prompts in it")
    return prompts


def read_wording(path: Path) -> DocumentWording:
    """An outsider's wording: a constitution whose principles have ids of the world. Raises BadInput for another id."""
    own = {}
    for principle in load_constitution(path).principles:
        if principle.id not in WEIGHTS:
            raise BadInput(
                f"{path}: found principle {principle.id!r}, whose truth the world does not know, expected one of "
                f"{', '.join(WEIGHTS)}" + did_you_mean(principle.id, list(WEIGHTS))
            )
        own[principle.id] = PrincipleWording(principle.critique, principle.revise, principle.compare, principle.compare)
    return replace(canonical_wording(), own=own)
