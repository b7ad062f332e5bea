"""The small model's tasks: what it is asked, and the answer that follows from the world's truth. A function each.

Questions are rendered by template set `micro`, so that the training text is token for token what `cai` asks later. The
tasks: compare two responses (also after a rationale, by the contrary of a principle, or by which is true), argue for
one of them, criticise, rate and revise a response, write a user's message, and say what is wrong or true in the world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from cai.micro import phrases, world_principles
from cai.micro.answers import Answer
from cai.micro.world import HOW_TO, Request, held_out_part, trained_part
from cai.micro_model.principle_wordings import (
    PHRASES,
    PhraseKind,
    PrincipleWording,
    overall_requests,
    principle_wordings,
)
from cai.storage.rows import Message
from cai.templates import OPTIONS, TemplateSet, load_templates

if TYPE_CHECKING:
    from cai.constitution import Principle

SURE = 0.95
"""Target probability of the better option: a target of 1 would teach votes that outweigh all others together."""

SCALES = (7, 10)
"""Ratings are from 1 to one of these."""

# Weight in the loss of a token of each kind.
LETTER, STATEMENT, CRITIQUE, RESPONSE, REWRITE = 3.0, 0.6, 0.5, 0.5, 0.4


@dataclass(frozen=True)
class Example:
    """A conversation and the answer to it, whose tokens have `weight` in the loss.

    `p_first` is the target probability of the first option, if the answer is an option. `rationale_weight` is the
    weight of the tokens of the last assistant turn of the conversation, if that is a rationale that the model itself
    would have written. `first_weight` is the weight of the answer's first token, if that is the verdict, Yes or No.
    """

    messages: tuple[Message, ...]
    answer: str
    weight: float
    p_first: float | None = None
    rationale_weight: float | None = None
    first_weight: float | None = None


Document = list[Example]
"""Examples whose conversations begin alike: after the shared prefix each of them is a branch."""


@dataclass(frozen=True)
class DocumentWording:
    """How the questions of one document are worded: its template slots, and where phrases of principles come from."""

    templates: TemplateSet
    held_out: bool = False
    """Whether phrases of principles are held-out ones."""
    composed: float = 0.6
    """Probability that a phrase for the judge is a composed one."""
    few: bool = False
    """Whether the judge is asked in the first few free phrases alone."""
    own: Mapping[str, PrincipleWording] | None = None
    """An outsider's wording of each principle, instead of the world's."""

    def sample_principle(self, principle: str, rng: Random) -> PrincipleWording:
        """A wording of the principle."""
        if self.own is not None:
            return self.own[principle]
        kind: PhraseKind = "composed" if rng.random() < self.composed else "free"
        return rng.choice(principle_wordings(principle, "few" if self.few else kind, held_out=self.held_out))

    def sample_phrase(self, phrases: Sequence[str], rng: Random) -> str:
        """One of the phrases."""
        return rng.choice((held_out_part if self.held_out else trained_part)(phrases))


def sample_wording(rng: Random, *, few: bool = False, composed: float = DocumentWording.composed) -> DocumentWording:
    """A trained wording: mostly a random one of every template slot, else the one in which users' models are asked."""
    templates = load_templates("micro")
    if rng.random() < 0.3:
        return DocumentWording(templates, composed=composed, few=few)
    chosen: dict[str, str] = {}

    def pick(slot: Sequence[str]) -> str:
        return chosen.setdefault(slot[0], rng.choice(trained_part(slot)))

    return DocumentWording(replace(templates, pick=pick), composed=composed, few=few)


N_WORDINGS = 15
"""Wordings of every template slot; the last fifth is in no document of the corpus."""


def nth_wording(n: int) -> DocumentWording:
    """The n-th wording of every slot, with trained phrases of principles."""
    return DocumentWording(replace(load_templates("micro"), pick=lambda slot: slot[n]))


def canonical_wording(*, held_out: bool = False, composed: float = DocumentWording.composed) -> DocumentWording:
    """The wording of slots in which users' models are asked, with trained or held-out phrases of principles."""
    return DocumentWording(load_templates("micro"), held_out, composed)


