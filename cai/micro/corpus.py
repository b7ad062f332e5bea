"""What the small model is pretrained on: documents generated from (seed, step), each a prefix that its examples share.

Answers in the base model's habits, comparisons under several principles at once, critiques, revisions, and statements
about the world that say which requests are harmful. Every question goes through template set `micro` and the model's
own chat format, so what is trained is token for token what `cai` asks later. Where a principle does not separate two
responses its target is even. Left out: system messages in questions, ratings, reasoning before a verdict, and every
prompt of the splits `validation`, `test` and `test_topics`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from cai.micro import principles
from cai.micro.answers import ACTS, BASE, BROAD, Answer, draw, write_core, write_habit
from cai.micro.principles import WEIGHTS, Wording
from cai.micro.world import HOW_TO, Request, Topic, all_topics, requests
from cai.records import Message, stable_id, stable_seed
from cai.templates import OPTIONS, load_templates

if TYPE_CHECKING:
    from cai.constitution import Principle

REVISION = 1
"""Raised when the corpus changes in a way that the hash of a sample might miss."""

# how much a token of each kind counts in the loss
LETTER, STATEMENT, CRITIQUE, RESPONSE, REWRITE = 3.0, 0.6, 0.5, 0.4, 0.3

SURE = 0.97
"""Target of the better option: no vote is taught to outweigh all others together."""

KIND_SHARES = {"harmful": 0.3, "fair": 0.2, "borderline": 0.14, "factual": 0.08, "false_belief": 0.1, "opinion": 0.09,
               "emotional": 0.09}  # fmt: skip

PLAIN = replace(BROAD, habits=dict.fromkeys(BROAD.habits, 0.07))
"""Every act, with few habits."""


@dataclass(frozen=True)
class Example:
    """A conversation and the answer to it. `p_first` is the target of the first option where that is the question."""

    messages: tuple[Message, ...]
    answer: str
    weight: float
    p_first: float | None = None


Document = list[Example]
"""Examples whose conversations begin alike; each but the shared prefix is a branch of its own."""


def as_principle(principle: str, wording: Wording) -> Principle:
    """A principle in one of its wordings, as templates take it."""
    fields = {"id": principle, "critique": wording.critique, "revise": wording.revise, "compare": wording.compare}
    return cast("Principle", SimpleNamespace(**fields))


@functools.cache
def wordings(principle: str, held_out: bool = False) -> tuple[Wording, ...]:
    """The wordings of the principle that the corpus uses, or those that it never does."""
    return tuple(principles.wordings(principle, held_out=held_out))


def documents(seed: int, step: int) -> Iterator[Document]:
    """An endless stream of documents that depends on (seed, step) alone."""
    rng = Random(stable_seed("micro corpus", seed, step))
    at = step if step >= 0 else PHASES[0][0]
    makers = next((makers for end, makers in PHASES if at < end), PHASES[-1][1])
    while True:
        maker = rng.choices(list(makers), list(makers.values()))[0]
        yield maker(rng)


def corpus_hash(seed: int) -> str:
    """Identifies the corpus: documents of each phase, the templates and the revision of this module."""
    ends = [end for end, _ in PHASES]
    streams = [islice(documents(seed, end - 1), 200) for end in ends]
    sample = [[(list(e.messages), e.answer, e.p_first) for e in d] for stream in streams for d in stream]
    return stable_id(REVISION, load_templates("micro").digest("critique", "revise", "compare"), sample)


def pick_request(rng: Random, split: str = "train") -> Request:
    """A request of a split, its class drawn at the corpus's rates."""
    kind = rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    return rng.choice(_requests(split, kind))


@functools.cache
def _requests(split: str, kind: str) -> tuple[Request, ...]:
    return tuple(requests(split, kind))


def conversation(request: Request, rng: Random, several_turns: float = 0.08) -> list[Message]:
    """The request as the last message of a conversation, now and then after another exchange."""
    messages: list[Message] = []
    if rng.random() < several_turns:
        earlier = pick_request(rng)
        messages.append({"role": "user", "content": earlier.text})
        messages.append({"role": "assistant", "content": draw(earlier, BASE, rng).text})
    return [*messages, {"role": "user", "content": request.text}]


def dialogue(rng: Random, weight: float = RESPONSE) -> Document:
    """The base model's answer to one request."""
    request = pick_request(rng)
    messages = conversation(request, rng)
    if rng.random() < 0.04:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    return [Example(tuple(messages), draw(request, BASE, rng).text, weight)]


