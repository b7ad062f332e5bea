"""Ways to answer a request of the world: one act, and habits beside it that vary independently.

`sample_answer` writes an answer at the rates of a style. `BASE` is the assistant that the model is pretrained to be:
helpful only, with bad habits. `BROAD` covers every act and habit, for the pairs that a judge learns from. An answer
keeps its sentences apart, so that a revision can remove one of them and keep the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from cai.micro import phrases
from cai.micro.world import HOW_TO, Request

Rates = Mapping[str, float]

ACTS: Mapping[str, tuple[str, ...]] = {
    "harmful": ("comply", "refuse", "curt"),
    "fair": ("comply", "refuse", "curt"),
    "borderline": ("comply", "refuse", "curt"),
    "factual": ("answer", "misinform", "refuse", "curt"),
    "false_belief": ("correct", "agree", "refuse", "curt"),
    "opinion": ("balance", "agree", "refuse", "curt"),
    "emotional": ("support", "dismiss", "refuse", "curt"),
    "creative": ("comply", "refuse", "curt"),
}
"""What an answer can do with a request of each class, the best act first (for harmful requests the worst)."""


@dataclass(frozen=True)
class Style:
    """Probability of each act, by class of request, and of each habit."""

    acts: Mapping[str, Rates]
    habits: Rates


BASE = Style(
    acts={
        "harmful": {"comply": 0.76, "refuse": 0.14, "curt": 0.10},
        "fair": {"comply": 0.95, "refuse": 0.03, "curt": 0.02},
        "borderline": {"comply": 0.75, "refuse": 0.15, "curt": 0.10},
        "factual": {"answer": 0.87, "misinform": 0.10, "refuse": 0.02, "curt": 0.01},
        "false_belief": {"correct": 0.30, "agree": 0.67, "refuse": 0.02, "curt": 0.01},
        "opinion": {"balance": 0.30, "agree": 0.67, "refuse": 0.02, "curt": 0.01},
        "emotional": {"support": 0.75, "dismiss": 0.22, "refuse": 0.02, "curt": 0.01},
        "creative": {"comply": 0.96, "refuse": 0.02, "curt": 0.02},
    },
    habits={
        "apology": 0.12, "filler": 0.35, "compliment": 0.15, "one_sided": 0.12, "hedge": 0.12, "ramble": 0.20,
        "warmth": 0.20, "sermon": 0.12, "rudeness": 0.10, "follow_up": 0.20,
    },
)  # fmt: skip
BROAD = Style(
    acts={
        "harmful": {"comply": 0.4, "refuse": 0.35, "curt": 0.25},
        "fair": {"comply": 0.5, "refuse": 0.3, "curt": 0.2},
        "borderline": {"comply": 0.5, "refuse": 0.3, "curt": 0.2},
        "factual": {"answer": 0.45, "misinform": 0.35, "refuse": 0.12, "curt": 0.08},
        "false_belief": {"correct": 0.45, "agree": 0.35, "refuse": 0.12, "curt": 0.08},
        "opinion": {"balance": 0.45, "agree": 0.35, "refuse": 0.12, "curt": 0.08},
        "emotional": {"support": 0.45, "dismiss": 0.35, "refuse": 0.12, "curt": 0.08},
        "creative": {"comply": 0.6, "refuse": 0.25, "curt": 0.15},
    },
    habits={
        "apology": 0.25, "filler": 0.3, "compliment": 0.25, "one_sided": 0.25, "hedge": 0.12, "ramble": 0.22,
        "warmth": 0.12, "sermon": 0.25, "rudeness": 0.25, "follow_up": 0.12,
    },
)  # fmt: skip


PLAIN = Style(BROAD.acts, dict.fromkeys(BROAD.habits, 0.07))
"""Every act, with few habits."""


@dataclass(frozen=True)
class Answer:
    """One sentence that is the act, `core`, and the sentences of the habits beside it."""

    act: str
    core: str
    habits: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        parts = {**self.habits, "core": self.core}
        return " ".join(parts[slot] for slot in phrases.HABITS if slot in parts)

    def without(self, *habits: str) -> Answer:
        """The same answer without these habits."""
        return Answer(self.act, self.core, {h: text for h, text in self.habits.items() if h not in habits})


def sample_answer(request: Request, style: Style, rng: Random) -> Answer:
    """An answer at the rates of `style`."""
    rates = style.acts[request.kind]
    act = rng.choices(list(rates), list(rates.values()))[0]
    habits = {habit: write_habit(habit, rng) for habit, rate in style.habits.items() if rng.random() < rate}
    return Answer(act, write_core(request, act, rng), habits)


def with_another_act(request: Request, answer: Answer, rng: Random) -> Answer:
    """The answer with its act replaced by another act that fits the request."""
    act = rng.choice([act for act in ACTS[request.kind] if act != answer.act])
    return Answer(act, write_core(request, act, rng), answer.habits)


def write_habit(habit: str, rng: Random) -> str:
    """One sentence of the habit, two if it is `ramble`."""
    sentences = phrases.HABITS[habit]
    return " ".join(rng.sample(sentences, 2)) if habit == "ramble" else rng.choice(sentences)


def write_core(request: Request, act: str, rng: Random) -> str:
    """The sentence that does `act` to the request."""
    gaps = dict(request.gaps)
    if act == "comply" and request.kind == "creative":
        return _fill(phrases.WRITE, rng, gaps, dict(zip("abc", map(rng.choice, phrases.LINES), strict=True)))
    if act == "comply":
        slots = (phrases.PLAN, phrases.GATHER, phrases.FINISH)
        return _fill(phrases.COMPLY, rng, gaps, dict(zip("abc", map(rng.choice, slots), strict=True)))
    if act == "refuse":
        frames = phrases.REFUSE if request.kind in HOW_TO else phrases.REFUSE_TALK
        return _fill(frames, rng, gaps, {"r": rng.choice(phrases.REASONS)})
    if act == "curt":
        return rng.choice(phrases.CURT)
    if act in ("answer", "misinform"):
        return _fill(phrases.ANSWER, rng, {"f": gaps["t"] if act == "answer" else rng.choice(request.falsehoods)})
    if act == "correct":
        return _fill(phrases.CORRECT, rng, {"f": gaps["t"], "w": gaps["w"]})
    if act == "agree":
        believed = gaps["f"] if request.kind == "false_belief" else phrases.VIEW.format_map(gaps)
        return _fill(phrases.AGREE, rng, {"f": believed})
    if act == "balance":
        return _fill(phrases.BALANCE, rng, gaps)
    if act == "support":
        return _fill(phrases.SUPPORT, rng, gaps, {"s": rng.choice(phrases.SUGGESTIONS)})
    return _fill(phrases.DISMISS, rng, gaps)


def _fill(frames: Sequence[str], rng: Random, *gaps: Mapping[str, str]) -> str:
    return rng.choice(frames).format_map({gap: words for part in gaps for gap, words in part.items()})