def held_out_wording() -> DocumentWording:
    """Held-out wordings of every slot and held-out phrases of principles."""
    return replace(nth_wording(N_WORDINGS - 1), held_out=True)


def as_principle(principle: str, wording: PrincipleWording) -> Principle:
    """A principle in one of its wordings, with the fields that templates use."""
    fields = {"id": principle, "critique": wording.critique, "revise": wording.revise, "compare": wording.compare}
    return cast("Principle", SimpleNamespace(**fields))


@dataclass(frozen=True)
class ShownPair:
    """Two responses to one request in the order in which they are shown. A text may have an injection in addition."""

    messages: Sequence[Message]
    request: Request
    a: Answer
    b: Answer
    texts: tuple[str, str]

    def truth(self, principle: str) -> float:
        """1 if the first is better under the principle, 0 if the second is, 0.5 if neither."""
        return world_principles.probability(principle, self.request, self.a, self.b)


def compare(
    pair: ShownPair, principle: str, wording: DocumentWording, rng: Random, *, contrary: bool = False
) -> Example:
    """Which is better; with `contrary`, which is worse."""
    principle_wording = wording.sample_principle(principle, rng)
    p = pair.truth(principle)
    question = principle_wording.contrary if contrary else principle_wording.compare
    return _choice(ask_about_pair("compare", pair, wording, question), 1 - p if contrary else p, rng)


def compare_truth(pair: ShownPair, wording: DocumentWording, rng: Random) -> Example:
    """Which of two responses is more honest, asked as about two sentences in `WHICH_IS_TRUE`.

    A refusal says nothing false: it is the true one of a pair with a falsehood, and even with a truth.
    """
    question, wants_true = rng.choice(WHICH_IS_TRUE)
    p = pair.truth("honest")
    return _choice(ask_about_pair("compare", pair, wording, question), p if wants_true else 1 - p, rng)


def compare_after_rationale(pair: ShownPair, principle: str, wording: DocumentWording, rng: Random) -> Example:
    """Which is better, after a rationale that says what is wrong with each."""
    rationale = write_rationale(pair, principle, rng)
    question = wording.sample_principle(principle, rng).compare
    messages = ask_about_pair("verdict", pair, wording, question, reasoning=rationale)
    return replace(_choice(messages, pair.truth(principle), rng), rationale_weight=CRITIQUE)


def ask_about_pair(
    template: str, pair: ShownPair, wording: DocumentWording, question: str, **values: str
) -> list[Message]:
    """Asks which of the two it is (template `compare`), for a rationale (`reason`) or for a verdict after `reasoning`
    (`verdict`)."""
    a, b = pair.texts
    return wording.templates.render(template, messages=pair.messages, first=a, second=b, request=question, **values)


def write_rationale(pair: ShownPair, principle: str, rng: Random) -> str:
    """A correct rationale: a critique of each response, and which is better."""
    answers = (pair.a, pair.b)
    first, second = (world_principles.write_critique(principle, pair.request, answer, rng) for answer in answers)
    p = pair.truth(principle)
    better = "Neither" if p == 0.5 else OPTIONS[0] if p > 0.5 else OPTIONS[1]
    return f"A: {first} B: {second} {better} is better."


def argue(pair: ShownPair, principle: str, wording: DocumentWording, rng: Random) -> Example:
    """The best argument for one of the two: what is wrong with its opponent, if anything is."""
    side = rng.choice(OPTIONS)
    opponent, answer = (OPTIONS[1], pair.b) if side == OPTIONS[0] else (OPTIONS[0], pair.a)
    question = wording.sample_principle(principle, rng).compare
    messages = ask_about_pair("argue", pair, wording, question, side=side)
    return Example(tuple(messages), write_argument(principle, pair.request, answer, opponent, rng), CRITIQUE)


def write_argument(principle: str, request: Request, against: Answer, letter: str, rng: Random) -> str:
    """What is wrong with the answer `against`, which is shown as `letter`."""
    if world_principles.faults(principle, request.kind, against.act, against.habits):
        return f"Not {letter}: {world_principles.write_critique(principle, request, against, rng)}"
    return f"Little speaks against {letter} here."


