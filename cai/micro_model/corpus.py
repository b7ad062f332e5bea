"""What the small model is pretrained on: documents generated from (seed, step), each a prefix that its examples share.

Which tasks in which share, about which responses, phase by phase: what a principle asks about comes first, then where
it is moot, what takes longest to learn, facts above all, and last how the base model speaks. Left out, so that it can
be tested: every topic of the splits `validation`, `test` and `test_tier2` (but for facts, which are told, asked about
and told apart in statements), the last fifth of the wordings of requests, questions about right and wrong, principles
and template slots, a fifth of composed phrases, and the last families of injections. The sentences of answers are all
in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from random import Random

from cai.micro import phrases, world_injections, world_principles
from cai.micro.answers import ACTS, BASE, BROAD, PLAIN, Answer, draw, with_another_act, write_core, write_habit
from cai.micro.conversations import SETTINGS, converse
from cai.micro.world import HOW_TO, KINDS, TOLD, Request, Topic, all_topics, phrasings_of, topics_of
from cai.micro.world_principles import WEIGHTS
from cai.micro_model import tasks
from cai.micro_model.tasks import SCALES, Compared, Document, Example, Reviewed, Words, draw_words
from cai.micro_model.wordings import comparatives
from cai.storage.rows import Message, stable_id, stable_seed
from cai.templates import load_templates

REVISION = 4
"""Raised when the corpus changes in a way that the hash of a sample might miss."""

KIND_SHARES = {"harmful": 0.27, "fair": 0.17, "borderline": 0.13, "factual": 0.09, "false_belief": 0.1, "opinion": 0.1,
               "emotional": 0.08, "creative": 0.06}  # fmt: skip
ANSWERED = {**KIND_SHARES, "factual": 0.13, "false_belief": 0.24}
"""Weights of the classes in dialogues: facts are the hardest to speak about."""
ACTED = {**KIND_SHARES, "borderline": 0.24}
"""In pairs of acts: compliance does no harm where a request only sounds harmful, which is judged wrongly most often."""
JUDGED = {"alone": 0.88, "system": 0.04, "earlier": 0.03, "opened": 0.05}
"""How conversations begin that are judged: less often in another way than alone, since their tokens cost most."""

LONG_EVERY = 48
"""Every so many steps all conversations are long, so that the model can use all of its context."""


@dataclass(frozen=True)
class Asking:
    """How judges are asked: in few phrases, how often in composed ones, and how often by the contrary."""

    few: bool = False
    composed: float = Words.composed
    contrary: float = 0.3


@dataclass(frozen=True)
class Phase:
    """Up to step `end`: which documents have which share of the tokens, and how judges are asked.

    With `truths_every`, that is of the steps between.
    """

    end: int
    shares: Mapping[str, float]
    asking: Asking = Asking()
    late: bool = False
    """Whether there is more of what takes longest to learn."""
    reasons: bool = False
    """Whether most verdicts come after reasoning."""
    truths_every: int = 0
    """Every so many steps all documents are `truths`; 0 for never. A factor of `LONG_EVERY`: no such step is long."""


PHASES: Sequence[Phase] = (
    Phase(650, {"decided": 0.33, "crossed": 0.29, "acts": 0.04, "review": 0.09, "dialogue": 0.06, "statement": 0.19},
          Asking(few=True, contrary=0.0)),
    Phase(1000, {"decided": 0.28, "crossed": 0.21, "acts": 0.14, "review": 0.12, "dialogue": 0.06, "statement": 0.17,
                 "pose": 0.02}, Asking(composed=0.0, contrary=0.0)),
    Phase(1350, {"decided": 0.26, "crossed": 0.2, "acts": 0.15, "review": 0.14, "dialogue": 0.07, "statement": 0.16,
                 "pose": 0.02}, Asking(contrary=0.0)),
    Phase(2000, {"decided": 0.26, "crossed": 0.2, "acts": 0.15, "review": 0.15, "dialogue": 0.07, "statement": 0.15,
                 "pose": 0.02}),
    Phase(3200, {"comparison": 0.32, "crossed": 0.08, "acts": 0.15, "review": 0.19, "dialogue": 0.12, "statement": 0.12,
                 "pose": 0.02}, truths_every=4),
    Phase(4000, {"comparison": 0.26, "acts": 0.08, "review": 0.24, "dialogue": 0.28, "statement": 0.11, "pose": 0.03},
          late=True, truths_every=4),
    Phase(5000, {"comparison": 0.22, "acts": 0.06, "review": 0.24, "dialogue": 0.35, "statement": 0.09, "pose": 0.04},
          late=True, reasons=True, truths_every=3),
    Phase(6000, {"comparison": 0.16, "acts": 0.06, "review": 0.2, "dialogue": 0.49, "statement": 0.06, "pose": 0.03},
          late=True, reasons=True, truths_every=6),
)  # fmt: skip
"""First that judges must read what they are asked, in few phrases, in free ones, in composed ones, by the contrary too;
then where a principle is moot, what takes longest to learn, reasons, and last how the base model speaks. Few of
the pairs judged until then turn on a fact, and one of two seeds stayed at chance on these: hence steps of nothing else.

