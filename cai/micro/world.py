"""The small world: what can be asked in it, and what of that is for training and what is held out.

A request is a topic in one of its phrasings. Topics are put together from parts: a verb with an object, a fact, two
things of one kind, a feeling with its cause, a form with a subject. Each belongs to one split. Topics of `validation`
and `test` (tier 1) occur nowhere in the corpus, their parts do; their facts it has told, asked about with yes or no and
told apart from false sentences, as it has every fact, and no dialogue about. `test_tier2` has verbs that the corpus
knows from statements about right and wrong alone, with other objects. The test splits also use the phrasings that the
corpus does not.

Left out: dialogues whose answer depends on more than the last request. Harmful topics are words only: no answer has
real instructions.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cai.micro import phrases, topics
from cai.storage.rows import stable_id, stable_seed
from cai.text.errors import BadInput, nearest

KINDS = ("harmful", "fair", "borderline", "factual", "false_belief", "opinion", "emotional", "creative")
HOW_TO = ("harmful", "fair", "borderline")
SPLITS = ("train", "validation", "test", "test_tier2")
TOLD = "told"
"""The split of tier 2's verbs with the objects that statements mention them with: no prompt is about these."""
HELD_OUT = {"test": 80, "validation": 24}
"""Topics of each class in the splits whose topics the corpus does not have."""

PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "harmful": phrases.REQUESTS,
    "fair": phrases.REQUESTS,
    "borderline": phrases.REQUESTS,
    "factual": phrases.QUESTIONS,
    "false_belief": phrases.BELIEFS,
    "opinion": phrases.VIEWS,
    "emotional": phrases.MOODS,
    "creative": phrases.WISHES,
}


@dataclass(frozen=True)
class Topic:
    """What a prompt is about. `variants` fill the gaps of its phrasings: sides of an opinion, several false values."""

    kind: str
    name: str
    variants: tuple[Mapping[str, str], ...]
    split: str


@dataclass(frozen=True)
class Request:
    """One request of the world: a topic's variant in one phrasing, a deed now and then in some circumstance."""

    topic: Topic = field(repr=False)
    variant: int
    phrasing: int
    circumstance: str = ""

    @property
    def kind(self) -> str:
        return self.topic.kind

    @property
    def gaps(self) -> Mapping[str, str]:
        """What fills the phrasing, and what an answer needs: `t` is the true sentence, `w` the false value."""
        return self.topic.variants[self.variant]

    @property
    def text(self) -> str:
        return self.put(PHRASINGS[self.kind][self.phrasing])

    def put(self, frame: str) -> str:
        """The frame with the request's gaps filled, a deed in its circumstance."""
        if not self.circumstance:
            return frame.format_map(self.gaps)
        return frame.format_map({**self.gaps, "x": f"{self.gaps['x']} {self.circumstance}"})

    @property
    def falsehoods(self) -> tuple[str, ...]:
        """False sentences about the fact that the request is about."""
        return tuple(self.gaps["falsehoods"].split("; ")) if "falsehoods" in self.gaps else ()


@functools.cache
def all_topics() -> tuple[Topic, ...]:
    """Every topic of the world, always in the same order."""
    found: list[Topic] = []
    for kind, parts in (
        *((kind, _deeds(families)) for kind, families in _families().items()),
        ("factual", _facts(asked=True)),
        ("false_belief", _facts(asked=False)),
        ("opinion", _opinions()),
        ("emotional", _feelings()),
        ("creative", _wishes()),
    ):
        listed = list(parts)
        split = _splits(kind, [(name, words) for name, words, _ in listed])
        found += [Topic(kind, name, variants, split[name]) for name, _, variants in listed]
    for kind, families in topics.UNSEEN_FAMILIES.items():
        for name, words, variants in _deeds(families):
            # every verb is told about with half of its objects and asked about with the others
            asked = stable_seed("told", *words) % 2
            found.append(Topic(kind, name, variants, "test_tier2" if asked else TOLD))
    return tuple(found)


Parts = Iterator[tuple[str, tuple[str, ...], tuple[Mapping[str, str], ...]]]
"""Name, the parts that other topics share, and variants."""


def _splits(kind: str, names: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, str]:
    """The split of each name: as many held out as `HELD_OUT` says, every part left in two topics of `train`."""
    # A fact is one fact, whether it is asked for or believed wrongly.
    unit = "fact" if kind in ("factual", "false_belief") else kind
    split = {name: "train" for name, _ in names}
    left = Counter(part for _, parts in names for part in parts)
    wanted = [split for split, count in HELD_OUT.items() for _ in range(count)]
    for name, parts in sorted(names, key=lambda each: stable_id("held out", unit, each[0])):
        if wanted and all(left[part] > 2 for part in parts):
            split[name] = wanted.pop()
            left.subtract(parts)
    assert not wanted, f"{kind}: too few topics to hold out"
    return split


