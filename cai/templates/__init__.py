"""What a model is asked, as Jinja text in files: one folder a template set.

A set has `critique`, `revise` and `compare`, `reason` and `verdict` for judges that reason first, and `rate` for those
that rate, all `.jinja`; each renders one user message, or a short conversation where lines `{# user #}` and
`{# assistant #}` part it into turns. Files whose names begin with `_` are parts that others include. A set for base
models also has `chat.jinja`, a chat template in plain text, and `stop.txt`: the strings that end a turn, one a line,
`\\n` for a line break. Set `micro` also has what else its model was pretrained to be asked, in many wordings, among
which `pick` chooses. Templates put what questions share first: the conversation, then the two responses, then the
principle.

Texts from models and users are inserted as values and never parsed as templates. The filter `fenced` keeps them from
closing the tags that they stand between, `unlabelled` from opening a new part where parts begin with `Response A:`.
Both take out what has no shape and hides words, turns them round or spells others (`visible`), unless a neighbour is of
a script that may need it, and leave other text as it is.

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
from cai.text.errors import BadInput, nearest

if TYPE_CHECKING:
    from jinja2 import Template

    from cai.constitution import Principle

FOLDER = Path(__file__).parent
OPTIONS = ("A", "B")
"""How a comparison is answered: the first response shown is A."""

_TURN = re.compile(r"^\{# (user|assistant) #\}\n", re.MULTILINE)
_TAG = re.compile(r"<(?=\s*/?\s*(?:conversation|system|user|assistant|response(?:_[ab])?|critique)\b)", re.IGNORECASE)
_INCLUDED = re.compile(r"""\{% *(?:include|from) +"([^"]+)" """)
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
"""Marks for the direction of text, tag characters and what is unassigned or deprecated; the flags of England, Scotland
and Wales, which are spelled in tag characters, stay."""
_SELECTORS = re.compile(
    r"(?<![^\x00-\xa8\xaa-\xad\xaf-\u058f\u1e00-\u200f\u2010-\u2017\u2020-\u203b\u203d-\u2048\u204a-\u206f\ufe00-\ufe0f])"
    r"[\ufe00-\ufe0f]+(?!(?<=[#*0-9]\ufe0f)\u20e3)"
    r"|(?<=[\ufe00-\ufe0f])[\ufe00-\ufe0f]+"
    r"|(?<![\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\U000e0100-\U000e01ef]+"
)
"""Variation selectors, but for the first after a pictogram or a letter of a script that has variants."""
_PLAIN = r"\x00-\xac\xae-\u034e\u0350-\u058f\u1e00-\u200a\u2010-\u2029\u202f-\u205f"
"""Latin, Greek, Cyrillic, Armenian, their marks and punctuation: nothing of theirs needs what has no shape."""
NO_SHAPE = (
    r"\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2064\u3164\ufeff\uffa0"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
)
"""What else Unicode says is not shown (Default_Ignorable_Code_Point), as in the brackets of a pattern."""
_HIDDEN = re.compile(f"(?<![^{_PLAIN}])[{NO_SHAPE}]+(?![^{_PLAIN}])")
"""A run of it where no neighbour is of a script, or a pictogram, that may need it."""


def first(wordings: Sequence[str]) -> str:
    """The wording that users' models are asked in."""
    return wordings[0]


@dataclass(frozen=True)
class TemplateSet:
    """One folder of templates, read once."""

    name: str
    sources: tuple[tuple[str, str], ...]
    """(file name, text) of every template in the set, sorted."""
    pick: Callable[[Sequence[str]], str] = field(default=first, repr=False)
    """Chooses among the wordings that a template offers; no part of what the set is."""

    def critique(self, messages: Sequence[Message], response: str, principle: Principle) -> list[Message]:
        """Asks what about `response`, the reply to `messages`, falls short of the principle."""
        return self.ask("critique", messages=messages, response=response, request=principle.critique)

    def revise(self, messages: Sequence[Message], response: str, critique: str, principle: Principle) -> list[Message]:
        """Asks for `response` rewritten in the light of `critique`."""
        return self.ask("revise", messages=messages, response=response, critique=critique, request=principle.revise)

    def compare(self, messages: Sequence[Message], first: str, second: str, principle: Principle) -> list[Message]:
        """Asks which of two responses is better by the principle; the answer is one of `OPTIONS`."""
        return self.ask("compare", messages=messages, first=first, second=second, request=principle.compare)

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
        """Hash of the named templates' text and of what they include: what of the set reaches a model in one stage."""
        texts = dict(self.sources)

        def with_parts(file: str) -> list[str]:
            return [texts[file], *(text for part in _INCLUDED.findall(texts[file]) for text in with_parts(part))]

        return stable_id(*(text for name in names for text in with_parts(f"{name}.jinja")))

    def ask(self, name: str, **values: object) -> list[Message]:
        """The messages of template `name` with these values."""
        return [
            {"role": role, "content": template.render(pick=self.pick, **values).strip()}
            for role, template in _compiled(self.sources, f"{name}.jinja")
        ]


def template_sets() -> list[str]:
    """Names of the sets in the package."""
    return sorted(folder.name for folder in FOLDER.iterdir() if (folder / "compare.jinja").is_file())


@functools.cache
def load_templates(name: str) -> TemplateSet:
    """The set of that name. Raises BadInput for a name that is not one."""
    if name not in template_sets():
        raise BadInput(
            f"no template set {name!r}, expected one of {', '.join(template_sets())}" + nearest(name, template_sets())
        )
    files = [path for path in sorted((FOLDER / name).iterdir()) if path.suffix in {".jinja", ".txt"}]
    return TemplateSet(name, tuple((path.name, path.read_text(encoding="utf-8")) for path in files))


def fenced(text: str) -> str:
    """`text` with the `<` of every tag that templates use as structure exchanged for a look-alike."""
    return _TAG.sub("\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", visible(text))


def unlabelled(text: str) -> str:
    """`text` with a space before every label of a part that begins a line, whatever ends the line before it.

    A label with blanks before it is indented already and stays as it is.
    """
    return _LABEL.sub(" ", visible(text))


def visible(text: str) -> str:
    """`text` without what nobody sees: it keeps a judge from reading what is written, or spells what is not."""
    return text if text.isascii() else _HIDDEN.sub("", _SELECTORS.sub("", _NO_TEXT.sub(r"\1", text)))


@functools.cache
def _compiled(sources: tuple[tuple[str, str], ...], name: str) -> list[tuple[Literal["user", "assistant"], Template]]:
    """(role, template) of each turn. Turns are parted before anything is inserted, so no value can begin one."""
    from jinja2 import DictLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=DictLoader(dict(sources)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(fenced=fenced, unlabelled=unlabelled)
    before, *rest = _TURN.split(dict(sources)[name])
    if not rest:
        return [("user", environment.get_template(name))]
    assert not before.strip(), "text before the first turn"
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [("user" if role == "user" else "assistant", environment.from_string(text)) for role, text in turns]
