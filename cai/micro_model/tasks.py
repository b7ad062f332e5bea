"""What the small model is asked, and what the world's truth answers: one function a task, for one Example or several.

Questions go through template set `micro`, so that what is trained is token for token what `cai` asks later. The tasks:
compare two responses (also after reasoning, by the contrary of a principle, or by which is true), argue for one,
criticise, rate and revise one, write what a user could say, and say what is wrong or true in the world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from cai.micro import phrases, world_principles
from cai.micro.answers import Answer
from cai.micro.world import Request, held_out, trained
from cai.micro_model.wordings import PHRASES, Kind, Wording, overall, wordings
from cai.storage.rows import Message
from cai.templates import OPTIONS, TemplateSet, load_templates

if TYPE_CHECKING:
    from cai.constitution import Principle

SURE = 0.95
"""Target of the better option: no vote is taught to outweigh all others together."""

SCALES = (7, 10)
"""Ratings are from 1 to one of these."""

# how much a token of each kind counts in the loss
LETTER, STATEMENT, CRITIQUE, RESPONSE, REWRITE = 3.0, 0.6, 0.5, 0.5, 0.4


@dataclass(frozen=True)
class Example:
    """A conversation and the answer to it, whose tokens count `weight` in the loss.

    `p_first` is the target of the first option where that is the question. `thoughts` is what the tokens of the
    conversation's own assistant turns count: not nearly nothing only where the model wrote them itself. `first_weight`
    is what the answer's first token counts where it is the verdict, Yes or No.
    """

    messages: tuple[Message, ...]
    answer: str
    weight: float
    p_first: float | None = None
    thoughts: float | None = None
    first_weight: float | None = None


Document = list[Example]
"""Examples whose conversations begin alike; each but the shared prefix is a branch of its own."""


@dataclass(frozen=True)
class Words:
    """The wordings of one document: its template slots, and whether phrases of principles are the held-out ones."""

    templates: TemplateSet
    held_out: bool = False
    composed: float = 0.6
    """How often a phrase for the judge is a composed one."""
    few: bool = False
    """Whether the judge is asked in few phrases, none of them composed."""
    own: Mapping[str, Wording] | None = None
    """Somebody else's wording of each principle, instead of the world's."""

    def principle(self, principle: str, rng: Random) -> Wording:
        """One wording of the principle."""
        if self.own is not None:
            return self.own[principle]
        kind: Kind = "composed" if rng.random() < self.composed else "free"
        return rng.choice(wordings(principle, "few" if self.few else kind, unseen=self.held_out))

    def phrase(self, listed: Sequence[str], rng: Random) -> str:
        """One of a list of phrases."""
        return rng.choice((held_out if self.held_out else trained)(listed))


def draw_words(rng: Random, *, few: bool = False, composed: float = Words.composed) -> Words:
    """Trained wordings: those that users' models are asked in, or for each slot one at random."""
    templates = load_templates("micro")
    if rng.random() < 0.3:
        return Words(templates, composed=composed, few=few)
    chosen: dict[str, str] = {}

    def pick(slot: Sequence[str]) -> str:
        return chosen.setdefault(slot[0], rng.choice(trained(slot)))

    return Words(replace(templates, pick=pick), composed=composed, few=few)


N_WORDINGS = 15
"""Wordings of every template slot; the last fifth is in no document of the corpus."""


def nth_words(n: int) -> Words:
    """The n-th wording of every slot, principles in trained words."""
    return Words(replace(load_templates("micro"), pick=lambda slot: slot[n]))


def canonical_words(*, held_out: bool = False, composed: float = Words.composed) -> Words:
    """What users' models are asked in; with held-out phrases of principles."""
    return Words(load_templates("micro"), held_out, composed)


def unseen_words() -> Words:
    """Wordings that the corpus has not, of every slot and of principles."""
    return replace(nth_words(N_WORDINGS - 1), held_out=True)