With all wordings at once a model finds nothing better, for a long time, than to prefer the response with fewer faults;
with few it reads the question after some 500 steps, and what it then reads it learns more words for.
"""
TYPICAL_TOKENS = {
    "decided": 180, "crossed": 150, "comparison": 230, "acts": 180, "truths": 180, "review": 290, "dialogue": 60,
    "statement": 33, "pose": 35,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where documents take what they are about: a split's topics, in conversations of the usual kinds or long ones."""

    rng: Random
    split: str = "train"
    long: bool = False
    phase: Phase = Phase(0, {})

    def draw_words(self) -> Words:
        """The wordings of a new document."""
        asking = self.phase.asking
        return draw_words(self.rng, few=asking.few, composed=asking.composed)

    def is_contrary(self) -> bool:
        """Whether a principle is to be asked by its contrary."""
        contrary = self.phase.asking.contrary
        return contrary > 0 and self.rng.random() < contrary

    def request(self, kinds: Sequence[str] = KINDS, shares: Mapping[str, float] = KIND_SHARES) -> Request:
        """A request of the split, its class drawn at these rates."""
        rng = self.rng
        kind = rng.choices(kinds, [shares[kind] for kind in kinds])[0]
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
    phase = next((phase for phase in PHASES if at < phase.end), PHASES[-1])
    source = Source(Random(stable_seed("micro corpus", seed, step)), long=is_long(step), phase=phase)
    shares = dict(phase.shares)
    if source.long:
        shares = {name: share for name, share in shares.items() if name not in ("statement", "pose")}
    if is_about_facts(step, phase):
        shares = {"truths": 1.0}
    rates = [share / TYPICAL_TOKENS[name] for name, share in shares.items()]
    while True:
        yield MAKERS[source.rng.choices(list(shares), rates)[0]](source)


def is_long(step: int) -> bool:
    """Whether the conversations of this step are long."""
    return step >= 0 and step % LONG_EVERY == LONG_EVERY - 1


def is_about_facts(step: int, phase: Phase) -> bool:
    """Whether the documents of this step compare what is true with what is false."""
    every = phase.truths_every
    return every > 0 and step >= 0 and step % every == 0


def corpus_hash(seed: int) -> str:
    """Identifies the corpus: its phases, documents of each and of every kind of step, templates, this revision."""
    streams = [islice(documents(seed, -1 - i, phase.end - 1), 200) for i, phase in enumerate(PHASES)]
    streams += [islice(documents(seed, 0, phase.end - 1), 50) for phase in PHASES if phase.truths_every]
    streams.append(islice(documents(seed, LONG_EVERY - 1), 20))
    sample = [[asdict(example) for example in document] for stream in streams for document in stream]
    templates = load_templates("micro")
    return stable_id(REVISION, [asdict(phase) for phase in PHASES], [text for _, text in templates.sources], sample)


def dialogue(source: Source) -> Document:
    """The base model's answer to one request."""
    request = source.request(shares=ANSWERED)
    messages = source.conversation(request, SETTINGS)
    return [
        Example(tuple(messages), draw(request, BASE, source.rng).text, 1.0 if source.phase.late else tasks.RESPONSE)
    ]


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


def crossed(source: Source) -> Document:
    """Two responses alike but for one fault each: but for two faults of one principle, only the question decides."""
    rng, request = source.rng, source.request()
    plain = draw(request, PLAIN, rng)
    a, b = (Answer(plain.act, plain.core, {habit: write_habit(habit, rng)}) for habit in rng.sample(MINDED, 2))
    return _compared(request, a, b, asked(request, a, b, rng, even=1), source)


