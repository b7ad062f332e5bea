"""What earlier folders of a stage hold of the items that it has to compute: unchanged items are not computed again.

Another prompt, another `n` or another wording of one principle gives a stage another fingerprint, and so another
folder. What reaches every item (the model, the templates, the sampling) is mostly the same as before, though. The
folders in which it is are found by `cai.run.earlier`; a stage compares its items with theirs, one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.contracts.stage_config import PrincipleField
from cai.storage.journal import RECORDS

if TYPE_CHECKING:
    from cai.constitution import Principle


@dataclass(frozen=True)
class Earlier:
    """A finished folder of the same stage, in which everything that reaches all items is as it is now."""

    folder: Path
    parts: Mapping[str, Any]
    """The parts of its fingerprint."""

    def rows(self) -> Iterator[Any]:
        """Its records, one at a time: those of a large stage take more memory than there may be."""
        with (self.folder / RECORDS).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def is_unchanged(self, principle: Principle, fields: Sequence[PrincipleField]) -> bool:
        """Whether the principle of this id was asked with the same words."""
        return all(self.parts.get(f"principle.{principle.id}.{name}") == getattr(principle, name) for name in fields)

    def ids_by_words(self, field: PrincipleField) -> dict[str, str]:
        """The id that a principle had there, by the words of a field of it."""
        prefix, suffix = "principle.", f".{field}"
        return {
            words: name.removeprefix(prefix).removesuffix(suffix)
            for name, words in self.parts.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