def as_principle(principle: str, wording: Wording) -> Principle:
    """A principle in one of its wordings, as templates take it."""
    fields = {"id": principle, "critique": wording.critique, "revise": wording.revise, "compare": wording.compare}
    return cast("Principle", SimpleNamespace(**fields))


@dataclass(frozen=True)
class Compared:
    """Two responses to one request in the order in which they are shown. The texts may have more than the answers."""

    messages: Sequence[Message]
    request: Request
    a: Answer
    b: Answer
    texts: tuple[str, str]

    def truth(self, principle: str) -> float:
        """1 where the first is better under the principle, 0 where the second is, 0.5 where neither."""
        return world_principles.probability(principle, self.request, self.a, self.b)


def compare(pair: Compared, principle: str, words: Words, rng: Random, *, contrary: bool = False) -> Example:
    """Which is better; with `contrary`, which is worse."""
    wording = words.principle(principle, rng)
    p = pair.truth(principle)
    question = wording.contrary if contrary else wording.compare
    return _choice(ask_compare(pair, words, question), 1 - p if contrary else p, rng)


def which_is_true(pair: Compared, words: Words, rng: Random) -> Example:
    """Which of two responses is more honest, in the words in which sentences are told apart.

    A refusal says nothing false: against a falsehood it is the true one, against a truth the target is even.
    """
    question, wants_true = rng.choice(WHICH_IS_TRUE)
    p = pair.truth("honest")
    return _choice(ask_compare(pair, words, question), p if wants_true else 1 - p, rng)


def compare_after_reasoning(pair: Compared, principle: str, words: Words, rng: Random) -> Example:
    """What is wrong with each first, then which is better."""
    reasoning = write_reasoning(pair, principle, rng)
    messages = ask_verdict(pair, words, words.principle(principle, rng).compare, reasoning)
    return replace(_choice(messages, pair.truth(principle), rng), thoughts=CRITIQUE)


def ask_compare(pair: Compared, words: Words, question: str) -> list[Message]:
    """The messages that ask which of the two it is."""
    a, b = pair.texts
    return words.templates.ask("compare", messages=pair.messages, first=a, second=b, request=question)


def ask_reasoning(pair: Compared, words: Words, question: str) -> list[Message]:
    """The messages that ask for reasons."""
    a, b = pair.texts
    return words.templates.ask("reason", messages=pair.messages, first=a, second=b, request=question)


def ask_verdict(pair: Compared, words: Words, question: str, reasoning: str) -> list[Message]:
    """The messages that ask for a verdict after the reasons given."""
    a, b = pair.texts
    return words.templates.ask(
        "verdict", messages=pair.messages, first=a, second=b, request=question, reasoning=reasoning
    )


def write_reasoning(pair: Compared, principle: str, rng: Random) -> str:
    """What a good judge thinks: a critique of each, and what follows."""
    first, second = (world_principles.write_critique(principle, pair.request, each, rng) for each in (pair.a, pair.b))
    p = pair.truth(principle)
    better = "Neither" if p == 0.5 else OPTIONS[0] if p > 0.5 else OPTIONS[1]
    return f"A: {first} B: {second} {better} is better."


def argue(pair: Compared, principle: str, words: Words, rng: Random) -> Example:
    """The best that can be said for one of the two: what is wrong with the other, if anything is."""
    side = rng.choice(OPTIONS)
    other, answer = (OPTIONS[1], pair.b) if side == OPTIONS[0] else (OPTIONS[0], pair.a)
    question = words.principle(principle, rng).compare
    a, b = pair.texts
    messages = words.templates.ask("argue", messages=pair.messages, first=a, second=b, request=question, side=side)
    return Example(tuple(messages), write_argument(principle, pair.request, answer, other, rng), CRITIQUE)


def write_argument(principle: str, request: Request, against: Answer, letter: str, rng: Random) -> str:
    """What speaks against the response `letter`."""
    if world_principles.faults(principle, request.kind, against.act, against.habits):
        return f"Not {letter}: {world_principles.write_critique(principle, request, against, rng)}"
    return f"Little speaks against {letter} here."


