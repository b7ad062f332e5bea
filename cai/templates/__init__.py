"""What a model is asked, as Jinja text in files: one folder a template set.

A set has `critique.jinja`, `revise.jinja` and `compare.jinja`; each renders the text of one user message. A set for base
models also has `chat.jinja`, a chat template in plain text, and names the strings that end a turn. Texts from models and
users are inserted as values and never parsed as templates. Templates put what questions share first: the conversation,
then the two responses, then the principle.

`micro` is frozen with the weights that were trained on it; `default` is for instruction-tuned models; `fewshot` is for
base models without a chat template.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai.errors import BadInput, nearest
from cai.records import Message, stable_id

if TYPE_CHECKING:
    from cai.constitution import Principle

FOLDER = Path(__file__).parent
OPTIONS = ("A", "B")
"""How a comparison is answered: the first response shown is A."""


@dataclass(frozen=True)
class TemplateSet:
    """One folder of templates, read once."""

    name: str
    sources: tuple[tuple[str, str], ...]
    """(file name, text) of every template in the set, sorted."""

    def critique(self, messages: Sequence[Message], response: str, principle: Principle) -> list[Message]:
        """Asks what about `response`, the reply to `messages`, falls short of the principle."""
        return self._ask("critique", messages=messages, response=response, request=principle.critique)

    def revise(
        self, messages: Sequence[Message], response: str, critique: str, principle: Principle
    ) -> list[Message]:
        """Asks for `response` rewritten in the light of `critique`."""
        return self._ask("revise", messages=messages, response=response, critique=critique, request=principle.revise)

    def compare(
        self, messages: Sequence[Message], first: str, second: str, principle: Principle
    ) -> list[Message]:
        """Asks which of two responses is better by the principle; the answer is one of `OPTIONS`."""
        return self._ask("compare", messages=messages, first=first, second=second, request=principle.compare)

    @property
    def chat_template(self) -> str | None:
        """A chat template for models that have none, or None."""
        return dict(self.sources).get("chat.jinja")

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn where no token does."""
        return tuple(line for line in dict(self.sources).get("stop.txt", "").splitlines() if line)

    def digest(self, *names: str) -> str:
        """Hash of the named templates' text: what of the set reaches a model in one stage."""
        texts = dict(self.sources)
        return stable_id(*(texts[f"{name}.jinja"] for name in names))

    def _ask(self, name: str, **values: object) -> list[Message]:
        text = _compiled(dict(self.sources)[f"{name}.jinja"]).render(**values)
        return [{"role": "user", "content": text.strip()}]


def template_sets() -> list[str]:
    """Names of the sets in the package."""
    return sorted(folder.name for folder in FOLDER.iterdir() if (folder / "compare.jinja").is_file())


@functools.cache
def load_templates(name: str) -> TemplateSet:
    """The set of that name. Raises BadInput for a name that is not one."""
    if name not in template_sets():
        raise BadInput(f"no template set {name!r}, expected one of {', '.join(template_sets())}"
                       + nearest(name, template_sets()))
    files = [path for path in sorted((FOLDER / name).iterdir()) if path.suffix in {".jinja", ".txt"}]
    return TemplateSet(name, tuple((path.name, path.read_text(encoding="utf-8")) for path in files))


@functools.cache
def _compiled(source: str):  # type: ignore[no-untyped-def]
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
    )
    return environment.from_string(source)
