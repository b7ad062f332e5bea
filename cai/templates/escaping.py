"""Escapes texts of models and users before a template inserts them, so that they cannot be read as its structure.

`escape_tags` is the Jinja filter `fenced`, for templates that mark their parts with tags; `escape_labels` is the filter
`unlabelled`, for templates whose parts begin with labels such as `Response A:`. Both also remove invisible characters,
which could hide words, reverse them or spell others. An invisible character stays where a neighbour is of a script, or
a pictogram, that may need it. All other text is left unchanged.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"<(?=\s*/?\s*(?:conversation|system|user|assistant|response(?:_[ab])?|critique)\b)", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:^|(?<=[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]))"
    r"(?=(?:conversation|system|user|assistant|human|response(?:[^\S\r\n]+[ab])?|critique|question|task|request)\s*:)",
    re.IGNORECASE | re.MULTILINE,
)
_NO_TEXT = re.compile(
    "(\U0001f3f4(?:\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074"
    "|\U000e0077\U000e006c\U000e0073))\U000e007f)"
    "|[\u202a-\u202e\u2065-\u206f\ufff0-\ufff8\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]+"
)
"""Marks of text direction, tag characters, and unassigned or deprecated characters.

Group 1 is a flag of England, Scotland or Wales, which consists of tag characters and stays."""
_SELECTORS = re.compile(
    r"(?<![^\x00-\xa8\xaa-\xad\xaf-\u058f\u1e00-\u200f\u2010-\u2017\u2020-\u203b\u203d-\u2048\u204a-\u206f\ufe00-\ufe0f])"
    r"[\ufe00-\ufe0f]+(?!(?<=[#*0-9]\ufe0f)\u20e3)"
    r"|(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]+"
    r"|(?<![\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\U000e0100-\U000e01ef]+"
)
"""Variation selectors, except the first one after a pictogram or after a letter of a script that has variants."""
_PLAIN = r"\x00-\xac\xae-\u034e\u0350-\u058f\u1e00-\u200a\u2010-\u2029\u202f-\u205f"
"""Latin, Greek, Cyrillic and Armenian with their marks and punctuation, which need no invisible character."""
INVISIBLE = (
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2064\u3164\ufeff\uffa0"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
)
"""The other characters that Unicode does not show (Default_Ignorable_Code_Point), for the brackets of a pattern."""
_INVISIBLE_RUN = re.compile(f"(?<![^{_PLAIN}])[{INVISIBLE}]+(?![^{_PLAIN}])")
"""A run of invisible characters where neither neighbour is of a script, or a pictogram, that may need them."""


def escape_tags(text: str) -> str:
    """`text` with a look-alike in place of the `<` of every tag that templates use as structure."""
    return _TAG.sub("\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", remove_invisible(text))


def escape_labels(text: str) -> str:
    """`text` with a space before every label that begins a line, after any kind of line break.

    A label behind blanks is indented already and stays as it is.
    """
    return _LABEL.sub(" ", remove_invisible(text))


def remove_invisible(text: str) -> str:
    """`text` without invisible characters: a judge reads what a person sees."""
    return text if text.isascii() else _INVISIBLE_RUN.sub("", _SELECTORS.sub("", _NO_TEXT.sub(r"\1", text)))
