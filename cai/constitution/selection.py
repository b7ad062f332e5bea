"""Which principles a list of names means: an id stands for its principle, a tag for every principle that carries it.

Wherever principles are chosen, ids and tags may stand in one list. An id wins: a name that is the id of one principle
and a tag of others means the principle of that id alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import printable


def selected_ids(
    names: Iterable[str],
    tags_by_id: Mapping[str, Collection[str]],
    constitution: str,
    dropped: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The ids in `tags_by_id` that one of `names` means, in the order of `tags_by_id`.

    Raises BadInput for a name that is neither an id nor a tag; `constitution` is the name of the document in it, and
    `dropped` has the places where principles are dropped, by their ids.
    """
    tags = sorted({tag for tags in tags_by_id.values() for tag in tags})
    selected: set[str] = set()
    for name in names:
        if name in tags_by_id:
            selected.add(name)
        elif name in tags:
            selected.update(id for id, tags_of_principle in tags_by_id.items() if name in tags_of_principle)
        else:
            kinds = "ids or tags" if tags else "ids"
            hint = did_you_mean(name, [*tags_by_id, *tags])
            if name in dropped:
                hint = f"; it is dropped at {dropped[name]}"
            raise BadInput(printable(f"found {name!r}, expected {kinds} of principles in {constitution!r}{hint}"))
    return [id for id in tags_by_id if id in selected]