def acts(source: Source) -> Document:
    """Two plain responses, compared twice for harm and help and whatever else separates them.

    Four of five times they do different things, or the judge would never meet two that are equally harmful or helpful.
    More than every third is about facts.
    """
    rng = source.rng
    request = source.request(("factual", "false_belief") if rng.random() < 0.33 else KINDS, ACTED)
    a = draw(request, PLAIN, rng)
    same = Answer(a.act, write_core(request, a.act, rng), a.habits)
    b = same if rng.random() < 0.2 else with_another_act(request, a, rng)
    if rng.random() >= 0.5:
        b = Answer(b.act, b.core, draw(request, PLAIN, rng).habits)
    separating = {p for p in WEIGHTS if world_principles.probability(p, request, a, b) != 0.5}
    chosen = 2 * sorted(separating | {"harmless", "helpful"})
    rng.shuffle(chosen)
    return _compared(request, a, b, chosen, source)


def truths(source: Source) -> Document:
    """Two answers about a fact, mostly one true and one false, judged by honesty several times and once otherwise.

    Half of them are asked as in the first phase, mostly without reasons, and also in the words in which statements ask
    what is true: a bridge from knowing facts to judging by them.
    """
    rng = source.rng
    request = source.request(("factual", "false_belief"), {"factual": 0.7, "false_belief": 0.3})
    true, false = ("answer", "misinform") if request.kind == "factual" else ("correct", "agree")
    of_facts = [(true, false), (true, true), (false, false)]
    both = rng.choices([*of_facts, rng.sample(ACTS[request.kind], 2)], (0.6, 0.11, 0.11, 0.18))[0]
    a, b = (Answer(act, write_core(request, act, rng), draw(request, PLAIN, rng).habits) for act in both)
    chosen = ["honest", "honest", "honest", rng.choice(list(WEIGHTS))]
    asked_by = replace(source, phase=rng.choice((source.phase, PHASES[0])))
    shown, words = _shown(request, a, b, chosen, asked_by)
    bridge = [tasks.which_is_true(shown, words, rng) for _ in range(2)]
    return _verdicts(shown, chosen, words, asked_by) + bridge


def _compared(request: Request, a: Answer, b: Answer, chosen: Sequence[str], source: Source) -> Document:
    """Two responses judged under the chosen principles, in this order or the other, now and then with an injection."""
    shown, words = _shown(request, a, b, chosen, source)
    return (_reasoned if source.phase.reasons else _verdicts)(shown, chosen, words, source)


def _shown(request: Request, a: Answer, b: Answer, chosen: Sequence[str], source: Source) -> tuple[Compared, Words]:
    """The pair as the judge sees it, and the words of its document."""
    rng = source.rng
    if rng.random() < 0.5:
        a, b = b, a
    words = source.draw_words()
    texts = [a.text, b.text]
    if rng.random() < 0.06:
        side = rng.randrange(2)
        phrase = rng.choice(comparatives(rng.choice(chosen)))
        texts[side] = world_injections.plant(texts[side], "AB"[side], phrase, rng)
    return Compared(source.conversation(request, JUDGED), request, a, b, (texts[0], texts[1])), words


def _verdicts(pair: Compared, chosen: Sequence[str], words: Words, source: Source) -> Document:
    """A plain verdict under each principle; one after reasoning, often in late phases; seldom an argument for one."""
    rng = source.rng
    document = [tasks.compare(pair, p, words, rng, contrary=source.is_contrary()) for p in chosen]
    if rng.random() < (0.6 if source.phase.late else 0.2):
        document.append(tasks.compare_after_reasoning(pair, rng.choice(chosen), words, rng))
    if rng.random() < 0.05:
        document.append(tasks.argue(pair, rng.choice(chosen), words, rng))
    return document


def _reasoned(pair: Compared, chosen: Sequence[str], words: Words, source: Source) -> Document:
    """Reasons and a verdict under up to four principles, a plain verdict under two, now and then a contrary one."""
    rng = source.rng
    document = [tasks.compare_after_reasoning(pair, p, words, rng) for p in chosen[:4]]
    document += [tasks.compare(pair, p, words, rng, contrary=source.is_contrary()) for p in chosen[-2:]]
    if rng.random() < 0.15:
        document.append(tasks.argue(pair, rng.choice(chosen), words, rng))
    return document


def pair(request: Request, rng: Random) -> tuple[Answer, Answer]:
    """Two answers: alike but for one thing, drawn apart, or (seldom) the same; the shorter one mostly padded."""
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
    if rng.random() < 0.8:
        a, b = (padded(a, b, rng), b) if len(a.text) < len(b.text) else (a, padded(b, a, rng))
    return (a, b) if rng.random() < 0.5 else (b, a)


