"""The small world: what can be asked in it, and which prompts are for training and which are held out.

A prompt is a topic (a verb with an object, a fact, a pair of opinions, a feeling with its cause) in one of several
phrasings. Held out twice: split `test` has known topics in requests that neither the corpus nor the splits `train` and
`validation` contain (a false belief's or an opinion's phrasing may occur there with another of its variants); split
`test_topics` has topics that the corpus has no dialogue about: combinations of verb and object occur nowhere, their
parts do. A fact counts as two topics, once asked and once as a false belief, and often only one of them is held out.
Left out: several turns, system messages and creative requests. Harmful topics are words only: no answer has real
instructions.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cai.errors import BadInput, nearest
from cai.micro import phrases, topics
from cai.records import Prompt, stable_id, stable_seed

KINDS = ("harmful", "fair", "borderline", "factual", "false_belief", "opinion", "emotional")
HOW_TO = ("harmful", "fair", "borderline")
TAGS = ("red_team", "helpful", *KINDS)
"""What a prompt set selects by; a prompt has a tag for its topic too."""
SPLITS = ("train", "validation", "test", "test_topics")

PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "harmful": phrases.REQUESTS,
    "fair": phrases.REQUESTS,
    "borderline": phrases.REQUESTS,
    "factual": phrases.QUESTIONS,
    "false_belief": phrases.BELIEFS,
    "opinion": phrases.VIEWS,
    "emotional": phrases.MOODS,
}
HELD_OUT_SHARE = {"harmful": 0.3, "fair": 0.3, "borderline": 0.25}
"""Share of topics in `test_topics`; a fifth where a class is not named."""

MIX = ("harmful", "fair", "borderline", "harmful", "false_belief", "factual", "harmful", "fair", "opinion", "emotional")
"""The cycle of classes in which prompts are ordered, so that every prefix is balanced."""


@dataclass(frozen=True)
class Topic:
    """What a prompt is about. `variants` fill the gaps of its phrasings: sides of an opinion, several false values."""

    kind: str
    name: str
    variants: tuple[Mapping[str, str], ...]
    held_out: bool


@dataclass(frozen=True)
class Request:
    """One prompt of the world: a topic's variant in one phrasing."""

    topic: Topic = field(repr=False)
    variant: int
    phrasing: int

    @property
    def kind(self) -> str:
        return self.topic.kind

    @property
    def gaps(self) -> Mapping[str, str]:
        """What fills the phrasing, and what an answer needs: `t` is the true sentence, `w` the false value."""
        return self.topic.variants[self.variant]

    @property
    def text(self) -> str:
        return PHRASINGS[self.kind][self.phrasing].format_map(self.gaps)

    @property
    def falsehoods(self) -> tuple[str, ...]:
        """False sentences about the fact that the request is about."""
        return tuple(self.gaps["falsehoods"].split("; ")) if "falsehoods" in self.gaps else ()


@functools.cache
def all_topics() -> tuple[Topic, ...]:
    """Every topic of the world, always in the same order."""
    found = list(itertools.chain(_how_to_topics(), _fact_topics(), _opinion_topics(), _emotional_topics()))
    held = _held_out([(kind, name) for kind, name, _ in found])
    return tuple(Topic(kind, name, variants, (kind, name) in held) for kind, name, variants in found)


Parts = tuple[str, str, tuple[Mapping[str, str], ...]]


