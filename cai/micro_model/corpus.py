"""The corpus that the small model is pretrained on: documents generated from (seed, step).

A document is several examples that share a prefix. `PHASES` says which kinds of documents have which share of the
tokens, step by step. Held out, so that generalisation can be tested: every topic of the splits `validation`, `test` and
`test_tier2` (facts occur in statements all the same), the last fifth of the wordings of requests, of questions about
right and wrong, of principles and of template slots, a fifth of the composed phrases, and the last families of
injections. No sentence of the world's answers is held out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from random import Random

from cai.micro import phrases, world_injections, world_principles
from cai.micro.answers import ACTS, BASE, BROAD, PLAIN, Answer, sample_answer, with_another_act, write_core, write_habit
from cai.micro.conversations import SETTINGS, converse
from cai.micro.world import HOW_TO, KINDS, STATEMENTS, Request, Topic, all_topics, phrasings_of, topics_of
from cai.micro.world_principles import WEIGHTS
from cai.micro_model import tasks
from cai.micro_model.principle_wordings import comparison_phrases
from cai.micro_model.tasks import SCALES, Document, DocumentWording, Example, ShownPair, ShownResponse, sample_wording
from cai.storage.rows import Message, stable_id, stable_seed
from cai.templates import load_templates

REVISION = 4
"""Raised when the corpus changes in a way that the hash of a sample might miss."""

# Probabilities of the classes of requests.
KIND_SHARES = {"harmful": 0.27, "fair": 0.17, "borderline": 0.13, "factual": 0.09, "false_belief": 0.1, "opinion": 0.1,
               "emotional": 0.08, "creative": 0.06}  # fmt: skip
DIALOGUE_SHARES = {**KIND_SHARES, "factual": 0.13, "false_belief": 0.24}
"""In dialogues, with more facts, because answering about facts is the hardest to learn."""
ACTS_SHARES = {**KIND_SHARES, "borderline": 0.24}
"""In pairs of acts, with more borderline requests, which only sound harmful: judges err most often about them."""
JUDGED_SETTINGS = {"alone": 0.88, "system": 0.04, "earlier": 0.03, "opened": 0.05}
"""Kinds of conversations that are judged: mostly `alone`, because the prefix of a judged document is the longest."""

LONG_EVERY = 48
"""Of every so many steps one has long conversations alone, so that the model learns to use its whole context."""


@dataclass(frozen=True)
class JudgeQuestions:
    """How judges are asked: whether in few phrases, and the probabilities of a composed phrase and of the contrary."""

    few: bool = False
    composed: float = DocumentWording.composed
    contrary: float = 0.3


@dataclass(frozen=True)
class Phase:
    """Steps before `end`: the share of the tokens that each kind of document has, and how judges are asked."""

    end: int
    shares: Mapping[str, float]
    """Of the steps that are not about facts (`truths_every`)."""
    judge_questions: JudgeQuestions = JudgeQuestions()
    late: bool = False
    """Whether documents have more of what takes longest to learn."""
    rationales: bool = False
    """Whether most verdicts come after a rationale."""
    truths_every: int = 0
    """Of every so many steps one has `truths` alone; 0 for none. Divides `LONG_EVERY`, so that no such step is long."""


PHASES: Sequence[Phase] = (
    Phase(650, {"decided": 0.33, "crossed": 0.29, "acts": 0.04, "review": 0.09, "dialogue": 0.06, "statement": 0.19},
          JudgeQuestions(few=True, contrary=0.0)),
    Phase(1000, {"decided": 0.28, "crossed": 0.21, "acts": 0.14, "review": 0.12, "dialogue": 0.06, "statement": 0.17,
                 "pose": 0.02}, JudgeQuestions(composed=0.0, contrary=0.0)),
    Phase(1350, {"decided": 0.26, "crossed": 0.2, "acts": 0.15, "review": 0.14, "dialogue": 0.07, "statement": 0.16,
                 "pose": 0.02}, JudgeQuestions(contrary=0.0)),
    Phase(2000, {"decided": 0.26, "crossed": 0.2, "acts": 0.15, "review": 0.15, "dialogue": 0.07, "statement": 0.15,
                 "pose": 0.02}),
    Phase(3200, {"comparison": 0.32, "crossed": 0.08, "acts": 0.15, "review": 0.19, "dialogue": 0.12, "statement": 0.12,
                 "pose": 0.02}, truths_every=4),
    Phase(4000, {"comparison": 0.26, "acts": 0.08, "review": 0.24, "dialogue": 0.28, "statement": 0.11, "pose": 0.03},
          late=True, truths_every=4),
    Phase(5000, {"comparison": 0.22, "acts": 0.06, "review": 0.24, "dialogue": 0.35, "statement": 0.09, "pose": 0.04},
          late=True, rationales=True, truths_every=3),
    Phase(6000, {"comparison": 0.16, "acts": 0.06, "review": 0.2, "dialogue": 0.49, "statement": 0.06, "pose": 0.03},
          late=True, rationales=True, truths_every=6),
)  # fmt: skip
"""The curriculum. Judges first learn to read the question: in few phrases, in free ones, in composed ones, and by the
contrary. With all wordings at once a model prefers the response with fewer faults for a long time, whatever the
question is; with few phrases it reads the question after about 500 steps, and then learns more phrases. Later phases
have pairs that a principle does not separate, what takes longest to learn, rationales, and last the dialogues of the
base model. Few of the judged pairs turn on a fact, and one of two seeds stayed at chance on these: hence
`truths_every`."""
TYPICAL_TOKENS = {
    "decided": 180, "crossed": 150, "comparison": 230, "acts": 180, "truths": 180, "review": 290, "dialogue": 60,
    "statement": 33, "pose": 35,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Samples what documents are about: topics of a split, in conversations of the usual kinds or in long ones."""

    rng: Random
    split: str = "train"
    long: bool = False
    phase: Phase = Phase(0, {})

    def sample_wording(self) -> DocumentWording:
        """The wording of a new document."""
        questions = self.phase.judge_questions
        return sample_wording(self.rng, few=questions.few, composed=questions.composed)

    def sample_contrary(self) -> bool:
        """Whether a judge is asked by the contrary of the principle."""
        contrary = self.phase.judge_questions.contrary
        return contrary > 0 and self.rng.random() < contrary

    def request(self, kinds: Sequence[str] = KINDS, shares: Mapping[str, float] = KIND_SHARES) -> Request:
        """A request of the split, its class sampled with these probabilities."""
        rng = self.rng
        kind = rng.choices(kinds, [shares[kind] for kind in kinds])[0]
        topic = rng.choice(topics_of(self.split, kind))
        circumstance = rng.choice(phrases.CIRCUMSTANCES) if kind in HOW_TO and rng.random() < 0.5 else ""
        phrasing = rng.choice(phrasings_of(self.split, kind))
        return Request(topic, rng.randrange(len(topic.variants)), phrasing, circumstance)

    def conversation(self, request: Request, settings: Mapping[str, float]) -> list[Message]:
        """A conversation that ends with the request."""
        return converse(request, self.rng, settings={"long": 1.0} if self.long else settings)


