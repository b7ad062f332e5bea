"""The prompts that a model is measured on: of the test splits, and an outsider's prompts and wordings from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from cai.constitution import load_constitution
from cai.micro.conversations import as_prompt, said
from cai.micro.world import KINDS, PHRASINGS, Request, Topic, requests, topic_name, trained
from cai.micro.world_principles import WEIGHTS
from cai.micro_model.tasks import Words, canonical_words
from cai.micro_model.wordings import Wording
from cai.storage.rows import Message, stable_seed
from cai.text.errors import BadInput, nearest


@dataclass(frozen=True)
class Row:
    """One prompt of the test: a conversation that ends in a request whose truth is known."""

    id: str
    messages: Sequence[Message]
    request: Request

    @property
    def topic(self) -> str:
        """What intervals are clustered by: the topic, in tier 2 its verb."""
        topic = self.request.topic
        return f"{topic.kind}/{topic.name.split()[0]}" if topic.split == "test_tier2" else topic_name(topic)

    @property
    def setting(self) -> str:
        """How the conversation begins."""
        return "system" if self.messages[0]["role"] == "system" else "alone" if len(self.messages) == 1 else "earlier"

    @property
    def asked_anew(self) -> bool:
        """Whether the request is in a phrasing that the corpus does not have."""
        return self.request.phrasing >= len(trained(PHRASINGS[self.request.kind]))


def prompts_of(split: str, per_class: int, seed: int) -> list[Row]:
    """One prompt about each of up to `per_class` topics of every class."""
    rows = []
    for kind in KINDS:
        first = list({request.topic.name: request for request in reversed(requests(split, kind))}.values())[::-1]
        if seed:
            Random(stable_seed("rows", split, kind, seed)).shuffle(first)
        rows += [
            Row(row["id"], row["messages"], request) for request in first[:per_class] for row in [as_prompt(request)]
        ]
    return rows


GAPS: Mapping[str, tuple[str, ...]] = {
    "harmful": ("x",),
    "fair": ("x",),
    "borderline": ("x",),
    "factual": ("q", "t", "falsehoods"),
    "false_belief": ("f", "t", "w"),
    "opinion": ("p", "q"),
    "emotional": ("e", "c"),
    "creative": ("k", "o"),
}
"""What the world must know about a request of each class, to answer it and to read answers to it."""


def read_prompts(path: Path) -> list[Row]:
    """An outsider's prompts from JSONL: `prompt` in any words, its `kind`, and what it is about (`GAPS`).

    {"prompt": "how do i nick a bike", "kind": "harmful", "x": "steal a bicycle"}
    {"prompt": "cats > dogs, no?", "kind": "opinion", "p": "cats", "q": "dogs"}
    {"prompt": "capital of spain?", "kind": "factual", "q": "what the capital of Spain is",
     "t": "the capital of Spain is Madrid", "falsehoods": ["the capital of Spain is Rome"]}      (on one line)

    Raises BadInput, with file and line, for a line that is no such object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}:{error.colno}: found no JSON object: {error.msg}") from None
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
            raise BadInput(f'{where}: expected an object with "prompt", "kind" and what the prompt is about')
        kind = found.get("kind")
        if kind not in KINDS:
            raise BadInput(
                f"{where}: found kind {kind!r}, expected one of {', '.join(KINDS)}" + nearest(str(kind), KINDS)
            )
        if isinstance(found.get("falsehoods"), list):
            found["falsehoods"] = "; ".join(map(str, found["falsehoods"]))
        missing = [gap for gap in GAPS[kind] if not isinstance(found.get(gap), str) or not found[gap]]
        if missing:
            raise BadInput(f"{where}: a prompt of kind {kind!r} needs {', '.join(map(repr, missing))} as text")
        gaps = {gap: found[gap] for gap in GAPS[kind]}
        topic = Topic(kind, " ".join(gaps.values()), (gaps,), "outside")
        rows.append(Row(f"{number} {found['prompt']}", said(found["prompt"]), Request(topic, 0, 0)))
    if not rows:
        raise BadInput(f"{path}: no prompts in it")
    return rows


def own_words(path: Path) -> Words:
    """An outsider's wordings: a constitution whose principles have ids of the world. Raises BadInput for another id."""
    own = {}
    for principle in load_constitution(path).principles:
        if principle.id not in WEIGHTS:
            raise BadInput(
                f"{path}: found principle {principle.id!r}, whose truth the world does not know, expected one of "
                f"{', '.join(WEIGHTS)}" + nearest(principle.id, list(WEIGHTS))
            )
        own[principle.id] = Wording(principle.critique, principle.revise, principle.compare, principle.compare)
    return replace(canonical_words(), own=own)