def _choice(messages: Sequence[Message], p: float, rng: Random) -> Example:
    letter = OPTIONS[0] if rng.random() < p else OPTIONS[1]
    return Example(tuple(messages), letter, LETTER, SURE * p + (1 - SURE) * (1 - p))


@dataclass(frozen=True)
class ShownResponse:
    """One response to one request."""

    messages: Sequence[Message]
    request: Request
    answer: Answer

    def has_fault(self, principle: str) -> bool:
        """Whether anything is wrong with it under the principle."""
        return bool(world_principles.faults(principle, self.request.kind, self.answer.act, self.answer.habits))


def criticise(shown: ShownResponse, principle: str, wording: DocumentWording, rng: Random) -> Example:
    """What is wrong with the response under a principle."""
    worded = as_principle(principle, wording.sample_principle(principle, rng))
    messages = wording.templates.critique(shown.messages, shown.answer.text, worded)
    critique = world_principles.write_critique(principle, shown.request, shown.answer, rng)
    return Example(tuple(messages), critique, CRITIQUE)


def rate(shown: ShownResponse, principle: str | None, scale: int, wording: DocumentWording, rng: Random) -> Example:
    """How good the response is under a principle, or as a whole."""
    if principle:
        request = wording.sample_principle(principle, rng).critique
    else:
        request = rng.choice(overall_requests(held_out=wording.held_out))
    messages = ask_rating(shown, request, scale, wording)
    value = world_principles.score(principle, shown.request, shown.answer)
    return Example(tuple(messages), str(world_principles.rating(value, scale)), LETTER)


def ask_rating(shown: ShownResponse, request: str, scale: int, wording: DocumentWording) -> list[Message]:
    """The messages that ask for a number."""
    values = {"messages": shown.messages, "response": shown.answer.text, "request": request, "scale": scale}
    return wording.templates.render("rate", **values)


def rewrite(
    shown: ShownResponse, principle: str, wording: DocumentWording, rng: Random, weight: float = REWRITE
) -> Example:
    """The response with its faults corrected, after a correct critique."""
    worded = as_principle(principle, wording.sample_principle(principle, rng))
    critique = world_principles.write_critique(principle, shown.request, shown.answer, rng)
    messages = wording.templates.revise(shown.messages, shown.answer.text, critique, worded)
    return Example(tuple(messages), world_principles.revise(principle, shown.request, shown.answer, rng).text, weight)


ABOUT: Mapping[str, str] = {
    **dict.fromkeys(HOW_TO, "how to {x}"), "factual": "the question {q}", "false_belief": "the belief that {f}",
    "opinion": "why {p} are better than {q}", "emotional": "being {e} because {c}",
    "creative": "a wish for {k} about {o}",
}  # fmt: skip
SHOWN_BY: Mapping[str, tuple[str, ...]] = {
    "harmless": ("harmful",), "helpful": ("fair", "borderline", "emotional", "creative"),
    "honest": ("factual", "false_belief"), "candid": ("opinion",), "balanced": ("opinion",),
}  # fmt: skip
"""Classes of requests that show a trait; a trait about manners, not listed here, shows in any."""


def pose_topic(request: Request, wording: DocumentWording) -> Example:
    """A user's message about a topic."""
    about = ABOUT[request.kind].format_map(request.gaps)
    messages = wording.templates.render("pose", about=about)
    return Example(tuple(messages), replace(request, circumstance="").text, RESPONSE)


def pose_trait(principle: str, request: Request, wording: DocumentWording, rng: Random) -> Example:
    """A user's message that shows whether an assistant has a trait; `request` is of a class that does."""
    about = f"something that shows whether the assistant {wording.sample_phrase(PHRASES[principle].good, rng)}"
    return Example(tuple(wording.templates.render("pose", about=about)), request.text, RESPONSE)


_PREDICATES = (("wrong", True), ("fine", False), ("harmful", True), ("harmless", False), ("bad", True),
               ("all right", False))  # fmt: skip
_QUESTION_FRAMES = ("Is it {p} to {{x}}?", "Would it be {p} to {{x}}?", "Do you find it {p} to {{x}}?",
          "Would you call it {p} to {{x}}?", "Do people say that it is {p} to {{x}}?")  # fmt: skip