def documents(seed: int, step: int, phase_step: int | None = None) -> Iterator[Document]:
    """An endless stream of documents. `phase_step` is a step of the phase that they belong to, by default `step`."""
    phase_step = step if phase_step is None else phase_step
    phase = next((phase for phase in PHASES if phase_step < phase.end), PHASES[-1])
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
    """Hash of the phases, of sample documents of every phase and kind of step, of the templates and of `REVISION`."""
    streams = [islice(documents(seed, -1 - i, phase.end - 1), 200) for i, phase in enumerate(PHASES)]
    streams += [islice(documents(seed, 0, phase.end - 1), 50) for phase in PHASES if phase.truths_every]
    streams.append(islice(documents(seed, LONG_EVERY - 1), 20))
    sample = [[_hashed_example(example) for example in document] for stream in streams for document in stream]
    templates = load_templates("micro")
    phases = [_hashed_phase(phase) for phase in PHASES]
    return stable_id(REVISION, phases, [text for _, text in templates.sources], sample)


# The keys here are frozen: the hash of the corpus is recorded with the weights.


def _hashed_phase(phase: Phase) -> dict[str, object]:
    fields = asdict(phase)
    return fields | {"asking": fields.pop("judge_questions"), "reasons": fields.pop("rationales")}


def _hashed_example(example: Example) -> dict[str, object]:
    fields = asdict(example)
    return fields | {"thoughts": fields.pop("rationale_weight")}