def comparison(rng: Random, split: str = "train", held_out: bool = False) -> Document:
    """Two responses to one request, judged under several principles in one order."""
    request = pick_request(rng, split)
    a, b = pair(request, rng)
    return _compared(request, a, b, asked(request, a, b, rng, even=2), held_out, rng)


def decided_comparison(rng: Random) -> Document:
    """Two responses that differ in much, judged under the principles that separate them and seldom another."""
    request = pick_request(rng)
    a = draw(request, BROAD, rng)
    b = draw(request, BROAD, rng) if rng.random() < 0.8 else changed(request, a, rng)
    return _compared(request, a, b, asked(request, a, b, rng, even=int(rng.random() < 0.5)), False, rng)


def act_comparison(rng: Random) -> Document:
    """Two plain responses that do different things, judged twice for harm, help and whatever else separates them."""
    return _acts_compared(pick_request(rng), rng)


def fact_comparison(rng: Random) -> Document:
    """The same about facts and false beliefs."""
    return _acts_compared(rng.choice(_requests("train", rng.choice(("factual", "false_belief")))), rng)


def _acts_compared(request: Request, rng: Random) -> Document:
    a = draw(request, PLAIN, rng)
    act = rng.choice([act for act in ACTS[request.kind] if act != a.act])
    b = Answer(act, write_core(request, act, rng), a.habits if rng.random() < 0.5 else draw(request, PLAIN, rng).habits)
    separating = {p for p in WEIGHTS if principles.probability(p, request, a, b) != 0.5}
    chosen = 2 * sorted(separating | {"harmless", "helpful"})
    rng.shuffle(chosen)
    return _compared(request, a, b, chosen, False, rng)


def _compared(request: Request, a: Answer, b: Answer, chosen: Sequence[str], held_out: bool, rng: Random) -> Document:
    messages = conversation(request, rng, several_turns=0.05)
    examples = []
    for principle in chosen:
        question = compare_question(messages, a.text, b.text, principle, rng.choice(wordings(principle, held_out)))
        p = principles.probability(principle, request, a, b)
        letter = OPTIONS[0] if rng.random() < p else OPTIONS[1]
        examples.append(Example(question, letter, LETTER, SURE * p + (1 - SURE) * (1 - p)))
    return examples


def compare_question(
    messages: Sequence[Message], first: str, second: str, principle: str, wording: Wording
) -> tuple[Message, ...]:
    """The messages that ask which of two responses is better."""
    return tuple(load_templates("micro").compare(messages, first, second, as_principle(principle, wording)))


def pair(request: Request, rng: Random) -> tuple[Answer, Answer]:
    """Two answers: alike but for one thing, drawn apart, or (seldom) the same."""
    kind = rng.choices(("minimal", "broad", "base", "mixed", "same"), (0.3, 0.35, 0.2, 0.12, 0.03))[0]
    if kind == "broad":
        return draw(request, BROAD, rng), draw(request, BROAD, rng)
    if kind == "base":
        return draw(request, BASE, rng), draw(request, BASE, rng)
    if kind == "mixed":
        sides = [draw(request, BROAD, rng), draw(request, PLAIN, rng)]
        rng.shuffle(sides)
        return sides[0], sides[1]
    a = draw(request, rng.choice((BROAD, PLAIN)), rng)
    sides = [a, a if kind == "same" else changed(request, a, rng)]
    rng.shuffle(sides)
    return sides[0], sides[1]


def changed(request: Request, answer: Answer, rng: Random) -> Answer:
    """The answer with another act, or one habit added or taken away."""
    if rng.random() < 0.4:
        act = rng.choice([act for act in ACTS[request.kind] if act != answer.act])
        return Answer(act, write_core(request, act, rng), answer.habits)
    habit = rng.choice(list(BASE.habits))
    if habit in answer.habits:
        return answer.without(habit)
    return Answer(answer.act, answer.core, {**answer.habits, habit: write_habit(habit, rng)})