_COMPOSED = tuple(
    (frame.format(p=predicate), yes_is_wrong, (i + j) % 5 == 4)
    for i, (predicate, yes_is_wrong) in enumerate(_PREDICATES)
    for j, frame in enumerate(_QUESTION_FRAMES)
)
WRONG = (
    ("Does it hurt others to {x}?", True), ("May I {x}?", False), ("Can one {x} without harm?", False),
    ("Does it do harm to {x}?", True), ("Would it hurt others to {x}?", True), ("Can I {x} without harm?", False),
    *((question, yes_is_wrong) for question, yes_is_wrong, is_held_out in _COMPOSED if not is_held_out),
    *((question, yes_is_wrong) for question, yes_is_wrong, is_held_out in _COMPOSED if is_held_out),
)  # fmt: skip
"""(question about right and wrong, whether yes says that the deed is wrong). The last fifth is held out: of the
composed questions one for each predicate, and one more."""
FEW_QUESTIONS = 4


def ask_wrong(x: str, question: str) -> list[Message]:
    """The messages that ask whether a deed is wrong."""
    return [{"role": "user", "content": question.format(x=x)}]


def judge_deed(kind: str, x: str, rng: Random, *, few: bool = False) -> Example:
    """Whether a deed is harmful, as a statement or as the answer to a question, one of the first with `few`."""
    verdict = f"it is wrong and does harm to {x}." if kind == "harmful" else f"it is fine and harmless to {x}."
    if rng.random() < 0.25:
        return Example((), _sentence(verdict), STATEMENT)
    question, about_wrong = rng.choice(WRONG[:FEW_QUESTIONS] if few else trained_part(WRONG))
    yes = "Yes" if about_wrong == (kind == "harmful") else "No"
    return Example(tuple(ask_wrong(x, question)), f"{yes}, {verdict}", STATEMENT, first_weight=LETTER)


FACT_QUESTIONS = ("Is it true that {f}?", "{s} Is that true?", "Is it right that {f}?", "{s} Is that right?",
                  "Is it the case that {f}?", "Yes or no: {f}?")  # fmt: skip
FACT_SENTENCES = ("{f}.", "As everyone knows, {f}.", "It is true that {f}.", "It is a fact that {f}.", *phrases.ANSWER)
WHICH_IS_TRUE = (("Which is true?", True), ("Which is false?", False), ("Which one is right?", True),
                 ("Which one is wrong?", False))  # fmt: skip
FEW_FACTS = 2
"""Number of the questions and sentences about facts with which the corpus begins."""


def teach_fact(true: str, false: str, rng: Random, *, few: bool = False) -> Document:
    """A true and a false sentence about one fact: the true one stated, both asked about with yes or no, or told apart.

    With `few`, only the first of the questions and sentences occur.
    """
    task = rng.choices(("state", "ask", "tell apart"), (0.2, 0.5, 0.3))[0]
    if task == "state":
        return [Example((), _sentence(rng.choice(FACT_SENTENCES).format(f=true)), STATEMENT)]
    if task == "ask":
        question, sentence = rng.choice(FACT_QUESTIONS[: FEW_FACTS if few else None]), rng.choice(FACT_SENTENCES)
        examples = []
        for claim, verdict in rng.sample(((true, "Yes"), (false, "No")), 2):
            text = question.format(f=claim, s=_sentence(sentence.format(f=claim)))
            message: Message = {"role": "user", "content": text}
            examples.append(Example((message,), f"{verdict}, {true}.", STATEMENT, first_weight=LETTER))
        return examples
    claims = rng.sample((true, false), 2)
    a, b = (_sentence(rng.choice(FACT_SENTENCES[: FEW_FACTS if few else None]).format(f=claim)) for claim in claims)
    questions = WHICH_IS_TRUE[:FEW_FACTS] if few else rng.sample(WHICH_IS_TRUE, 2)
    examples = []
    for question, wants_true in questions:
        text = f"A: {a}\nB: {b}\n{question}"
        examples.append(_choice([{"role": "user", "content": text}], float((claims[0] == true) == wants_true), rng))
    return examples


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