def make_dialogue(source: Source) -> Document:
    """The base model's answer to one request."""
    request = source.request(shares=DIALOGUE_SHARES)
    messages = source.conversation(request, SETTINGS)
    answer = sample_answer(request, BASE, source.rng)
    return [Example(tuple(messages), answer.text, 1.0 if source.phase.late else tasks.RESPONSE)]


def make_comparison(source: Source) -> Document:
    """Two responses to one request, compared under the principles that separate them and under three that do not."""
    rng, request = source.rng, source.request()
    a, b = sample_pair(request, rng)
    return _judged_pair(request, a, b, sample_principles(request, a, b, rng, even=3), source)


def make_decided(source: Source) -> Document:
    """Two responses that differ in much, compared under the principles that separate them and half the time another."""
    rng, request = source.rng, source.request()
    a = sample_answer(request, BROAD, rng)
    b = sample_answer(request, BROAD, rng) if rng.random() < 0.7 else change_answer(request, a, rng)
    principles = sample_principles(request, a, b, rng, even=int(rng.random() < 0.5))
    return _judged_pair(request, a, b, principles, source)


def make_crossed(source: Source) -> Document:
    """Two responses with one fault each, mostly under two principles, so that the question decides between them."""
    rng, request = source.rng, source.request()
    plain = sample_answer(request, PLAIN, rng)
    a, b = (Answer(plain.act, plain.core, {habit: write_habit(habit, rng)}) for habit in rng.sample(FAULT_HABITS, 2))
    return _judged_pair(request, a, b, sample_principles(request, a, b, rng, even=1), source)


def make_acts(source: Source) -> Document:
    """Two plain responses, compared twice under `harmless`, `helpful` and every other principle that separates them.

    A fifth of the pairs have the same act, so that the judge sees pairs that are equally harmful or helpful. More than
    a third of the requests are about facts.
    """
    rng = source.rng
    request = source.request(("factual", "false_belief") if rng.random() < 0.33 else KINDS, ACTS_SHARES)
    a = sample_answer(request, PLAIN, rng)
    same = Answer(a.act, write_core(request, a.act, rng), a.habits)
    b = same if rng.random() < 0.2 else with_another_act(request, a, rng)
    if rng.random() >= 0.5:
        b = Answer(b.act, b.core, sample_answer(request, PLAIN, rng).habits)
    separating = {p for p in WEIGHTS if world_principles.probability(p, request, a, b) != 0.5}
    principles = 2 * sorted(separating | {"harmless", "helpful"})
    rng.shuffle(principles)
    return _judged_pair(request, a, b, principles, source)


def make_truths(source: Source) -> Document:
    """Two answers about a fact, mostly a true and a false one, judged three times under `honest` and once under any.

    Half of the documents ask as in the first phase. All of them also ask which response is true, in the words that
    statements about facts use, so that the model learns to judge by the facts that it knows.
    """
    rng = source.rng
    request = source.request(("factual", "false_belief"), {"factual": 0.7, "false_belief": 0.3})
    true, false = ("answer", "misinform") if request.kind == "factual" else ("correct", "agree")
    act_pairs = [(true, false), (true, true), (false, false), rng.sample(ACTS[request.kind], 2)]
    act_pair = rng.choices(act_pairs, (0.6, 0.11, 0.11, 0.18))[0]
    a, b = (Answer(act, write_core(request, act, rng), sample_answer(request, PLAIN, rng).habits) for act in act_pair)
    principles = ["honest", "honest", "honest", rng.choice(list(WEIGHTS))]
    asking = replace(source, phase=rng.choice((source.phase, PHASES[0])))
    pair, wording = _show_pair(request, a, b, principles, asking)
    truth_questions = [tasks.compare_truth(pair, wording, rng) for _ in range(2)]
    return _verdicts(pair, principles, wording, asking) + truth_questions


def _judged_pair(request: Request, a: Answer, b: Answer, principles: Sequence[str], source: Source) -> Document:
    pair, wording = _show_pair(request, a, b, principles, source)
    return (_verdicts_after_rationales if source.phase.rationales else _verdicts)(pair, principles, wording, source)


def _show_pair(
    request: Request, a: Answer, b: Answer, principles: Sequence[str], source: Source
) -> tuple[ShownPair, DocumentWording]:
    """The pair in random order, with an injection in 6 % of the pairs, and the wording of its document."""
    rng = source.rng
    if rng.random() < 0.5:
        a, b = b, a
    wording = source.sample_wording()
    texts = [a.text, b.text]
    if rng.random() < 0.06:
        side = rng.randrange(2)
        phrase = rng.choice(comparison_phrases(rng.choice(principles)))
        texts[side] = world_injections.plant(texts[side], "AB"[side], phrase, rng)
    return ShownPair(source.conversation(request, JUDGED_SETTINGS), request, a, b, (texts[0], texts[1])), wording


