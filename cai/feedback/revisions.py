"""Reads the text of a critic or reviser: whether it did its task, and which part of it is the revision.

Models talk around their work: "Sure! Here is the revised response:", quotation marks, tags or a code fence around it,
"Note: I removed …" at the end. `unwrapped` removes that, unless the text before the revision has it too: then it
belongs to the answer. Only English, and only talk at the very start or end: a revision that discusses itself in the
middle ("The assistant should have said …") is not recognised.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from cai.maths.behaviours import declines

_REVISED: Final = (
    r"(?:revis|rewrit|rewrote|re-?phras|re-?word|updat|improv|edit|correct|modif|re-?fram|adjust|alternativ|better"
    r"|safer|harmless|new|final|suggested|possible)\w*"
)
_TEXT: Final = r"(?:response|answer|reply|version|revision|rewrite|rewording|message)"
_USERS_TEXT: Final = re.compile(rf"\bof your (?!(?:previous |original |last )?{_TEXT})", re.IGNORECASE)
_END: Final = r"(?::[*_]{0,3}[ \t]*\n*\s*|[.!]?[*_]{0,3}[ \t]*\n\s*)"
_PREAMBLE: Final = re.compile(
    r"\A[*_#\s]{0,4}(?:[^\n:]{0,160}?[.!,;] )?"
    r"(?:(?:here(?:'s| is)|below is|the following is|this is|i would (?:say|suggest|write))\b"
    rf"[^\n:.]{{0,80}}?\b(?:{_REVISED}\b[^\n:.]{{0,60}}?\b{_TEXT}\b|revision\b|rewrite\b|rewording\b)"
    r"|(?:here(?:'s| is)) (?:my|the|an?) (?:response|answer|reply)(?=\s*:)"
    rf"|i(?:'ve| have)(?: now)? {_REVISED}\b[^\n:.]{{0,60}}?\b(?:{_TEXT}|it)\b)"
    rf"[^\n:.]{{0,160}}?{_END}",
    re.IGNORECASE,
)
_LABEL: Final = re.compile(
    rf"\A[*_#\s]{{0,6}}(?:{_REVISED} (?:assistant )?{_TEXT}(?: \([^)\n]{{0,40}}\))?"
    r"(?:[*_]{0,3}:[*_]{0,3}|[*_]{0,3}[ \t]*\n)"
    r"|(?:(?:assistant(?:'s)? )?(?:response|revision|rewrite)|assistant|ai)(?::[*_]{0,3}|[*_]{1,3}:?[ \t]*\n))\s*",
    re.IGNORECASE,
)
_REMARK: Final = re.compile(
    r"\n\s*\n?[*_(\[\s]{0,4}(?:note|explanation|changes(?: made)?|rationale)?[*_]{0,3}:?[*_]{0,3} ?"
    rf"(?:(?:in )?(?:this|the|my) (?:{_REVISED} {_TEXT}|revision|rewrite)\b"
    r"|i(?:'ve| have)? (?:also )?"
    r"(?:removed|revised|rewritten|rewrote|rephrased|replaced|reworded|changed the|made the)\b"
    r"|(?:please )?let me know if (?:you(?:'d| would)? ?(?:need|want|like)|there are)[^\n.]{0,40}"
    r"(?:changes|revisions|adjustments|edits|modifications)\b)[^\n]*\s*\Z",
    re.IGNORECASE,
)
_FENCE: Final = re.compile(
    r"\A(?:```[\w-]*\n(?P<code>.*?)\n?```|<((?:revised_)?response)>(?P<tagged>.*?)</\2>)\Z", re.DOTALL
)
_QUOTES: Final = {'"': '"', "“": "”", "«": "»", "„": "“"}

_TASK: Final = (
    r"\b(?:revis|rewrit|rewrot|re-?phras|re-?word|edit|modif|improv|chang|updat|correct|critiqu|critici[sz]|evaluat|assess"
    r"|review)\w*\b"
)
_ABOUT_THE_RESPONSE: Final = re.compile(
    rf"{_TASK}[^.!?\n]{{0,80}}\b(?:response|answer|reply|conversation|dialogue|assistant|critique|content|output)\b"
    r"|\b(?:revised|rewritten|new|alternative|different|updated|improved) (?:\w+ )?(?:response|answer|reply|version)\b"
    r"|\ba (?:revision|rewrite|critique)\b"
)
_ABOUT_THIS: Final = re.compile(rf"{_TASK} (?:this|that|it|any of (?:this|that|it))\b")
_NO_CHANGE: Final = re.compile(
    r"\b(?:no|not|n't|without) (?:\w+ ){0,4}(?:revis|rewrit|chang|edit|modif|correct)\w*(?: \w+){0,3}"
    r" (?:needed|necessary|required|called for)\b"
    r"|\b(?:response|answer|reply) (?:does not|doesn't|did not) (?:\w+ )?(?:need|require)\b"
    r"|\bno (?:revisions?|changes?|edits?)[.!]?\Z"
)
_SPEAKER: Final = re.compile(r"\A(?:i\b|sorry|unfortunately|as an? |(?:my )?apologies|no[,. ]|that(?: i|')s not)")


class Unwrapped(NamedTuple):
    """A revision without the talk around it."""

    text: str
    is_stripped: bool
    """Whether any talk was removed."""


def unwrapped(text: str, before: str) -> Unwrapped:
    """The revision in a reviser's text. Talk that `before`, the text to be revised, has as well is not removed."""
    revision = text.strip()
    for _ in range(4):  # "Sure! Here it is:", then a label, then quotation marks
        shorter = _without_talk(revision, before.strip())
        if shorter == revision:
            break
        revision = shorter
    return Unwrapped(revision, revision != text.strip())