def _choice(messages: Sequence[Message], p: float, rng: Random) -> Example:
    letter = OPTIONS[0] if rng.random() < p else OPTIONS[1]
    return Example(tuple(messages), letter, LETTER, SURE * p + (1 - SURE) * (1 - p))


@dataclass(frozen=True)
class Reviewed:
    """One response to one request."""

    messages: Sequence[Message]
    request: Request
    answer: Answer

    def faulty(self, principle: str) -> bool:
        """Whether anything is wrong with it under the principle."""
        return bool(world_principles.faults(principle, self.request.kind, self.answer.act, self.answer.habits))


def criticise(one: Reviewed, principle: str, words: Words, rng: Random) -> Example:
    """What is wrong under a principle."""
    chosen = as_principle(principle, words.principle(principle, rng))
    messages = words.templates.critique(one.messages, one.answer.text, chosen)
    return Example(tuple(messages), world_principles.write_critique(principle, one.request, one.answer, rng), CRITIQUE)


def rate(one: Reviewed, principle: str | None, scale: int, words: Words, rng: Random) -> Example:
    """How good it is under a principle, or as a whole."""
    request = words.principle(principle, rng).critique if principle else rng.choice(overall(words.held_out))
    messages = ask_rating(one, request, scale, words)
    value = world_principles.score(principle, one.request, one.answer)
    return Example(tuple(messages), str(world_principles.rating(value, scale)), LETTER)


def ask_rating(one: Reviewed, request: str, scale: int, words: Words) -> list[Message]:
    """The messages that ask for a number."""
    return words.templates.ask("rate", messages=one.messages, response=one.answer.text, request=request, scale=scale)


def rewrite(one: Reviewed, principle: str, words: Words, rng: Random, weight: float = REWRITE) -> Example:
    """The response with what is wrong put right, after a critique that is right."""
    chosen = as_principle(principle, words.principle(principle, rng))
    critique = world_principles.write_critique(principle, one.request, one.answer, rng)
    messages = words.templates.revise(one.messages, one.answer.text, critique, chosen)
    return Example(tuple(messages), world_principles.revise(principle, one.request, one.answer, rng).text, weight)


ABOUT: Mapping[str, str] = {
    "harmful": "how to {x}",
    "fair": "how to {x}",
    "borderline": "how to {x}",
    "factual": "the question {q}",
    "false_belief": "the belief that {f}",
    "opinion": "why {p} are better than {q}",
    "emotional": "being {e} because {c}",
    "creative": "a wish for {k} about {o}",
}
SHOWN_BY: Mapping[str, tuple[str, ...]] = {
    "harmless": ("harmful",),
    "helpful": ("fair", "borderline", "emotional", "creative"),
    "honest": ("factual", "false_belief"),
    "candid": ("opinion",),
    "balanced": ("opinion",),
}
"""Classes of requests that show a trait; any where the trait is about manners."""


def pose_topic(request: Request, words: Words) -> Example:
    """A user's message about a topic."""
    about = ABOUT[request.kind].format_map(request.gaps)
    return Example(tuple(words.templates.ask("pose", about=about)), replace(request, circumstance="").text, RESPONSE)


def pose_trait(principle: str, request: Request, words: Words, rng: Random) -> Example:
    """A user's message that shows whether an assistant has a trait; `request` is of a class that does."""
    about = f"something that shows whether the assistant {words.phrase(PHRASES[principle].good, rng)}"
    return Example(tuple(words.templates.ask("pose", about=about)), request.text, RESPONSE)


_PREDICATES = (("wrong", True), ("fine", False), ("harmful", True), ("harmless", False), ("bad", True),
               ("all right", False))  # fmt: skip
_ASKED = ("Is it {p} to {{x}}?", "Would it be {p} to {{x}}?", "Do you find it {p} to {{x}}?",
          "Would you call it {p} to {{x}}?", "Do people say that it is {p} to {{x}}?")  # fmt: skip
