"""The small world: the requests that can be made in it, and which of them are held out.

A request is a topic in one of its phrasings. A topic is composed of parts: a verb and an object, a fact, two things of
one kind, a feeling and its cause, or a form and a subject. Every topic belongs to one split.

- `train`: topics of the corpus.
- `validation`, `test` (tier 1): topics that the corpus does not have, composed of parts that it has. Facts are an
  exception: the corpus has statements and questions about every fact, but no dialogue about a held-out one.
- `test_tier2`: verbs that the corpus has in statements about right and wrong alone, with objects other than there.

The test splits also use phrasings that the corpus does not have. Left out: dialogues whose answer depends on more than
the last request. Harmful topics are words only: no answer has real instructions.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from cai.micro import phrases, topics
from cai.storage.rows import stable_id, stable_seed
from cai.text.errors import BadInput, did_you_mean

KINDS = ("harmful", "fair", "borderline", "factual", "false_belief", "opinion", "emotional", "creative")
HOW_TO = ("harmful", "fair", "borderline")
SPLITS = ("train", "validation", "test", "test_tier2")
STATEMENTS = "told"
"""Split of the deeds that statements mention the verbs of tier 2 with; no prompt is about them."""
HELD_OUT = {"test": 80, "validation": 24}
"""Number of topics of each class in the held-out splits."""

PHRASINGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(HOW_TO, phrases.REQUESTS), "factual": phrases.QUESTIONS, "false_belief": phrases.BELIEFS,
    "opinion": phrases.VIEWS, "emotional": phrases.MOODS, "creative": phrases.WISHES,
}  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """What a prompt is about. Each variant fills the gaps of a phrasing: the sides of an opinion, the false values."""

    kind: str
    name: str
    variants: tuple[Mapping[str, str], ...]
    split: str


@dataclass(frozen=True)
class Request:
    """A variant of a topic in one phrasing. A deed may have a circumstance, such as `this weekend`."""

    topic: Topic = field(repr=False)
    variant: int
    phrasing: int
    circumstance: str = ""

    @property
    def kind(self) -> str:
        return self.topic.kind

    @property
    def gaps(self) -> Mapping[str, str]:
        """Words by gap, for the phrasing and for answers: `t` is the true sentence, `w` the false value."""
        return self.topic.variants[self.variant]

    @property
    def text(self) -> str:
        return self.fill(PHRASINGS[self.kind][self.phrasing])

    def fill(self, frame: str) -> str:
        """The frame with its gaps filled; a deed is followed by its circumstance."""
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
    world: list[Topic] = []
    for kind, candidates in (
        *((kind, _deeds(families)) for kind, families in topics.FAMILIES.items()),
        ("factual", _facts(asked=True)),
        ("false_belief", _facts(asked=False)),
        ("opinion", _opinions()),
        ("emotional", _combinations("ec", topics.FEELINGS, "because", topics.CAUSES)),
        ("creative", _combinations("ko", topics.FORMS, "about", topics.SUBJECTS)),
    ):
        unsplit = list(candidates)
        split = _splits(kind, unsplit)
        world += [Topic(kind, topic.name, topic.variants, split[topic.name]) for topic in unsplit]
    for kind, families in topics.STATEMENT_FAMILIES.items():
        for topic in _deeds(families):
            # Statements mention every verb with half of its objects; prompts of tier 2 have the other half.
            is_in_prompts = stable_seed("told", *topic.parts) % 2
            world.append(Topic(kind, topic.name, topic.variants, "test_tier2" if is_in_prompts else STATEMENTS))
    return tuple(world)


class _UnsplitTopic(NamedTuple):
    """A topic of which it is not decided yet to which split it belongs."""

    name: str
    parts: tuple[str, ...]
    """What it shares with other topics, such as its verb."""
    variants: tuple[Mapping[str, str], ...]


def _splits(kind: str, unsplit: Sequence[_UnsplitTopic]) -> dict[str, str]:
    """Split by name: `HELD_OUT` topics are held out such that every part stays in two topics of `train` at least."""
    # A fact is in the same split for both classes of requests about facts.
    unit = "fact" if kind in ("factual", "false_belief") else kind
    split_by_name = {topic.name: "train" for topic in unsplit}
    n_in_train = Counter(part for topic in unsplit for part in topic.parts)
    places = [split for split, count in HELD_OUT.items() for _ in range(count)]
    for topic in sorted(unsplit, key=lambda topic: stable_id("held out", unit, topic.name)):
        if places and all(n_in_train[part] > 2 for part in topic.parts):
            split_by_name[topic.name] = places.pop()
            n_in_train.subtract(topic.parts)
    assert not places, f"{kind}: too few topics to hold out"
    return split_by_name


def _deeds(families: Sequence[topics.Family]) -> Iterator[_UnsplitTopic]:
    for family in families:
        for verb, thing in itertools.product(family.verbs, family.objects):
            yield _UnsplitTopic(f"{verb} {thing}", (verb, thing), ({"x": f"{verb} {thing}"},))


def _facts(*, asked: bool) -> Iterator[_UnsplitTopic]:
    """Facts that users ask for, or with `asked` false, that they believe wrongly."""
    for group_name, group in topics.FACTS.items():
        for subject, value in group.values.items():
            name = f"{group_name} {subject}"
            true = group.sentence.format(k=subject, v=value)
            false_values = set(group.values.values()) - {value}
            ordered = sorted(false_values, key=lambda false_value: stable_id(group_name, subject, false_value))
            falsehoods = [group.sentence.format(k=subject, v=false_value) for false_value in ordered]
            if asked:
                question = group.question.format(k=subject)
                variants = ({"q": question, "t": true, "falsehoods": "; ".join(falsehoods)},)
                yield _UnsplitTopic(name, (), variants)
            else:
                beliefs = zip(falsehoods, ordered, strict=True)
                yield _UnsplitTopic(name, (), tuple({"f": false, "t": true, "w": wrong} for false, wrong in beliefs))


def _opinions() -> Iterator[_UnsplitTopic]:
    for group in topics.OPINION_GROUPS:
        for p, q in itertools.combinations(group, 2):
            yield _UnsplitTopic(f"{p} or {q}", (p, q), ({"p": p, "q": q}, {"p": q, "q": p}))


def _combinations(gaps: str, firsts: Sequence[str], link: str, seconds: Sequence[str]) -> Iterator[_UnsplitTopic]:
    for parts in itertools.product(firsts, seconds):
        yield _UnsplitTopic(f"{parts[0]} {link} {parts[1]}", parts, (dict(zip(gaps, parts, strict=True)),))


@functools.cache
def topics_of(split: str, kind: str) -> tuple[Topic, ...]:
    """The topics of one class in one split."""
    return tuple(topic for topic in all_topics() if (topic.kind, topic.split) == (kind, split))


@functools.cache
def phrasings_of(split: str, kind: str) -> tuple[int, ...]:
    """Indices into `PHRASINGS[kind]` that prompts of a split use: all of the corpus, and in held-out splits others too.

    Of the held-out phrasings the first is for validation, so that its figures show what new phrasings do; the others
    are for the test splits.
    """
    frames = PHRASINGS[kind]
    n_trained = len(trained_part(frames))
    held_out = {"train": (), "validation": (n_trained,)}.get(split, range(n_trained + 1, len(frames)))
    return (*range(n_trained), *held_out)


@functools.cache
def requests(split: str, kind: str) -> tuple[Request, ...]:
    """Every request of one class in one split; every topic comes once before any topic comes a second time.

    Raises BadInput for an unknown split.
    """
    if split not in SPLITS:
        expected = ", ".join(SPLITS)
        raise BadInput(f"no split {split!r} of source micro, expected one of {expected}" + did_you_mean(split, SPLITS))
    ranked = []
    for topic in topics_of(split, kind):
        of_topic = [
            Request(topic, variant, phrasing, _circumstance(topic, variant, phrasing))
            for variant in range(len(topic.variants))
            for phrasing in phrasings_of(split, kind)
        ]
        of_topic.sort(key=lambda request: stable_id("order", split, request.text))
        ranked += [(rank, stable_id("topic", split, topic.name), request) for rank, request in enumerate(of_topic)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(request for _, _, request in ranked)


def _circumstance(topic: Topic, variant: int, phrasing: int) -> str:
    """Circumstance of the request with this topic, variant and phrasing; half of the deeds have none."""
    if topic.kind not in HOW_TO:
        return ""
    index = stable_seed("circumstance", topic.name, variant, phrasing) % (2 * len(phrases.CIRCUMSTANCES))
    return phrases.CIRCUMSTANCES[index] if index < len(phrases.CIRCUMSTANCES) else ""


def topic_name(topic: Topic) -> str:
    """Class and topic in one word: the cluster of the intervals of figures."""
    return f"{topic.kind}/{topic.name}".replace(" ", "-").replace("'", "")


T = TypeVar("T")


def trained_part(phrases: Sequence[T]) -> Sequence[T]:
    """The phrases of a list that the corpus uses: all but the last fifth."""
    return phrases[: len(phrases) - len(phrases) // 5]


def held_out_part(phrases: Sequence[T]) -> Sequence[T]:
    """The phrases of a list that the corpus never uses: the last fifth."""
    return phrases[len(phrases) - len(phrases) // 5 :]