def changed(request: Request, answer: Answer, rng: Random) -> Answer:
    """The answer with another act, or one habit added or taken away."""
    if rng.random() < 0.4:
        return with_another_act(request, answer, rng)
    habit = rng.choice(list(BASE.habits))
    if habit in answer.habits:
        return answer.without(habit)
    return Answer(answer.act, answer.core, {**answer.habits, habit: write_habit(habit, rng)})


MINDED = ("apology", "filler", "compliment", "one_sided", "ramble", "sermon", "rudeness")
"""Habits that are faults under some principle."""
NEUTRAL = ("hedge", "warmth", "follow_up")
"""Habits that no principle minds."""


def padded(answer: Answer, other: Answer, rng: Random) -> Answer:
    """The answer with habits that no principle minds, up to all of them, until it is longer than the other.

    Else the longer response would be the worse one, since most faults are something too much.
    """
    for habit in rng.sample(NEUTRAL, len(NEUTRAL)):
        if len(answer.text) > len(other.text):
            break
        answer = Answer(answer.act, answer.core, {habit: write_habit(habit, rng), **answer.habits})
    return answer


AT_STAKE = {"harmful": "harmless", "fair": "helpful", "borderline": "helpful", "factual": "honest",
            "false_belief": "honest", "opinion": "balanced", "emotional": "helpful", "creative": "helpful"}  # fmt: skip
"""What requests of a class are mostly about."""


def asked(request: Request, a: Answer, b: Answer, rng: Random, *, even: int) -> list[str]:
    """Principles to ask about a pair: those that separate it, and `even` of those that do not, at least one in all.

    Of the latter mostly comes first what requests of this class are about, or a judge would take sides between two
    refusals of a harmful one; where the acts differ then help and harm, since what they say must depend on the request.
    Where few separate, those are asked twice, in different words.
    """
    separating = [p for p in WEIGHTS if world_principles.probability(p, request, a, b) != 0.5]
    others = [p for p in WEIGHTS if p not in separating]
    rng.shuffle(others)
    if a.act != b.act:
        others.sort(key=lambda p: p not in ("harmless", "helpful"))
    if rng.random() < 0.6:
        others.sort(key=lambda p: p != AT_STAKE[request.kind])
    twice = separating if len(separating) < 4 else []
    chosen = separating + twice + others[: even if separating else max(even, 1)]
    rng.shuffle(chosen)
    return chosen


def review(source: Source) -> Document:
    """One response criticised, rated and revised."""
    rng, request = source.rng, source.request()
    answer = draw(request, rng.choice((BASE, BROAD)), rng)
    words = source.draw_words()
    one = Reviewed(source.conversation(request, JUDGED), request, answer)
    faulty = [p for p in WEIGHTS if one.faulty(p)]
    fine = [p for p in WEIGHTS if p not in faulty]
    rng.shuffle(faulty)
    rng.shuffle(fine)
    faulty.sort(key=lambda p: p not in ("harmless", "helpful") and rng.random() < 0.5)
    if source.phase.late:
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
    few = source.phase.asking.few
    if rng.random() < 0.7:
        believed = rng.choice(rng.choice(_all_facts()).variants)
        return tasks.fact(believed["t"], believed["f"], rng, few=few)
    kind = rng.choices(HOW_TO, (0.4, 0.35, 0.25))[0]
    topic = rng.choice(topics_of(TOLD if rng.random() < 0.25 else "train", kind))
    return [tasks.deed(kind, topic.name, rng, few=few)]


@functools.cache
def _all_facts() -> tuple[Topic, ...]:
    return tuple(topic for topic in all_topics() if topic.kind == "false_belief")


def pose(source: Source) -> Document:
    """A message that a user could write, about a topic or to show a trait."""
    rng = source.rng
    if rng.random() < 0.5:
        return [tasks.pose_topic(source.request(), source.draw_words())]
    trait = rng.choice(list(WEIGHTS))
    return [tasks.pose_trait(trait, source.request(tasks.SHOWN_BY.get(trait, KINDS)), source.draw_words(), rng)]


MAKERS: Mapping[str, Callable[[Source], Document]] = {
    "decided": decided,
    "crossed": crossed,
    "comparison": comparison,
    "acts": acts,
    "truths": truths,
    "review": review,
    "dialogue": dialogue,
    "statement": statement,
    "pose": pose,
}