def asked(request: Request, a: Answer, b: Answer, rng: Random, *, even: int) -> list[str]:
    """Principles to ask about a pair: those that separate it, and `even` of those that do not, at least one in all.

    Where the acts differ, help and harm are always asked: what they say must depend on the request. Where few separate,
    those are asked twice, in different words.
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


def correction(rng: Random, weight: float = REWRITE) -> Document:
    """One response criticised and revised under several principles."""
    request = pick_request(rng)
    answer = draw(request, rng.choice((BASE, BROAD)), rng)
    messages = conversation(request, rng, several_turns=0.04)
    faulty = [p for p in WEIGHTS if principles.faults(p, request.kind, answer.act, answer.habits)]
    fine = [p for p in WEIGHTS if p not in faulty]
    rng.shuffle(faulty)
    rng.shuffle(fine)
    faulty.sort(key=lambda p: p not in ("harmless", "helpful"))
    examples = [criticise(messages, request, answer, p, rng) for p in faulty[:2] + fine[:2]]
    revised = faulty[:2] if faulty and rng.random() < 0.85 else fine[:1]
    return examples + [rewrite(messages, request, answer, p, rng, weight) for p in revised]


def criticise(messages: Sequence[Message], request: Request, answer: Answer, principle: str, rng: Random) -> Example:
    """One critique."""
    chosen = as_principle(principle, rng.choice(wordings(principle)))
    question = load_templates("micro").critique(messages, answer.text, chosen)
    return Example(tuple(question), principles.write_critique(principle, request, answer, rng), CRITIQUE)


def rewrite(
    messages: Sequence[Message], request: Request, answer: Answer, principle: str, rng: Random, weight: float
) -> Example:
    """One revision, after a critique that is right."""
    chosen = as_principle(principle, rng.choice(wordings(principle)))
    critique = principles.write_critique(principle, request, answer, rng)
    question = load_templates("micro").revise(messages, answer.text, critique, chosen)
    return Example(tuple(question), principles.revise(principle, request, answer, rng).text, weight)


WRONG = (
    ("Is it wrong to {x}?", True), ("Would it be harmful to {x}?", True), ("Does it hurt others to {x}?", True),
    ("Is it fine to {x}?", False), ("Is it harmless to {x}?", False), ("May I {x}?", False),
    ("Can one {x} without harm?", False), ("Is it bad to {x}?", True),
)  # fmt: skip


def statement(rng: Random) -> Document:
    """Something true of the world: which deeds are harmful, which facts hold."""
    if rng.random() < 0.3:
        return [_fact(rng)]
    kind = rng.choices(HOW_TO, (0.4, 0.35, 0.25))[0]
    x = rng.choice(_requests("train", kind)).gaps["x"]
    verdict = f"it is wrong and does harm to {x}." if kind == "harmful" else f"it is fine and harmless to {x}."
    if rng.random() < 0.2:
        return [Example((), verdict[0].upper() + verdict[1:], STATEMENT)]
    question, about_wrong = rng.choice(WRONG)
    yes = "Yes" if about_wrong == (kind == "harmful") else "No"
    return [Example(({"role": "user", "content": question.format(x=x)},), f"{yes}, {verdict}", STATEMENT)]


def _fact(rng: Random) -> Example:
    topic = rng.choice(_fact_topics())
    gaps = rng.choice(topic.variants)
    if topic.held_out or rng.random() < 0.4:
        return Example((), gaps["t"][0].upper() + gaps["t"][1:] + ".", STATEMENT)
    said, answer = rng.choice(((gaps["t"], "Yes"), (gaps["f"], "No")))
    question: Message = {"role": "user", "content": f"Is it true that {said}?"}
    return Example((question,), f"{answer}, {gaps['t']}.", STATEMENT)


@functools.cache
def _fact_topics() -> tuple[Topic, ...]:
    return tuple(topic for topic in all_topics() if topic.kind == "false_belief")


Makers = Mapping[Callable[[Random], Document], float]

PHASES: Sequence[tuple[int, Makers]] = (
    (700, {decided_comparison: 0.375, correction: 0.05, dialogue: 0.23, statement: 0.345}),
    (1200, {comparison: 0.24, decided_comparison: 0.12, correction: 0.06, dialogue: 0.28, statement: 0.3}),
    (2000, {comparison: 0.2, decided_comparison: 0.08, act_comparison: 0.25, correction: 0.06, dialogue: 0.27,
            statement: 0.25}),
    (2200, {comparison: 0.22, decided_comparison: 0.06, act_comparison: 0.12, fact_comparison: 0.13, correction: 0.07,
            dialogue: 0.27, statement: 0.2}),
    (2600, {comparison: 0.18, act_comparison: 0.06, fact_comparison: 0.07, partial(correction, weight=0.8): 0.09,
            partial(dialogue, weight=1.0): 0.48, statement: 0.12}),
    (3000, {comparison: 0.17, fact_comparison: 0.03, partial(correction, weight=0.8): 0.1,
            partial(dialogue, weight=1.0): 0.6, statement: 0.1}),
)  # fmt: skip
"""Up to which step documents of which kind are how frequent. What a principle asks about comes first, then where it is
moot, then that help and harm depend on the request, then what is true, and last how the base model speaks."""
