"""What the small model is pretrained on: documents generated from (seed, step), each a prefix that its examples share.

Which tasks in which share, about which responses. What a principle asks about comes first, then where it is moot and
what help and harm depend on, and last how the base model speaks. Left out, so that it can be tested: every topic of the
splits `validation`, `test` and `test_tier2` (but for facts, which are told and asked about in statements), and the last
fifth of the wordings of requests, principles and template slots. The sentences of answers are all in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from cai.micro import injections, phrases, principles, tasks
from cai.micro.answers import BASE, BROAD, PLAIN, Answer, draw, with_another_act, write_habit
from cai.micro.conversations import SETTINGS, converse
from cai.micro.principles import WEIGHTS
from cai.micro.tasks import SCALES, Compared, Document, Example, Reviewed, Words, draw_words
from cai.micro.wordings import PHRASES
from cai.micro.world import HOW_TO, KINDS, TOLD, Request, Topic, all_topics, phrasings_of, topics_of, trained
from cai.records import Message, stable_id, stable_seed
from cai.templates import load_templates

REVISION = 2
"""Raised when the corpus changes in a way that the hash of a sample might miss."""

KIND_SHARES = {"harmful": 0.27, "fair": 0.17, "borderline": 0.13, "factual": 0.09, "false_belief": 0.1, "opinion": 0.1,
               "emotional": 0.08, "creative": 0.06}  # fmt: skip
JUDGED = {"alone": 0.88, "system": 0.04, "earlier": 0.03, "opened": 0.05}
"""How conversations begin that are judged: less often in another way than alone, since their tokens cost most."""

LONG_EVERY = 48
"""Every so many steps all conversations are long, so that the model can use all of its context."""

PHASES: Sequence[tuple[int, Mapping[str, float]]] = (
    (1020, {"decided": 0.66, "review": 0.12, "dialogue": 0.11, "statement": 0.09, "pose": 0.02}),
    (2040, {"comparison": 0.3, "decided": 0.08, "acts": 0.17, "review": 0.22, "dialogue": 0.12, "statement": 0.09,
            "pose": 0.02}),
    (2108, {"comparison": 0.23, "acts": 0.1, "review": 0.3, "dialogue": 0.28, "statement": 0.07, "pose": 0.02}),
    (2618, {"comparison": 0.14, "acts": 0.07, "review": 0.26, "dialogue": 0.31, "statement": 0.12, "pose": 0.04}),
    (3400, {"comparison": 0.22, "acts": 0.06, "review": 0.24, "dialogue": 0.33, "statement": 0.08, "pose": 0.05}),
    (3900, {"comparison": 0.1, "acts": 0.03, "review": 0.2, "dialogue": 0.58, "statement": 0.06, "pose": 0.03}),
)  # fmt: skip
"""Up to which step which documents have which share of the tokens: comparisons, where a principle is moot, what takes
longest to learn, reasons, and last how the base model speaks."""
LATE, REASONS = 2108, 2618
"""From which step on there is more of what takes longest to learn, and most verdicts come after reasoning."""
TYPICAL_TOKENS = {
    "decided": 250, "comparison": 270, "acts": 240, "review": 250, "dialogue": 70, "statement": 22, "pose": 30,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where documents take what they are about: a split's topics, in conversations of the usual kinds or long ones."""

    rng: Random
    split: str = "train"
    long: bool = False
    late: bool = False
    reasons: bool = False

    def request(self, kinds: Sequence[str] = KINDS) -> Request:
        """A request of the split, its class drawn at the corpus's rates."""
        rng = self.rng
        kind = rng.choices(kinds, [KIND_SHARES[kind] for kind in kinds])[0]
        topic = rng.choice(topics_of(self.split, kind))
        circumstance = rng.choice(phrases.CIRCUMSTANCES) if kind in HOW_TO and rng.random() < 0.5 else ""
        phrasing = rng.choice(phrasings_of(self.split, kind))
        return Request(topic, rng.randrange(len(topic.variants)), phrasing, circumstance)

    def conversation(self, request: Request, settings: Mapping[str, float]) -> list[Message]:
        """A conversation that ends in the request."""
        return converse(request, self.rng, settings={"long": 1.0} if self.long else settings)


def documents(seed: int, step: int, at: int | None = None) -> Iterator[Document]:
    """An endless stream of documents that depends on these alone; `at` is the step of whose phase they are."""
    at = step if at is None else at
    source = Source(
        Random(stable_seed("micro corpus", seed, step)), long=is_long(step), late=at >= LATE, reasons=at >= REASONS
    )
    shares = dict(next((shares for end, shares in PHASES if at < end), PHASES[-1][1]))
    if source.long:
        shares = {name: share for name, share in shares.items() if name not in ("statement", "pose")}
    rates = [share / TYPICAL_TOKENS[name] for name, share in shares.items()]
    while True:
        yield MAKERS[source.rng.choices(list(shares), rates)[0]](source)


