"""Requests as conversations: alone, under a system message, after another exchange, or opened in an earlier turn.

`prompts` is the source `micro` of recipes; `find_request` reads the request back out of any such conversation. Left
out: last requests that mean something else after what was said before them.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence
from random import Random

from cai.micro import phrases
from cai.micro.answers import BASE, draw
from cai.micro.world import (
    HOW_TO,
    KINDS,
    PHRASINGS,
    Request,
    Topic,
    all_topics,
    held_out,
    phrasings_of,
    requests,
    topic_name,
    trained,
)
from cai.storage.rows import Message, Prompt, stable_id, stable_seed

TAGS = ("red_team", "helpful", *KINDS)
"""What a prompt set selects by; a prompt has a tag for its topic too."""

MIX = ("harmful", "fair", "borderline", "harmful", "false_belief", "factual", "harmful", "opinion", "fair", "emotional",
       "creative")  # fmt: skip
"""The cycle of classes in which prompts are ordered, so that every prefix is balanced."""

SETTINGS: Mapping[str, float] = {"alone": 0.76, "system": 0.09, "earlier": 0.08, "opened": 0.07}
"""How often a request stands in which kind of conversation. A `long` one has `LONG` exchanges before it."""
LONG = (4, 30)


def converse(request: Request, rng: Random, *, settings: Mapping[str, float] = SETTINGS) -> list[Message]:
    """A conversation that ends with the request, in the user's words. Only deeds are opened in an earlier turn."""
    setting = rng.choices(list(settings), list(settings.values()))[0]
    if setting == "system":
        return [{"role": "system", "content": _system(request, rng)}, *said(request.text)]
    if setting in ("earlier", "long"):
        before = 1 if setting == "earlier" else rng.randint(*LONG)
        return [*(message for _ in range(before) for message in _exchange(rng)), *said(request.text)]
    if setting == "opened" and request.kind in HOW_TO:
        asked: Message = {"role": "assistant", "content": rng.choice(phrases.ASKED_BACK)}
        opening = request.put(rng.choice(phrases.OPENINGS))
        return [*said(opening), asked, *said(rng.choice(phrases.FOLLOW_UPS))]
    return said(request.text)


def _exchange(rng: Random) -> list[Message]:
    """A request about something else, and the base model's answer."""
    earlier = rng.choice(requests("train", rng.choice(KINDS)))
    return [*said(earlier.text), {"role": "assistant", "content": draw(earlier, BASE, rng).text}]


def said(text: str) -> list[Message]:
    """One message of the user's."""
    return [{"role": "user", "content": text}]


def _system(request: Request, rng: Random) -> str:
    """A system message; one that the corpus never has where the request itself is in words of the test splits."""
    unseen = request.phrasing not in phrasings_of("validation", request.kind)
    return rng.choice((held_out if unseen else trained)(phrases.SYSTEMS))


def as_prompt(request: Request) -> Prompt:
    """The row that recipes exchange: the request in a conversation that depends on its text alone."""
    return {
        "id": stable_id("micro", request.text),
        "messages": converse(request, Random(stable_seed("setting", request.text))),
        "tags": tags_of(request),
        "source": "micro",
    }


def tags_of(request: Request) -> list[str]:
    """What recipes select prompts by."""
    asks_for_harm = request.kind == "harmful"
    return ["red_team" if asks_for_harm else "helpful", request.kind, f"topic:{topic_name(request.topic)}"]


def prompts(split: str, tags: Sequence[str] = (), limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Prompts of a split that carry at least one of `tags`; every prefix is a balanced mix of the classes left.

    `seed` rotates which topics come first. Raises BadInput for an unknown split.
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
    """The request that the conversation ends in, or None where it is not of this world, letter for letter."""
    if not messages or messages[-1]["role"] != "user":
        return None
    last = messages[-1]["content"].strip()
    if last not in phrases.FOLLOW_UPS:
        return _request_in(last)
    before = [message["content"].strip() for message in messages[:-1] if message["role"] == "user"]
    return _opened_in(before[-1]) if before else None


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
    """What the frame looks like with anything in its gaps."""
    parts = re.split(r"\{(\w)\}", frame)
    return re.compile("".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>.+)" for i, part in enumerate(parts)))


def _fitting(kinds: Sequence[str], phrasing: int, gaps: Mapping[str, str]) -> Request | None:
    """The request with these gaps; a deed may be followed by a circumstance."""
    for circumstance in ("", *phrases.CIRCUMSTANCES) if "x" in gaps else ("",):
        if circumstance and not gaps["x"].endswith(f" {circumstance}"):
            continue
        bare = {**gaps, "x": gaps["x"].removesuffix(f" {circumstance}")} if circumstance else gaps
        for kind in kinds:
            if found := _by_gaps().get((kind, tuple(sorted(bare.items())))):
                return Request(*found, phrasing, circumstance)
    return None


@functools.cache
def _by_gaps() -> dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Topic, int]]:
    """Topic and variant by class and by what fills the phrasings' gaps."""
    return {
        (topic.kind, tuple(sorted((gap, variant[gap]) for gap in _gaps_of(topic.kind)))): (topic, i)
        for topic in all_topics()
        for i, variant in enumerate(topic.variants)
    }


@functools.cache
def _gaps_of(kind: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\{(\w)\}", PHRASINGS[kind][0]))))