def _without_talk(text: str, before: str) -> str:
    for pattern in (_PREAMBLE, _LABEL):
        match = pattern.match(_straight(text))
        if match and not pattern.match(_straight(before)) and not _USERS_TEXT.search(match[0]):
            return text[match.end() :].strip()
    if (match := _REMARK.search(_straight(text))) and not _REMARK.search(_straight(before)):
        return text[: match.start()].strip()
    if (match := _FENCE.match(text)) and not before.startswith(text[:3]):
        return (match["code"] or match["tagged"] or "").strip()
    closing_quote = _QUOTES.get(text[:1])
    if closing_quote and len(text) > 1 and text.endswith(closing_quote) and not before.startswith(text[0]):
        quoted = text[1:-1]
        if closing_quote not in quoted and text[0] not in quoted:
            return quoted.strip()
    return text


def refuses_to_criticise(critique: str) -> bool:
    """Whether a critic declines instead of criticising, or writes nothing.

    Searches those of its first two sentences in which the critic speaks of itself. "I cannot find a fault" is a
    critique.
    """
    if not critique.strip():
        return True
    sentences = _sentences(critique)[:2]
    return any(_SPEAKER.match(sentence) and declines(sentence) for sentence in sentences)


def refuses_to_revise(revision: str, request: str) -> bool:
    """Whether a reviser declines its own task, rather than the user's `request`.

    Recognises refusals that name the task: "I can't rewrite this response". Where the user asks for a rewriting too,
    "I can't rewrite this" counts as addressed to the user. A bare "I can't help with that" never counts.
    """
    task_patterns = [_ABOUT_THE_RESPONSE] if _asks_for_changes(request) else [_ABOUT_THE_RESPONSE, _ABOUT_THIS]
    return any(
        declines(sentence) and any(pattern.search(sentence) for pattern in task_patterns)
        for sentence in _sentences(revision)[:3]
    )


def declares_no_change(revision: str, request: str) -> bool:
    """Whether a reviser only says that no change is needed; never where the user's request is about changes too."""
    if len(revision) >= 300 or _asks_for_changes(request):
        return False
    return any(_NO_CHANGE.search(sentence) for sentence in _sentences(revision)[:2])


def same_text(first: str, second: str) -> bool:
    """Whether two texts differ in spaces and capitals at most."""
    return first.casefold().split() == second.casefold().split()


def _asks_for_changes(request: str) -> bool:
    return re.search(_TASK, _straight(request).lower()) is not None


def _straight(text: str) -> str:
    """The text with straight apostrophes, of the same length."""
    return text.replace("’", "'").replace("‘", "'")


def _sentences(text: str) -> list[str]:
    """Sentences in lower case with straight apostrophes; a line break ends a sentence too."""
    sentences = re.split(r"(?<=[.!?])\s+|\n+", _straight(text).lower().strip())
    return [sentence for sentence in sentences if sentence]