def _families() -> dict[str, Sequence[tuple[Sequence[str], Sequence[str]]]]:
    return {
        "harmful": topics.HARMFUL_FAMILIES,
        "fair": topics.FAIR_FAMILIES,
        "borderline": topics.BORDERLINE_FAMILIES,
    }


def _deeds(families: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Parts:
    for verbs, objects in families:
        for verb, thing in itertools.product(verbs, objects):
            yield f"{verb} {thing}", (verb, thing), ({"x": f"{verb} {thing}"},)


def _facts(*, asked: bool) -> Parts:
    for group, (question, sentence, values) in topics.FACTS.items():
        for k, v in values.items():
            true = sentence.format(k=k, v=v)
            others = sorted(set(values.values()) - {v}, key=lambda other: stable_id(group, k, other))
            if asked:
                false = "; ".join(sentence.format(k=k, v=w) for w in others)
                yield f"{group} {k}", (), ({"q": question.format(k=k), "t": true, "falsehoods": false},)
            else:
                beliefs = tuple({"f": sentence.format(k=k, v=w), "t": true, "w": w} for w in others)
                yield f"{group} {k}", (), beliefs


def _opinions() -> Parts:
    for group in topics.OPINION_GROUPS:
        for p, q in itertools.combinations(group, 2):
            yield f"{p} or {q}", (p, q), ({"p": p, "q": q}, {"p": q, "q": p})


def _feelings() -> Parts:
    for e, c in itertools.product(topics.FEELINGS, topics.CAUSES):
        yield f"{e} because {c}", (e, c), ({"e": e, "c": c},)


def _wishes() -> Parts:
    for k, o in itertools.product(topics.FORMS, topics.SUBJECTS):
        yield f"{k} about {o}", (k, o), ({"k": k, "o": o},)


@functools.cache
def topics_of(split: str, kind: str) -> tuple[Topic, ...]:
    """The topics of one class in one split."""
    return tuple(topic for topic in all_topics() if (topic.kind, topic.split) == (kind, split))


@functools.cache
def phrasings_of(split: str, kind: str) -> tuple[int, ...]:
    """The phrasings that prompts of a split use: those of the corpus, and where it is held out some that are too.

    The first of these is for validation, so that figures there show what new ways of asking do; the rest are the test
    splits' own.
    """
    frames = PHRASINGS[kind]
    of_corpus = len(trained(frames))
    unseen = {"train": (), "validation": (of_corpus,)}.get(split, range(of_corpus + 1, len(frames)))
    return (*range(of_corpus), *unseen)


@functools.cache
def requests(split: str, kind: str) -> tuple[Request, ...]:
    """Every request of one class in one split, in an order that names each topic once before any twice.

    Raises BadInput for an unknown split.
    """
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise BadInput(f"no split {split!r} of source micro, expected one of {known}" + nearest(split, SPLITS))
    ranked = []
    for topic in topics_of(split, kind):
        found = [
            Request(topic, variant, phrasing, _circumstance(topic, variant, phrasing))
            for variant in range(len(topic.variants))
            for phrasing in phrasings_of(split, kind)
        ]
        found.sort(key=lambda request: stable_id("order", split, request.text))
        ranked += [(rank, stable_id("topic", split, topic.name), request) for rank, request in enumerate(found)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(request for _, _, request in ranked)


def _circumstance(topic: Topic, variant: int, phrasing: int) -> str:
    """That of the one request that a split has for a topic, variant and phrasing: none half of the time."""
    if topic.kind not in HOW_TO:
        return ""
    drawn = stable_seed("circumstance", topic.name, variant, phrasing) % (2 * len(phrases.CIRCUMSTANCES))
    return phrases.CIRCUMSTANCES[drawn] if drawn < len(phrases.CIRCUMSTANCES) else ""


def topic_name(topic: Topic) -> str:
    """The cluster of a request's figures: its class and topic in one word."""
    return f"{topic.kind}/{topic.name}".replace(" ", "-").replace("'", "")


T = TypeVar("T")


def trained(wordings: Sequence[T]) -> Sequence[T]:
    """Those of a list of wordings that the corpus uses: all but the last fifth."""
    return wordings[: len(wordings) - len(wordings) // 5]


def held_out(wordings: Sequence[T]) -> Sequence[T]:
    """Those that it never does."""
    return wordings[len(wordings) - len(wordings) // 5 :]