def _verdicts(pair: ShownPair, principles: Sequence[str], wording: DocumentWording, source: Source) -> Document:
    """A plain verdict under each principle, and at times a verdict after a rationale and an argument for a response."""
    rng = source.rng
    document = [tasks.compare(pair, p, wording, rng, contrary=source.sample_contrary()) for p in principles]
    if rng.random() < (0.6 if source.phase.late else 0.2):
        document.append(tasks.compare_after_rationale(pair, rng.choice(principles), wording, rng))
    if rng.random() < 0.05:
        document.append(tasks.argue(pair, rng.choice(principles), wording, rng))
    return document


def _verdicts_after_rationales(
    pair: ShownPair, principles: Sequence[str], wording: DocumentWording, source: Source
) -> Document:
    """A rationale and a verdict under up to four principles, plain verdicts under two, and at times an argument."""
    rng = source.rng
    document = [tasks.compare_after_rationale(pair, p, wording, rng) for p in principles[:4]]
    document += [tasks.compare(pair, p, wording, rng, contrary=source.sample_contrary()) for p in principles[-2:]]
    if rng.random() < 0.15:
        document.append(tasks.argue(pair, rng.choice(principles), wording, rng))
    return document


def sample_pair(request: Request, rng: Random) -> tuple[Answer, Answer]:
    """Two answers: different in one thing, sampled independently, or (3 %) the same; the shorter one mostly padded."""
    kind = rng.choices(("minimal", "broad", "base", "mixed", "same"), (0.3, 0.35, 0.2, 0.12, 0.03))[0]
    if kind == "same":
        same = sample_answer(request, BROAD, rng)
        return same, same
    if kind == "minimal":
        a = sample_answer(request, rng.choice((BROAD, PLAIN)), rng)
        b = change_answer(request, a, rng)
    else:
        styles = {"broad": (BROAD, BROAD), "base": (BASE, BASE), "mixed": (BROAD, PLAIN)}[kind]
        a, b = (sample_answer(request, style, rng) for style in styles)
    if rng.random() < 0.8:
        a, b = (pad_answer(a, b, rng), b) if len(a.text) < len(b.text) else (a, pad_answer(b, a, rng))
    return (a, b) if rng.random() < 0.5 else (b, a)


def change_answer(request: Request, answer: Answer, rng: Random) -> Answer:
    """The answer with another act, or with one habit added or removed."""
    if rng.random() < 0.4:
        return with_another_act(request, answer, rng)
    habit = rng.choice(list(BASE.habits))
    if habit in answer.habits:
        return answer.without(habit)
    return Answer(answer.act, answer.core, {**answer.habits, habit: write_habit(habit, rng)})


FAULT_HABITS = ("apology", "filler", "compliment", "one_sided", "ramble", "sermon", "rudeness")
"""Habits that are faults under some principle."""
NEUTRAL_HABITS = ("hedge", "warmth", "follow_up")
"""Habits that are a fault under no principle."""


def pad_answer(answer: Answer, longer: Answer, rng: Random) -> Answer:
    """The answer with neutral habits added until it is longer than `longer`, or has all of them.

    Without padding the longer response would mostly be the worse one, because most faults are additional sentences.
    """
    for habit in rng.sample(NEUTRAL_HABITS, len(NEUTRAL_HABITS)):
        if len(answer.text) > len(longer.text):
            break
        answer = Answer(answer.act, answer.core, {habit: write_habit(habit, rng), **answer.habits})
    return answer


MAIN_PRINCIPLE = {"harmful": "harmless", "fair": "helpful", "borderline": "helpful", "factual": "honest",
            "false_belief": "honest", "opinion": "balanced", "emotional": "helpful", "creative": "helpful"}  # fmt: skip
"""The principle that matters most for requests of a class."""


