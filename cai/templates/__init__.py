"""The requests put to models, as Jinja text in files: one folder a template set.

Each set has `critique`, `revise` and `compare`, `reason` and `verdict` for judges that write a rationale first, and
`rate` for judges that rate responses, all `.jinja`. A template renders one user message, or a short conversation where
lines `{# user #}` and `{# assistant #}` divide it into turns. Files whose names begin with `_` are parts that other
templates include. A set for base models also has `chat.jinja`, a chat template in plain text, and `stop.txt`: the
strings that end a turn, one a line, with `\\n` for a line break. Set `micro` also has the other requests that its model
was pretrained on, each in several phrasings, among which `pick` chooses. Templates begin with what questions share:
the conversation, then the two responses, then the principle.

Texts from models and users are inserted as values and never parsed as templates; `cai.templates.escaping` keeps them
from being read as structure.

`micro` is frozen with the weights that were trained on it; `default` is for instruction-tuned models; `fewshot` is for
base models without a chat template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai.storage.rows import Message, stable_id
from cai.templates.escaping import escape_labels, escape_tags
from cai.text.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from jinja2 import Template

    from cai.constitution import Principle

FOLDER = Path(__file__).parent
OPTIONS = ("A", "B")
"""The answers to a comparison; the response that is shown first is A."""

_TURN = re.compile(r"^\{# (user|assistant) #\}\n", re.MULTILINE)
_INCLUDED = re.compile(r"""\{% *(?:include|from) +"([^"]+)" """)


def pick_first(phrasings: Sequence[str]) -> str:
    """The phrasing of requests outside of pretraining."""
    return phrasings[0]


@dataclass(frozen=True)
class TemplateSet:
    """The templates in one folder."""

    name: str
    sources: tuple[tuple[str, str], ...]
    """(file name, text) of every template in the set, sorted."""
    pick: Callable[[Sequence[str]], str] = field(default=pick_first, repr=False)
    """Chooses among the phrasings that a template offers; not part of the set's digest."""

    def critique(self, messages: Sequence[Message], response: str, principle: Principle) -> list[Message]:
        """Asks for a critique of `response`, the reply to `messages`, by the principle."""
        return self.render("critique", messages=messages, response=response, request=principle.critique)

    def revise(self, messages: Sequence[Message], response: str, critique: str, principle: Principle) -> list[Message]:
        """Asks for a revision of `response` in the light of `critique`."""
        return self.render("revise", messages=messages, response=response, critique=critique, request=principle.revise)

    def compare(self, messages: Sequence[Message], first: str, second: str, principle: Principle) -> list[Message]:
        """Asks which of two responses the principle prefers; the answer is one of `OPTIONS`."""
        return self.render("compare", messages=messages, first=first, second=second, request=principle.compare)

    @property
    def chat_template(self) -> str | None:
        """A chat template for models that have none, or None."""
        return dict(self.sources).get("chat.jinja")

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn where no token does."""
        lines = dict(self.sources).get("stop.txt", "").split("\n")
        return tuple(line.replace("\\n", "\n") for line in lines if line)

    def digest(self, *names: str) -> str:
        """Hash of the named templates with the files that they include: the part of the set that a stage depends on."""
        texts = dict(self.sources)

        def texts_with_included(file: str) -> list[str]:
            included = _INCLUDED.findall(texts[file])
            return [texts[file], *(text for part in included for text in texts_with_included(part))]

        return stable_id(*(text for name in names for text in texts_with_included(f"{name}.jinja")))

    def render(self, name: str, **values: object) -> list[Message]:
        """The messages of template `name` with these values inserted."""
        return [
            {"role": role, "content": template.render(pick=self.pick, **values).strip()}
            for role, template in _compiled(self.sources, f"{name}.jinja")
        ]


def template_set_names() -> list[str]:
    """Names of the sets in the package."""
    return sorted(folder.name for folder in FOLDER.iterdir() if (folder / "compare.jinja").is_file())


@functools.cache
def load_templates(name: str) -> TemplateSet:
    """The set of that name. Raises BadInput for an unknown name."""
    names = template_set_names()
    if name not in names:
        raise BadInput(f"no template set {name!r}, expected one of {', '.join(names)}{did_you_mean(name, names)}")
    files = [path for path in sorted((FOLDER / name).iterdir()) if path.suffix in {".jinja", ".txt"}]
    return TemplateSet(name, tuple((path.name, path.read_text(encoding="utf-8")) for path in files))


@functools.cache
def _compiled(sources: tuple[tuple[str, str], ...], name: str) -> list[tuple[Literal["user", "assistant"], Template]]:
    """(role, template) of each turn. Turns are divided before values are inserted, so that no value can begin one."""
    from jinja2 import DictLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader = DictLoader(dict(sources))
    environment = ImmutableSandboxedEnvironment(loader=loader, undefined=StrictUndefined, **blocks)
    environment.filters.update(fenced=escape_tags, unlabelled=escape_labels)
    preamble, *roles_and_texts = _TURN.split(dict(sources)[name])
    if not roles_and_texts:
        return [("user", environment.get_template(name))]
    assert not preamble.strip(), "text before the first turn"
    turns = zip(roles_and_texts[::2], roles_and_texts[1::2], strict=True)
    return [("user" if role == "user" else "assistant", environment.from_string(text)) for role, text in turns]