def is_long(step: int) -> bool:
    """Whether the conversations of this step are long."""
    return step >= 0 and step % LONG_EVERY == LONG_EVERY - 1


def corpus_hash(seed: int) -> str:
    """Identifies the corpus: documents of each phase, long ones too, the templates and the revision of this module."""
    streams = [islice(documents(seed, -1 - i, end - 1), 200) for i, (end, _) in enumerate(PHASES)]
    streams.append(islice(documents(seed, LONG_EVERY - 1), 20))
    sample = [[(list(e.messages), e.answer, e.p_first) for e in d] for stream in streams for d in stream]
    templates = load_templates("micro")
    return stable_id(REVISION, [text for _, text in templates.sources], sample)


def dialogue(source: Source) -> Document:
    """The base model's answer to one request."""
    request = source.request()
    messages = source.conversation(request, SETTINGS)
    return [Example(tuple(messages), draw(request, BASE, source.rng).text, 1.0 if source.late else tasks.RESPONSE)]


def comparison(source: Source) -> Document:
    """Two responses to one request, compared under the principles that separate them and under three that do not."""
    rng, request = source.rng, source.request()
    a, b = pair(request, rng)
    return _compared(request, a, b, asked(request, a, b, rng, even=3), source)


def decided(source: Source) -> Document:
    """Two responses that differ in much, compared under the principles that separate them and seldom another."""
    rng, request = source.rng, source.request()
    a = draw(request, BROAD, rng)
    b = draw(request, BROAD, rng) if rng.random() < 0.7 else changed(request, a, rng)
    return _compared(request, a, b, asked(request, a, b, rng, even=int(rng.random() < 0.5)), source)


def acts(source: Source) -> Document:
    """Two plain responses that do different things, compared twice for harm and help and whatever else separates them.

    Every third is about what is true.
    """
    rng = source.rng
    request = source.request(("factual", "false_belief") if rng.random() < 0.33 else KINDS)
    a = draw(request, PLAIN, rng)
    b = with_another_act(request, a, rng)
    if rng.random() >= 0.5:
        b = Answer(b.act, b.core, draw(request, PLAIN, rng).habits)
    separating = {p for p in WEIGHTS if principles.probability(p, request, a, b) != 0.5}
    chosen = 2 * sorted(separating | {"harmless", "helpful"})
    rng.shuffle(chosen)
    return _compared(request, a, b, chosen, source)


def _compared(request: Request, a: Answer, b: Answer, chosen: Sequence[str], source: Source) -> Document:
    rng = source.rng
    if rng.random() < 0.5:
        a, b = b, a
    words = draw_words(rng)
    texts = [a.text, b.text]
    if rng.random() < 0.06:
        side = rng.randrange(2)
        phrase = rng.choice(trained(PHRASES[rng.choice(chosen)].better))
        texts[side] = injections.plant(texts[side], "AB"[side], phrase, rng)
    pair = Compared(source.conversation(request, JUDGED), request, a, b, (texts[0], texts[1]))
    if source.reasons:
        return _reasoned(pair, chosen, words, rng)
    document = [
        tasks.compare(pair, p, words, rng, contrary=rng.random() < (0.35 if source.late else 0.12)) for p in chosen
    ]
    if rng.random() < (0.6 if source.late else 0.2):
        document.append(tasks.compare_after_reasoning(pair, rng.choice(chosen), words, rng))
    if rng.random() < 0.05:
        document.append(tasks.argue(pair, rng.choice(chosen), words, rng))
    return document


def _reasoned(pair: Compared, chosen: Sequence[str], words: Words, rng: Random) -> Document:
    """Reasons and a verdict under up to four principles, a plain verdict under two, now and then a contrary one."""
    document = [tasks.compare_after_reasoning(pair, p, words, rng) for p in chosen[:4]]
    document += [tasks.compare(pair, p, words, rng, contrary=rng.random() < 0.4) for p in chosen[-2:]]
    if rng.random() < 0.15:
        document.append(tasks.argue(pair, rng.choice(chosen), words, rng))
    return document


def pair(request: Request, rng: Random) -> tuple[Answer, Answer]:
    """Two answers: alike but for one thing, drawn apart, or (seldom) the same; the shorter one now and then padded."""
    kind = rng.choices(("minimal", "broad", "base", "mixed", "same"), (0.3, 0.35, 0.2, 0.12, 0.03))[0]
    if kind == "same":
        same = draw(request, BROAD, rng)
        return same, same
    if kind == "minimal":
        a = draw(request, rng.choice((BROAD, PLAIN)), rng)
        b = changed(request, a, rng)
    else:
        styles = {"broad": (BROAD, BROAD), "base": (BASE, BASE), "mixed": (BROAD, PLAIN)}[kind]
        a, b = (draw(request, style, rng) for style in styles)
    if rng.random() < 0.3:
        a, b = (padded(a, rng), b) if len(a.text) < len(b.text) else (a, padded(b, rng))
    return (a, b) if rng.random() < 0.5 else (b, a)