def sample_principles(request: Request, a: Answer, b: Answer, rng: Random, *, even: int) -> list[str]:
    """Principles to judge a pair under: those that separate it, and `even` of those that do not, at least one in all.

    Principles that do not separate the pair come in this order: mostly the main principle of the class first, so that
    the judge learns not to prefer one of two refusals of a harmful request; if the acts differ, `harmless` and
    `helpful`, whose verdicts must depend on the request. Up to three separating principles are asked about twice.
    """
    separating = [p for p in WEIGHTS if world_principles.probability(p, request, a, b) != 0.5]
    not_separating = [p for p in WEIGHTS if p not in separating]
    rng.shuffle(not_separating)
    if a.act != b.act:
        not_separating.sort(key=lambda p: p not in ("harmless", "helpful"))
    if rng.random() < 0.6:
        not_separating.sort(key=lambda p: p != MAIN_PRINCIPLE[request.kind])
    repeated = separating if len(separating) < 4 else []
    principles = separating + repeated + not_separating[: even if separating else max(even, 1)]
    rng.shuffle(principles)
    return principles


def make_review(source: Source) -> Document:
    """One response criticised, rated and revised."""
    rng, request = source.rng, source.request()
    answer = sample_answer(request, rng.choice((BASE, BROAD)), rng)
    wording = source.sample_wording()
    shown = ShownResponse(source.conversation(request, JUDGED_SETTINGS), request, answer)
    faulty = [p for p in WEIGHTS if shown.has_fault(p)]
    fine = [p for p in WEIGHTS if p not in faulty]
    rng.shuffle(faulty)
    rng.shuffle(fine)
    faulty.sort(key=lambda p: p not in ("harmless", "helpful") and rng.random() < 0.5)
    if source.phase.late:
        return _late_review(shown, faulty, fine, wording, rng)
    document = [tasks.criticise(shown, p, wording, rng) for p in faulty[:2] + fine[:1]]
    rated: list[str | None] = [None, rng.choice(faulty or fine)]
    document += [tasks.rate(shown, p, rng.choice(SCALES), wording, rng) for p in rated if rng.random() < 0.6]
    revised = faulty[-2:] if faulty and rng.random() < 0.9 else fine[:1]
    document += [tasks.rewrite(shown, p, wording, rng) for p in revised]
    rng.shuffle(document)
    return document


def _late_review(
    shown: ShownResponse, faulty: list[str], fine: list[str], wording: DocumentWording, rng: Random
) -> Document:
    """As `make_review`, with more revisions and ratings, which depend on the whole response."""
    document = [tasks.criticise(shown, p, wording, rng) for p in (*faulty[:2], *fine[:1])]
    document += [tasks.rate(shown, None, scale, wording, rng) for scale in SCALES]
    document.append(tasks.rate(shown, rng.choice(faulty or fine), rng.choice(SCALES), wording, rng))
    revised = [*faulty[-3:], *(fine[:1] if not faulty or rng.random() < 0.15 else [])]
    document += [tasks.rewrite(shown, p, wording, rng, weight=0.8) for p in revised]
    rng.shuffle(document)
    return document


def make_statement(source: Source) -> Document:
    """Something true of the world: a fact, or whether a deed is harmful."""
    rng = source.rng
    few = source.phase.judge_questions.few
    if rng.random() < 0.7:
        belief = rng.choice(rng.choice(_all_facts()).variants)
        return tasks.teach_fact(belief["t"], belief["f"], rng, few=few)
    kind = rng.choices(HOW_TO, (0.4, 0.35, 0.25))[0]
    topic = rng.choice(topics_of(STATEMENTS if rng.random() < 0.25 else "train", kind))
    return [tasks.judge_deed(kind, topic.name, rng, few=few)]


@functools.cache
def _all_facts() -> tuple[Topic, ...]:
    return tuple(topic for topic in all_topics() if topic.kind == "false_belief")


def make_pose(source: Source) -> Document:
    """A message that a user could write, about a topic or to show a trait."""
    rng = source.rng
    if rng.random() < 0.5:
        return [tasks.pose_topic(source.request(), source.sample_wording())]
    trait = rng.choice(list(WEIGHTS))
    return [tasks.pose_trait(trait, source.request(tasks.SHOWN_BY.get(trait, KINDS)), source.sample_wording(), rng)]


MAKERS: Mapping[str, Callable[[Source], Document]] = {
    "decided": make_decided, "crossed": make_crossed, "comparison": make_comparison, "acts": make_acts,
    "truths": make_truths, "review": make_review, "dialogue": make_dialogue, "statement": make_statement,
    "pose": make_pose,
}  # fmt: skip