_COMPOSED = tuple(
    (asked.format(p=predicate), wrong, (i + j) % 5 == 4)
    for i, (predicate, wrong) in enumerate(_PREDICATES)
    for j, asked in enumerate(_ASKED)
)
WRONG = (
    ("Does it hurt others to {x}?", True), ("May I {x}?", False), ("Can one {x} without harm?", False),
    ("Does it do harm to {x}?", True), ("Would it hurt others to {x}?", True), ("Can I {x} without harm?", False),
    *((question, wrong) for question, wrong, unseen in _COMPOSED if not unseen),
    *((question, wrong) for question, wrong, unseen in _COMPOSED if unseen),
)  # fmt: skip
"""Questions about right and wrong, and whether yes says that the deed is wrong; the last fifth is held out.

That is the compositions on the diagonal of predicates and frames, and one more.
"""
FEW_QUESTIONS = 4


def ask_wrong(x: str, question: str) -> list[Message]:
    """The messages that ask whether a deed is wrong."""
    return [{"role": "user", "content": question.format(x=x)}]


def deed(kind: str, x: str, rng: Random, *, few: bool = False) -> Example:
    """Whether a deed is harmful, told or answered; with `few`, asked in few wordings."""
    verdict = f"it is wrong and does harm to {x}." if kind == "harmful" else f"it is fine and harmless to {x}."
    if rng.random() < 0.25:
        return Example((), _sentence(verdict), STATEMENT)
    question, about_wrong = rng.choice(WRONG[:FEW_QUESTIONS] if few else trained(WRONG))
    yes = "Yes" if about_wrong == (kind == "harmful") else "No"
    return Example(tuple(ask_wrong(x, question)), f"{yes}, {verdict}", STATEMENT, first_weight=LETTER)


FACT_QUESTIONS = ("Is it true that {f}?", "{s} Is that true?", "Is it right that {f}?", "{s} Is that right?",
                  "Is it the case that {f}?", "Yes or no: {f}?")  # fmt: skip
FACT_SENTENCES = ("{f}.", "As everyone knows, {f}.", "It is true that {f}.", "It is a fact that {f}.", *phrases.ANSWER)
WHICH_IS_TRUE = (("Which is true?", True), ("Which is false?", False), ("Which one is right?", True),
                 ("Which one is wrong?", False))  # fmt: skip
FEW_FACTS = 2
"""Of the questions and sentences about facts, those that the corpus begins with are the first."""


def fact(true: str, false: str, rng: Random, *, few: bool = False) -> Document:
    """A fact: told, or together with a false sentence about the same: each asked about with yes or no, or told apart.

    With `few`, questions are few, and so are the sentences told apart.
    """
    how = rng.choices(("told", "asked", "told apart"), (0.2, 0.5, 0.3))[0]
    if how == "told":
        return [Example((), _sentence(rng.choice(FACT_SENTENCES).format(f=true)), STATEMENT)]
    if how == "asked":
        question, sentence = rng.choice(FACT_QUESTIONS[: FEW_FACTS if few else None]), rng.choice(FACT_SENTENCES)
        asked = [
            (question.format(f=said, s=_sentence(sentence.format(f=said))), yes)
            for said, yes in rng.sample(((true, "Yes"), (false, "No")), 2)
        ]
        return [
            Example(({"role": "user", "content": text},), f"{yes}, {true}.", STATEMENT, first_weight=LETTER)
            for text, yes in asked
        ]
    both = rng.sample((true, false), 2)
    a, b = (_sentence(rng.choice(FACT_SENTENCES[: FEW_FACTS if few else None]).format(f=each)) for each in both)
    questions = WHICH_IS_TRUE[:FEW_FACTS] if few else rng.sample(WHICH_IS_TRUE, 2)
    return [
        _choice([{"role": "user", "content": f"A: {a}\nB: {b}\n{question}"}], float((both[0] == true) == truth), rng)
        for question, truth in questions
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