def _held_out(names: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Topics of split `test_topics`: the stated share of each class, each of their words left in two others or more."""
    held: set[tuple[str, str]] = set()
    left = Counter(word for kind, name in names if kind in HOW_TO for word in set(name.split()))
    for kind in KINDS:
        own = sorted((name for k, name in names if k == kind), key=lambda name: stable_id("held out", kind, name))
        wanted = round(len(own) * HELD_OUT_SHARE.get(kind, 0.2))
        for name in own:
            words = set(name.split()) if kind in HOW_TO else set()
            if wanted and all(left[word] > 2 for word in words):
                held.add((kind, name))
                left.subtract(words)
                wanted -= 1
    return held


def _how_to_topics() -> Iterator[Parts]:
    families = {
        "harmful": topics.HARMFUL_FAMILIES,
        "fair": topics.FAIR_FAMILIES,
        "borderline": topics.BORDERLINE_FAMILIES,
    }
    for kind, groups in families.items():
        for verbs, objects in groups:
            for verb, thing in itertools.product(verbs, objects):
                yield kind, f"{verb} {thing}", ({"x": f"{verb} {thing}"},)


def _fact_topics() -> Iterator[Parts]:
    for group, (asked, sentence, values) in topics.FACTS.items():
        for k, v in values.items():
            true = sentence.format(k=k, v=v)
            others = sorted(set(values.values()) - {v}, key=lambda other: stable_id(group, k, other))[:3]
            false = "; ".join(sentence.format(k=k, v=w) for w in others)
            yield "factual", f"{group} {k}", ({"q": asked.format(k=k), "t": true, "falsehoods": false},)
            yield (
                "false_belief",
                f"{group} {k}",
                tuple({"f": sentence.format(k=k, v=w), "t": true, "w": w} for w in others),
            )


def _opinion_topics() -> Iterator[Parts]:
    for p, q in topics.OPINIONS:
        yield "opinion", f"{p} or {q}", ({"p": p, "q": q}, {"p": q, "q": p})


def _emotional_topics() -> Iterator[Parts]:
    for e, c in itertools.product(topics.FEELINGS, topics.CAUSES):
        yield "emotional", f"{e} because {c}", ({"e": e, "c": c},)


def requests(split: str, kind: str) -> list[Request]:
    """Every request of one class in one split, in an order that names each topic once before any twice."""
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise BadInput(f"no split {split!r} of source micro, expected one of {known}" + nearest(split, SPLITS))
    return list(_requests(split, kind))


@functools.cache
def _requests(split: str, kind: str) -> tuple[Request, ...]:
    ranked = []
    for topic in all_topics():
        if topic.kind != kind or topic.held_out != (split == "test_topics"):
            continue
        found = [
            Request(topic, variant, phrasing)
            for variant in range(len(topic.variants))
            for phrasing in _phrasings(topic, variant, split)
        ]
        found.sort(key=lambda request: stable_id("order", split, request.text))
        ranked += [(rank, stable_id("topic", split, topic.name), request) for rank, request in enumerate(found)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(request for _, _, request in ranked)


def _phrasings(topic: Topic, variant: int, split: str) -> list[int]:
    count = len(PHRASINGS[topic.kind])
    order = sorted(range(count), key=lambda i: stable_id("phrasing", topic.kind, topic.name, variant, i))
    test, validation = count // 4, 1
    parts = {
        "test": order[:test],
        "validation": order[test : test + validation],
        "train": order[test + validation :],
        "test_topics": order[: count // 4],
    }
    return sorted(parts[split])


@functools.cache
def _by_text() -> dict[str, Request]:
    return {
        request.text: request
        for topic in all_topics()
        for variant in range(len(topic.variants))
        for request in (Request(topic, variant, i) for i in range(len(PHRASINGS[topic.kind])))
    }


def find_request(text: str) -> Request | None:
    """The request that `text` is, or None where it is not of this world, letter for letter."""
    return _by_text().get(text.strip())


def as_prompt(request: Request) -> Prompt:
    """The row that recipes exchange."""
    return {
        "id": stable_id("micro", request.text),
        "messages": [{"role": "user", "content": request.text}],
        "tags": ["red_team" if request.kind == "harmful" else "helpful", request.kind, f"topic:{topic_name(request)}"],
        "source": "micro",
    }


def topic_name(request: Request) -> str:
    """The cluster of a request's figures: its class and topic in one word."""
    return f"{request.kind}/{request.topic.name}".replace(" ", "-").replace("'", "")


def prompts(split: str, tags: Sequence[str] = (), limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Prompts of a split that carry at least one of `tags`; every prefix is a balanced mix of the classes left.

    `seed` rotates which topics come first. Raises BadInput for an unknown split.
    """
    queues: dict[str, list[Request]] = {}
    for kind in KINDS:
        queue = requests(split, kind)
        if seed:
            random.Random(stable_seed(split, kind, seed)).shuffle(queue)
        queues[kind] = queue[::-1]
    rows: list[Prompt] = []
    while any(queues.values()):
        for kind in MIX:
            if queues[kind]:
                row = as_prompt(queues[kind].pop())
                if not tags or set(tags) & set(row["tags"]):
                    rows.append(row)
    return rows[:limit]
