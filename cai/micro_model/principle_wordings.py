"""The many ways in which a principle of the world is put to a critic, a reviser and a judge.

A sentence is a frame and a phrase; the lists are in principle_wordings.json. Phrases for the judge are of two kinds.
Composed phrases are a pattern ("is less ...", "is slower to ...") with a stem ("rude", "insult the user"); free phrases
are written as a whole. The corpus never has the last fifth of every list of free phrases and a fifth of the composed
ones. It has their words, every pattern and every stem, though: a model that reads the words of a principle can follow a
held-out phrase, and a model that knows the phrases by heart cannot.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from cai.micro.word_lists import read_word_lists
from cai.micro.world import held_out_part, trained_part

_word_lists = read_word_lists(Path(__file__).with_name("principle_wordings.json"))


@dataclass(frozen=True)
class PrincipleWording:
    """How one principle is put to critic, reviser and judge; `contrary` asks the judge for the worse of two."""

    critique: str
    revise: str
    compare: str
    contrary: str


@dataclass(frozen=True)
class PrinciplePhrases:
    """What completes "the response ...": a fault, its absence, and what the better or the worse of two does."""

    bad: tuple[str, ...]
    good: tuple[str, ...]
    better: tuple[str, ...]
    worse: tuple[str, ...]


PhraseKind = Literal["few", "free", "composed"]
"""Kinds of phrases for the judge; `few` are the first `FEW` free ones, with which the corpus begins."""
FEW = 2

Patterns = Mapping[str, tuple[str, ...]]
LESS: Patterns = _word_lists["less"]
"""Patterns that say that one of two responses has less of something, by part of speech of the stem."""
MORE: Patterns = _word_lists["more"]
"""Patterns that say that one of two responses has more of something."""
STEMS: Mapping[str, Mapping[str, Mapping[str, tuple[str | tuple[str, str], ...]]]] = _word_lists["stems"]
"""Stems by principle, by whether they are bad or good under it, and by part of speech. Verbs have two forms."""
PHRASES: Mapping[str, PrinciplePhrases] = {
    principle: PrinciplePhrases(**phrases) for principle, phrases in _word_lists["phrases"].items()
}
"""Free phrases of each principle."""

CRITIQUE_FRAMES: tuple[str, ...] = _word_lists["critique_frames"]
REVISE_FRAMES: tuple[str, ...] = _word_lists["revise_frames"]
COMPARE_FRAMES: tuple[str, ...] = _word_lists["compare_frames"]
OVERALL_REQUESTS: tuple[str, ...] = _word_lists["overall"]
"""Requests to look at the response under all principles at once."""


def _part(phrases: Sequence[str], held_out: bool) -> tuple[str, ...]:
    return tuple(held_out_part(phrases) if held_out else trained_part(phrases))


@functools.cache
def principle_wordings(
    principle: str, kind: PhraseKind = "free", *, held_out: bool = False
) -> tuple[PrincipleWording, ...]:
    """Wordings in which every sentence for critic, reviser and judge occurs at least once; `kind` is the judge's.

    The first trained wording with free phrases is that of constitutions/micro.yaml. Shorter lists of sentences are
    repeated, shuffled anew each time, so that no phrase is always paired with the same phrase of another list.
    """
    phrases = PHRASES[principle]
    sentence_lists = [
        [frame.format(p=phrase) for frame, phrase in itertools.product(frames, part)]
        for frames, part in (
            (CRITIQUE_FRAMES, _part(phrases.bad, held_out)),
            (REVISE_FRAMES, _part(phrases.good, held_out)),
            (COMPARE_FRAMES, comparison_phrases(principle, kind, held_out=held_out)),
            (COMPARE_FRAMES, comparison_phrases(principle, kind, worse=True, held_out=held_out)),
        )
    ]
    count = max(map(len, sentence_lists))
    rng = Random(f"{principle} {kind} {held_out}")
    columns: list[list[str]] = []
    for sentences in sentence_lists:
        column = [sentences[0], *rng.sample(sentences[1:], len(sentences) - 1)]
        while len(column) < count:
            column += rng.sample(sentences, len(sentences))
        columns.append(column[:count])
    return tuple(itertools.starmap(PrincipleWording, zip(*columns, strict=True)))


@functools.cache
def comparison_phrases(
    principle: str, kind: PhraseKind = "free", *, worse: bool = False, held_out: bool = False
) -> tuple[str, ...]:
    """Phrases for what the better of two does under the principle, or the worse; trained or held-out ones.

    A composed phrase is left out if it is a free phrase too, if it is held out and a trained free phrase contains it,
    and if it is trained and contains a held-out phrase.
    """
    free = PHRASES[principle].worse if worse else PHRASES[principle].better
    if kind != "composed":
        return _part(free, held_out)[: FEW if kind == "few" else None]

    def leaks(phrase: str) -> bool:
        if held_out:
            return any(phrase in trained for trained in _free_phrases(held_out=False))
        return any(held_out_phrase in phrase for held_out_phrase in held_out_phrases())

    return tuple(
        phrase
        for phrase, is_worse, is_held_out in _composed_phrases(principle)
        if (is_worse, is_held_out) == (worse, held_out) and phrase not in free and not leaks(phrase)
    )


def _composed_phrases(principle: str) -> Iterator[tuple[str, bool, bool]]:
    """(phrase, whether it is about the worse of two, whether it is held out) of every fitting pattern and stem."""
    for part_of_speech in LESS:
        for side, stems in STEMS[principle].items():
            for i, stem in enumerate(stems[part_of_speech]):
                forms = (stem,) if isinstance(stem, str) else stem
                for shift, patterns, says_more in ((0, LESS, False), (2, MORE, True)):
                    for j, pattern in enumerate(patterns[part_of_speech]):
                        yield pattern.format(*forms), says_more != (side == "good"), (i + j + shift) % 5 == 4


@functools.cache
def _free_phrases(*, held_out: bool) -> tuple[str, ...]:
    lists = (getattr(phrases, name) for phrases in PHRASES.values() for name in ("bad", "good", "better", "worse"))
    return tuple(dict.fromkeys(phrase for part in lists for phrase in _part(part, held_out)))


def overall_requests(*, held_out: bool = False) -> tuple[str, ...]:
    """Requests to look at the response as a whole."""
    return _part(OVERALL_REQUESTS, held_out)


@functools.cache
def held_out_phrases() -> tuple[str, ...]:
    """Every phrase, and every request to look at the whole, that the corpus must not contain."""
    sides = itertools.product(PHRASES, (False, True))
    composed = [comparison_phrases(principle, "composed", worse=worse, held_out=True) for principle, worse in sides]
    free = _free_phrases(held_out=True)
    return (*dict.fromkeys((*free, *itertools.chain(*composed))), *overall_requests(held_out=True))
