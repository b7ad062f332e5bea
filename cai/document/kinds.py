"""The kinds of documents, told apart by their keys, so that one in another's place is named instead of refused key by
key."""

from __future__ import annotations

from typing import Literal

from cai.document.reading import Document, error_at

Kind = Literal["constitution", "recipe", "profile"]

KEYS: dict[Kind, tuple[str, ...]] = {
    "recipe": ("stages",),
    "constitution": ("principles", "traits", "extends"),
    "profile": ("device", "processes", "micro_batch", "engine", "accelerate", "token_budget"),
}
"""Keys of which a document of each kind has at least one, and the other kinds none."""

USES: dict[Kind, str] = {
    "constitution": "`cai constitution check {path}` checks it",
    "recipe": "`cai run {path}` runs it",
    "profile": "`cai run RECIPE --on {path}` uses it",
}


def check_kind(document: Document, kind: Kind) -> None:
    """Raises BadInput where a document has no key of its `kind` and one of another kind."""
    kinds: list[Kind] = [name for name, keys in KEYS.items() if not document.value.keys().isdisjoint(keys)]
    if kinds and kind not in kinds:
        use = USES[kinds[0]].format(path=document.path)
        raise error_at(document, (), f"this is a {kinds[0]}, expected a {kind}; {use}")
