"""Encodings of text files: all are UTF-8 here; UTF-16, which some programs write, is recognised to say so."""

from __future__ import annotations

import codecs


def utf16_hint(data: bytes) -> str:
    """What to tell the user where `data`, the beginning of a file, is UTF-16 or UTF-32 text; else an empty string.

    Such text begins with a byte order mark, or every other byte of it is 0 where it is Latin.
    """
    has_mark = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    start = data[:100]
    has_zeros = any(len(half) > 1 and not any(half) for half in (start[0::2], start[1::2])) and any(start)
    if not (has_mark or has_zeros):
        return ""
    return "found text in UTF-16, expected UTF-8; save it as UTF-8, or: iconv -f UTF-16 -t UTF-8 FILE > NEW"