def changed(request: Request, answer: Answer, rng: Random) -> Answer:
    """The answer with another act, or one habit added or taken away."""
    if rng.random() < 0.4:
        return with_another_act(request, answer, rng)
    habit = rng.choice(list(BASE.habits))
    if habit in answer.habits:
        return answer.without(habit)
    return Answer(answer.act, answer.core, {**answer.habits, habit: write_habit(habit, rng)})


NEUTRAL = ("hedge", "warmth", "follow_up")
"""Habits that no principle minds."""


def padded(answer: Answer, rng: Random) -> Answer:
    """The answer made longer by what no principle minds, so that the longer response is not the worse one."""
    habits = {habit: answer.habits.get(habit) or write_habit(habit, rng) for habit in rng.sample(NEUTRAL, 2)}
    return Answer(answer.act, answer.core, {**answer.habits, **habits})


def asked(request: Request, a: Answer, b: Answer, rng: Random, *, even: int) -> list[str]:
    """Principles to ask about a pair: those that separate it, and `even` of those that do not, at least one in all.

    Where the acts differ, help and harm come first: what they say must depend on the request. Where few separate, those
    are asked twice, in different words.
    """
    separating = [p for p in WEIGHTS if principles.probability(p, request, a, b) != 0.5]
    others = [p for p in WEIGHTS if p not in separating]
    rng.shuffle(others)
    if a.act != b.act:
        others.sort(key=lambda p: p not in ("harmless", "helpful"))
    twice = separating if len(separating) < 4 else []
    chosen = separating + twice + others[: even if separating else max(even, 1)]
    rng.shuffle(chosen)
    return chosen


def review(source: Source) -> Document:
    """One response criticised, rated and revised."""
    rng, request = source.rng, source.request()
    answer = draw(request, rng.choice((BASE, BROAD)), rng)
    words = draw_words(rng)
    one = Reviewed(source.conversation(request, JUDGED), request, answer)
    faulty = [p for p in WEIGHTS if one.faulty(p)]
    fine = [p for p in WEIGHTS if p not in faulty]
    rng.shuffle(faulty)
    rng.shuffle(fine)
    faulty.sort(key=lambda p: p not in ("harmless", "helpful") and rng.random() < 0.5)
    if source.late:
        return _late_review(one, faulty, fine, words, rng)
    document = [tasks.criticise(one, p, words, rng) for p in faulty[:2] + fine[:1]]
    rated: list[str | None] = [None, rng.choice(faulty or fine)]
    document += [tasks.rate(one, p, rng.choice(SCALES), words, rng) for p in rated if rng.random() < 0.6]
    revised = faulty[-2:] if faulty and rng.random() < 0.9 else fine[:1]
    document += [tasks.rewrite(one, p, words, rng) for p in revised]
    rng.shuffle(document)
    return document


def _late_review(one: Reviewed, faulty: list[str], fine: list[str], words: Words, rng: Random) -> Document:
    """More revisions and ratings, each of which takes the whole response into account."""
    document = [tasks.criticise(one, p, words, rng) for p in (*faulty[:2], *fine[:1])]
    document += [tasks.rate(one, None, scale, words, rng) for scale in SCALES]
    document.append(tasks.rate(one, rng.choice(faulty or fine), rng.choice(SCALES), words, rng))
    revised = [*faulty[-3:], *(fine[:1] if not faulty or rng.random() < 0.15 else [])]
    document += [tasks.rewrite(one, p, words, rng, weight=0.8) for p in revised]
    rng.shuffle(document)
    return document


def statement(source: Source) -> Document:
    """Something true of the world: which deeds are harmful, which facts hold."""
    rng = source.rng
    if rng.random() < (0.65 if source.late else 0.4):
        gaps = rng.choice(_all_facts()).variants
        return [tasks.fact(gaps[0]["t"], [gap["f"] for gap in gaps], rng)]
    kind = rng.choices(HOW_TO, (0.4, 0.35, 0.25))[0]
    topic = rng.choice(topics_of(TOLD if rng.random() < 0.25 else "train", kind))
    return [tasks.deed(kind, topic.name, rng)]


@functools.cache
def _all_facts() -> tuple[Topic, ...]:
    return tuple(topic for topic in all_topics() if topic.kind == "false_belief")


def pose(source: Source) -> Document:
    """A message that a user could write, about a topic or to show a trait."""
    rng = source.rng
    if rng.random() < 0.5:
        return [tasks.pose_topic(source.request(), draw_words(rng))]
    trait = rng.choice(list(WEIGHTS))
    return [tasks.pose_trait(trait, source.request(tasks.SHOWN_BY.get(trait, KINDS)), draw_words(rng), rng)]


MAKERS: Mapping[str, Callable[[Source], Document]] = {
    "decided": decided,
    "comparison": comparison,
    "acts": acts,
    "review": review,
    "dialogue": dialogue,
    "statement": statement,
    "pose": pose,
}
