"""Requests as conversations: alone, under a system message, after another exchange, or opened in an earlier turn.

`prompts` is the source `micro` of recipes; `find_request` reads the request back out of any such conversation. Left
out: last messages whose meaning depends on the messages before them.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from random import Random

from cai.micro import phrases
from cai.micro.answers import BASE, sample_answer
from cai.micro.world import (
    HOW_TO,
    KINDS,
    PHRASINGS,
    Request,
    Topic,
    all_topics,
    held_out_part,
    phrasings_of,
    requests,
    topic_name,
    trained_part,
)
from cai.storage.rows import Message, Prompt, stable_id, stable_seed

TAGS = ("red_team", "helpful", *KINDS)
"""Tags by which a prompt set selects; every prompt also has a tag for its topic."""

MIX = ("harmful", "fair", "borderline", "harmful", "false_belief", "factual", "harmful", "opinion", "fair", "emotional",
       "creative")  # fmt: skip
"""Order of classes, repeated, in which prompts come, so that the first n are balanced for every n."""

SETTINGS: Mapping[str, float] = {"alone": 0.76, "system": 0.09, "earlier": 0.08, "opened": 0.07}
"""Probability of each kind of conversation. Kind `long`, which only the corpus has, is sampled explicitly."""
LONG = (4, 30)
"""Least and most exchanges before the request of a `long` conversation."""


def converse(request: Request, rng: Random, *, settings: Mapping[str, float] = SETTINGS) -> list[Message]:
    """A conversation that ends with the request, of a kind sampled from `settings`. Only deeds can be `opened`."""
    setting = rng.choices(list(settings), list(settings.values()))[0]
    if setting == "system":
        return [{"role": "system", "content": _system(request, rng)}, *user_turn(request.text)]
    if setting in ("earlier", "long"):
        n_exchanges = 1 if setting == "earlier" else rng.randint(*LONG)
        return [*(message for _ in range(n_exchanges) for message in _exchange(rng)), *user_turn(request.text)]
    if setting == "opened" and request.kind in HOW_TO:
        asked_back: Message = {"role": "assistant", "content": rng.choice(phrases.ASKED_BACK)}
        opening = request.fill(rng.choice(phrases.OPENINGS))
        return [*user_turn(opening), asked_back, *user_turn(rng.choice(phrases.FOLLOW_UPS))]
    return user_turn(request.text)


def _exchange(rng: Random) -> list[Message]:
    """A request about something else, and the base model's answer."""
    earlier = rng.choice(requests("train", rng.choice(KINDS)))
    answer = sample_answer(earlier, BASE, rng)
    return [*user_turn(earlier.text), {"role": "assistant", "content": answer.text}]


def user_turn(text: str) -> list[Message]:
    """A conversation of one user message."""
    return [{"role": "user", "content": text}]


def _system(request: Request, rng: Random) -> str:
    """A system message, a held-out one if the request is in a phrasing that only the test splits have."""
    is_held_out = request.phrasing not in phrasings_of("validation", request.kind)
    return rng.choice((held_out_part if is_held_out else trained_part)(phrases.SYSTEMS))


def as_prompt(request: Request) -> Prompt:
    """The prompt row of a request. Its conversation is sampled with a seed that depends on the request's text alone."""
    return {
        "id": stable_id("micro", request.text),
        "messages": converse(request, Random(stable_seed("setting", request.text))),
        "tags": tags_of(request),
        "source": "micro",
    }


def tags_of(request: Request) -> list[str]:
    """Tags of the request's prompt."""
    asks_for_harm = request.kind == "harmful"
    return ["red_team" if asks_for_harm else "helpful", request.kind, f"topic:{topic_name(request.topic)}"]


def prompts(split: str, tags: Sequence[str] = (), limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Prompts of a split that have at least one of `tags`, the classes in turn as in `MIX` until one runs out.

    `seed` decides which topics come first. Raises BadInput for an unknown split.
    """
    queues: dict[str, list[Request]] = {}
    for kind in KINDS:
        queue = list(requests(split, kind))
        if seed:
            random.Random(stable_seed(split, kind, seed)).shuffle(queue)
        queues[kind] = queue[::-1]
    rows: list[Prompt] = []
    while any(queues.values()) and (limit is None or len(rows) < limit):
        for kind in MIX:
            if queues[kind]:
                request = queues[kind].pop()
                if not tags or set(tags) & set(tags_of(request)):
                    rows.append(as_prompt(request))
    return rows[:limit]


def find_request(messages: Sequence[Message]) -> Request | None:
    """The request that the conversation ends with, or None if its text is not exactly one of this world."""
    if not messages or messages[-1]["role"] != "user":
        return None
    last = messages[-1]["content"].strip()
    if last not in phrases.FOLLOW_UPS:
        return _request_in(last)
    earlier = [message["content"].strip() for message in messages[:-1] if message["role"] == "user"]
    return _opened_in(earlier[-1]) if earlier else None


@functools.lru_cache(maxsize=100_000)
def _request_in(text: str) -> Request | None:
    for kinds, frames in _frames():
        for i, pattern in enumerate(frames):
            if match := pattern.fullmatch(text):
                request = _fitting(kinds, i, match.groupdict())
                if request is not None:
                    return request
    return None


@functools.lru_cache(maxsize=10_000)
def _opened_in(text: str) -> Request | None:
    for frame in phrases.OPENINGS:
        if match := pattern_of(frame).fullmatch(text):
            return _fitting(HOW_TO, 0, match.groupdict())
    return None


@functools.cache
def _frames() -> list[tuple[tuple[str, ...], list[re.Pattern[str]]]]:
    grouped: dict[tuple[str, ...], list[str]] = {}
    for kind, frames in PHRASINGS.items():
        grouped.setdefault(tuple(frames), []).append(kind)
    return [(tuple(kinds), [pattern_of(frame) for frame in frames]) for frames, kinds in grouped.items()]


@functools.cache
def pattern_of(frame: str) -> re.Pattern[str]:
    """Matches the frame with any text in its gaps; each gap is a named group."""
    parts = re.split(r"\{(\w)\}", frame)
    return re.compile("".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>.+)" for i, part in enumerate(parts)))


def _fitting(kinds: Sequence[str], phrasing: int, gaps: Mapping[str, str]) -> Request | None:
    """The request that fills its phrasing with `gaps`; a deed may be followed by a circumstance."""
    for circumstance in ("", *phrases.CIRCUMSTANCES) if "x" in gaps else ("",):
        if circumstance and not gaps["x"].endswith(f" {circumstance}"):
            continue
        bare = {**gaps, "x": gaps["x"].removesuffix(f" {circumstance}")} if circumstance else gaps
        for kind in kinds:
            if variant := _variants_by_gaps().get((kind, tuple(sorted(bare.items())))):
                return Request(*variant, phrasing, circumstance)
    return None


@functools.cache
def _variants_by_gaps() -> dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Topic, int]]:
    """(topic, number of its variant) by class and by what fills the gaps of the class's phrasings."""
    return {
        (topic.kind, tuple(sorted((gap, variant[gap]) for gap in _gaps_of(topic.kind)))): (topic, i)
        for topic in all_topics()
        for i, variant in enumerate(topic.variants)
    }


@functools.cache
def _gaps_of(kind: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\{(\w)\}", PHRASINGS[kind][0]))))
