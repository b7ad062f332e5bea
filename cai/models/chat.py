"""Conversations to token ids and back, the same way for every engine and every trainer.

The model's own chat template says how a conversation looks, and the ids are those of `apply_chat_template`, with one
difference: text from a user or a model never becomes a special token, and never opens or closes a turn. The template is
rendered once for each shape of conversation, with placeholders for the contents. That tells its own text from theirs,
and whether it trims them; the conversation is then put together as one string and encoded in one piece
(`cai.models.encoding`). A template that replaces strings in contents is asked what becomes of each.

Some templates part turns in plain letters: `[INST]`, `<|user|>` where that is no token, `Human:` at the start of a
line, behind blanks and marks without a shape or none. Where contents have one of their template's, it gets a space in
front of its last character: `[INST ]`, `Human :`. Other text stays as it is, byte for byte. The space is not taken out
again.

Roles that a template refuses are fitted to it: system text goes in front of the first user turn, and turns of one role
in a row are joined, with a blank line between. Reasoning (`<think>` … `</think>`) is kept apart from responses:
histories hold responses alone, and where the prompt opens the markup a response to learn from closes it first.

A prompt's ids are always a prefix of the ids of prompt and response. Where the template does not render them so (a
merge over the boundary, a turn that looks different once it is answered), the response is encoded by itself, as it
stands in the template, and ended with the template's end-of-turn token.

Left out: tools, images, tokenizers without tokenizer.json, other markup for reasoning than `<think>`, turns that are
parted in plain letters by something else than tags in brackets and labels with a colon.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cai.models.encoding import NONCE, Encoder
from cai.storage.rows import Message
from cai.templates import NO_SHAPE
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cai.contracts.model import Model

THINK, THINK_END = "<think>", "</think>"
NO_THOUGHT = f"\n{THINK_END}\n\n"
"""Closes reasoning that a prompt has opened."""

_PLACE = re.compile(f"\ue000{NONCE}:(\\d+)\ue001")
_EDGE = "\u2003" + 9 * "\n"
"""Whitespace at both ends of a placeholder, newlines outermost: what is left of it shows how a template trims there."""
_REPLACES = re.compile(r"(\||\.)\s*replace\s*\(")
_MARKER = re.compile(r"(?P<tag>[\[<].*[\]>])|.*[:：]")
"""A tag in brackets or a label with a colon. The bare name of a role behind a control token is neither."""
_BETWEEN_TAGS = re.compile(r"(?<=[\]>])\s+(?=[\[<])")
_LINE_START = rf"(?:^|(?<=[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]))(?:[^\S\n]|[{NO_SHAPE}])*"
_DATE = "26 Jul 2024"
"""For templates that write the day's date: the same plan gives the same ids on every day."""

Shape = tuple[tuple[str, str | None], ...]
"""(role, the content where it is blank, else None) of each message: what a template's rendering depends on."""
_ASKED: Shape = (("user", None),)
_ANSWERED: Shape = (*_ASKED, ("assistant", None))
_ASKED_AGAIN: Shape = (*_ANSWERED, ("user", None))
_INSTRUCTED: Shape = (("system", None), *_ASKED_AGAIN)


class TextAndReasoning(NamedTuple):
    """What was generated. `reasoning` is None where there is none."""

    text: str
    reasoning: str | None


@dataclass(frozen=True)
class Slot:
    """Where the content of message `index` stands, and which characters the template trims there: None = whitespace."""

    index: int
    left: str | None
    right: str | None

    def fill(self, text: str) -> str:
        return text.lstrip(self.left).rstrip(self.right)


Layout = tuple[str | Slot, ...]
"""A template's own text, control tokens named, and between it the slots."""


class Chat:
    """The conversations of one model.

    A response ends when one of `end_ids` is drawn, or one of the strings in `stop` is written; examples end with
    `end_of_turn`. `context_length` is the longest sequence in tokens, where the model says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        end_ids: Iterable[int] = (),
        context_length: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        if tokenizer.chat_template is None:
            raise BadInput(
                f"model {name!r} has no chat template: set `chat_template:` in the recipe to a Jinja file, or "
                f"`templates: fewshot` for a base model"
            )
        template = str(tokenizer.get_chat_template())
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.pad_id = int(tokenizer.pad_token_id)
        self.thinks = THINK_END in template or THINK_END in tokenizer.get_added_vocab()
        self._encoder = Encoder(tokenizer, template)
        self._replaces = _REPLACES.search(template) is not None
        self._options: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[int] | None] = {}
        self._layouts: dict[tuple[Shape, bool, bool], Layout | str] = {}
        self._markers = self._plain_markers()
        self._opens = self.thinks and self._thought_open(self._layout(_ASKED, generate=True))
        self._before = self._response_start(thinking=True)
        self._before_option = self._response_start(thinking=False)
        self.end_of_turn, self._end, more_ids, more_stops = self._turn_end()
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.end_ids = frozenset([*end_ids, *eos, *more_ids, self.end_of_turn])
        self.stop = tuple(dict.fromkeys([*stop, *more_stops]))

    @classmethod
    def load(cls, model: Model) -> Self:
        """The conversations of `model`. Raises BadInput where neither it nor the recipe has a chat template."""
        from cai.models.loading import load_tokenizer
        from cai.models.reference import settings
        from cai.templates import load_templates

        tokenizer = load_tokenizer(model)
        config = settings(model, "config.json")
        config = config.get("text_config") or config
        lengths = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        ends = settings(model, "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
        templates = load_templates(model.templates)
        borrowed = templates.chat_template is not None and templates.chat_template in (tokenizer.chat_template or "")
        return cls(
            tokenizer,
            name=model.name,
            end_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
            context_length=next((int(config[key]) for key in lengths if config.get(key)), None),
            stop=templates.stop if borrowed else (),
        )

    def prompt_ids(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
        """Ids of the conversation up to and including what opens the assistant's turn.

        `thinking` False asks a thinking model to answer at once. Raises BadInput for a conversation that the template
        refuses.
        """
        fitted, layout = self._fitted(messages, generate=True, thinking=thinking)
        return self._encoder.encode(self._filled(layout, self._contents(fitted)))

    def response_ids(self, text: str, reasoning: str | None = None) -> list[int]:
        """Ids of a response as it stands behind a prompt, with the end-of-turn token."""
        before = self._before
        if reasoning is not None and self.thinks:
            before = self._encoder.written("" if self._opens else f"{THINK}\n")
            before += self.unmarked(reasoning.strip("\n")) + self._encoder.written(NO_THOUGHT)
        slot = _slot(self._layout(_ANSWERED), 1)
        said = self.unmarked(slot.fill(text) if slot else text)
        ids = self._encoder.encode(before + said + self._end, inside=True)
        return ids if self._end else [*ids, self.end_of_turn]

    def example(
        self, messages: Sequence[Message], response: str, reasoning: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids) to learn from; the response ends with the end-of-turn token."""
        prompt = self.prompt_ids(messages)
        if reasoning is None:
            answered: list[Message] = [*messages, {"role": "assistant", "content": response}]
            fitted, layout = self._fitted(answered)
            if (slot := _slot(layout, len(fitted) - 1)) is not None:
                upto = layout[: layout.index(slot) + 1]
                whole = self._encoder.encode(self._filled(upto, self._contents(fitted)) + self._end)
                if whole[: len(prompt)] == prompt:
                    return prompt, whole[len(prompt) :] + ([] if self._end else [self.end_of_turn])
        return prompt, self.response_ids(response, reasoning)

    def text(self, ids: Sequence[int], *, stop: Sequence[str] = ()) -> TextAndReasoning:
        """What generated ids say up to the first of `stop`, without control tokens and whitespace around it.

        Reasoning stands apart. Where it was never closed it is all there is, and the text is empty.
        """
        said, thought = self._encoder.decode(ids), ""
        opening, close = (self._encoder.control.get(markup) for markup in (THINK, THINK_END))
        if self.thinks and close is not None and close in ids:
            cut = list(ids).index(close)
            thought, said = self._encoder.decode(ids[:cut]), self._encoder.decode(ids[cut + 1 :])
        elif self.thinks and (
            self._opens or (opening is not None and opening in ids[:3]) or said.lstrip().startswith(THINK)
        ):
            thought, _, said = said.partition(THINK_END)
        for text in stop:
            said = said.partition(text)[0]
        return TextAndReasoning(said.strip(), thought.strip().removeprefix(THINK).strip() or None)

    def same_ids(self, other: Chat) -> bool:
        """Whether every conversation has the same ids in both: tokenizer, template and end of turn are equal."""

        def parts(chat: Chat) -> tuple[object, ...]:
            spec = json.loads(chat.tokenizer.backend_tokenizer.to_str())
            spec.update(truncation=None, padding=None)  # what was asked of it last, and nothing of its own
            return spec, chat.tokenizer.get_chat_template(), chat.end_of_turn

        return parts(self) == parts(other)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as it stands; control tokens leave nothing."""
        return self._encoder.decode(ids)

    def question(self, messages: Sequence[Message], options: Sequence[str]) -> tuple[list[int], list[int]]:
        """(prompt ids, the id of each option as the next token). A thinking model is asked to answer at once.

        Raises BadInput for options that are not each one token there.
        """
        prompt = self.prompt_ids(messages, thinking=False)
        ids = self._single_ids(self._before_option, tuple(options), tuple(prompt[-8:]))
        if ids is None and self._before_option:
            # What the template writes between a prompt and every response is then part of the question.
            prompt += self._encoder.encode(self._before_option, inside=True)
            ids = self._single_ids("", tuple(options), tuple(prompt[-8:]))
        if ids is None:
            shown = ", ".join(map(repr, options))
            raise BadInput(f"model {self.name!r}: the options {shown} are not each a token of their own in its answers")
        return prompt, list(ids)

    def disarmed(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation for a server that renders it itself: in roles that the template takes, and with a space in
        each control token and marker that a content spells.

        Raises BadInput for a conversation that the template refuses.
        """
        fitted, _ = self._fitted(messages, generate=True)
        return [{"role": one["role"], "content": self._encoder.parted(self.unmarked(one["content"]))} for one in fitted]

    def unmarked(self, text: str) -> str:
        """`text` as it stands in a turn: what would read as the template's own plain-text marker is parted."""
        return self._markers.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", text)

    def _plain_markers(self) -> re.Pattern[str]:
        """Matches what the template parts turns with in plain letters."""
        layouts = [self._layout(shape, generate=True) for shape in (_ASKED_AGAIN, _INSTRUCTED)]
        found = {
            marker
            for layout in layouts
            if not isinstance(layout, str)
            for n, part in enumerate(layout)
            if isinstance(part, str)
            for marker in _markers_in(self._encoder.plain(part), first=n == 0)
        }
        return re.compile("|".join(sorted(found, key=len, reverse=True)) or "(?!)", re.MULTILINE)

    def _filled(self, layout: Layout, contents: Sequence[str]) -> str:
        return "".join(
            part if isinstance(part, str) else self.unmarked(part.fill(contents[part.index])) for part in layout
        )

    def _single_ids(self, before: str, options: tuple[str, ...], tail: tuple[int, ...]) -> list[int] | None:
        """The id of each option behind a prompt that ends in `tail`, or None where one is not a token of its own."""
        key = (before, options, tail)
        if key not in self._options:
            encoded = [self._encoder.encode(before + option, inside=True) for option in options]
            ids = [one[0] for one in encoded if len(one) == 1]
            single = len(options) == len(ids) == len(set(ids)) and all(
                self._encoder.decode([*tail, one]).endswith(option) for one, option in zip(ids, options, strict=True)
            )
            self._options[key] = ids if single else None
        return self._options[key]

    def _fitted(
        self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = True
    ) -> tuple[Sequence[Message], Layout]:
        """The conversation in roles that the template takes, and its layout."""
        if not messages:
            raise BadInput("a conversation without messages")
        refusals = []
        for fit in (
            list,
            _system_in_first_turn,
            _turns_joined,
            lambda given: _turns_joined(_system_in_first_turn(given)),
        ):
            fitted: Sequence[Message] = fit(messages)
            shape = tuple((one["role"], None if one["content"].strip() else one["content"]) for one in fitted)
            layout = self._layout(shape, generate=generate, thinking=thinking)
            if not isinstance(layout, str):
                return fitted, layout
            refusals.append(layout)
        raise BadInput(f"model {self.name!r}: its chat template refuses a conversation: {refusals[0]}")

    def _layout(self, shape: Shape, *, generate: bool = False, thinking: bool = True) -> Layout | str:
        """The layout of conversations of this shape, or why the template refuses them."""
        key = (shape, generate, thinking)
        if key not in self._layouts:
            self._layouts[key] = self._rendered(*key)
        return self._layouts[key]

    def _rendered(self, shape: Shape, generate: bool, thinking: bool) -> Layout | str:
        from jinja2 import TemplateError

        contents = [_place(n, around=_EDGE) if blank is None else blank for n, (_, blank) in enumerate(shape)]
        options: dict[str, Any] = {} if thinking else {"enable_thinking": False}
        try:
            text = self._template([role for role, _ in shape], contents, add_generation_prompt=generate, **options)
        except TemplateError as error:
            return str(error)
        literals = _PLACE.split(text)
        places = [int(index) for index in literals[1::2]]
        del literals[1::2]
        for n, (role, blank) in enumerate(shape):
            if blank is None and n not in places:
                return f"it leaves out message {n + 1}, of role {role!r}"
        layout: list[str | Slot] = []
        rest = literals[0]
        for index, literal in zip(places, literals[1:], strict=True):
            rest, left = _trim_of(rest[::-1])
            literal, right = _trim_of(literal)
            layout += [self._encoder.written(rest[::-1]), Slot(index, left, right)]
            rest = literal
        layout.append(self._encoder.written(rest))
        if self.thinks and generate and not thinking and self._thought_open(tuple(layout)):
            layout[-1] = f"{layout[-1]}{self._encoder.written(NO_THOUGHT)}"
        return tuple(layout)

    def _template(self, roles: Sequence[str], contents: Sequence[str], **options: Any) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE, **options))

    def _contents(self, messages: Sequence[Message]) -> list[str]:
        """The contents as the template puts them: itself, but for strings that it replaces."""
        contents = [one["content"] for one in messages]
        if not self._replaces:
            return contents
        roles = [one["role"] for one in messages]
        places = [_place(n) if text.strip() else text for n, text in enumerate(contents)]
        frame = self._template(roles, places)
        for n, (place, text) in enumerate(zip(places, contents, strict=True)):
            before, found, after = frame.partition(place)
            said = self._template(roles, [*places[:n], text, *places[n + 1 :]])
            if text.strip() and found and said.startswith(before) and said.endswith(after):
                contents[n] = said[len(before) : len(said) - len(after)]
        return contents

    def _thought_open(self, layout: Layout | str) -> bool:
        """Whether the template's last words open the markup for reasoning."""
        last = self._encoder.unwritten(layout[-1]) if isinstance(layout, tuple) and isinstance(layout[-1], str) else ""
        return last.rfind(THINK) > last.rfind(THINK_END)

    def _response_start(self, *, thinking: bool) -> str:
        """What the template writes between a prompt and the response."""
        asked = self._layout(_ASKED, generate=True, thinking=thinking)
        answered = self._layout(_ANSWERED, thinking=thinking)
        if isinstance(asked, str) or isinstance(answered, str):
            return ""
        slot = _slot(answered, 1)
        assert slot is not None
        head = answered[: answered.index(slot)]
        if head[:-1] == asked[:-1] and str(head[-1]).startswith(str(asked[-1])):
            return str(head[-1]).removeprefix(str(asked[-1]))
        return self._encoder.written(NO_THOUGHT) if thinking and self._opens else ""

    def _turn_end(self) -> tuple[int, str, list[int], list[str]]:
        """(end-of-turn id, the template's text up to that token, more ids that end a turn, strings that do).

        A template that ends turns with no token of its own leaves it to eos; what it writes between a response and the
        next question then ends a response too.
        """
        answered, again = self._layout(_ANSWERED), self._layout(_ASKED_AGAIN)
        if isinstance(answered, tuple) and (found := self._encoder.first_control(str(answered[-1]))):
            return found[1], found[0], [], []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadInput(f"model {self.name!r}: neither its tokenizer nor its chat template ends a turn with a token")
        between = ""
        if isinstance(again, tuple) and (slot := _slot(again, 1)) is not None:
            between = str(again[again.index(slot) + 1])
        if found := self._encoder.first_control(between):
            return int(eos), "", [found[1]], []
        return int(eos), "", [], [between.rstrip(" ")] if between.strip() else []


def _slot(layout: Layout | str, index: int) -> Slot | None:
    """The last slot of message `index`."""
    slots = [part for part in layout if isinstance(part, Slot) and part.index == index]
    return slots[-1] if slots else None


def _markers_in(plain: Sequence[str], first: bool) -> Iterator[str]:
    """Patterns of the markers in a template's own text between two contents, or with `first` in front of all.

    `plain` are its parts between control tokens. A tag is one anywhere, a label where the template has it: at the start
    of a line or behind other text.
    """
    lines = [(at > 0, line) for text in plain for at, line in enumerate(text.split("\n"))]
    if first:  # a template may begin with anything: only what opens the turn is a marker
        lines = [(True, line) for line in plain[-1].split("\n") if line.strip()][-1:]
    for opens_line, line in lines:
        for text in _BETWEEN_TAGS.split(line.strip()):
            if match := _MARKER.fullmatch(text):
                yield ("" if match["tag"] else _LINE_START if opens_line else r"(?<!\w)") + re.escape(text)


def _place(index: int, around: str = "") -> str:
    """What stands for the content of message `index` when a template is rendered."""
    return f"{around[::-1]}\ue000{NONCE}:{index}\ue001{around}"


def _trim_of(text: str) -> tuple[str, str | None]:
    """`text` behind a placeholder without what is left of `_EDGE`, and which characters were trimmed there."""
    if text.startswith(_EDGE):
        return text[len(_EDGE) :], ""
    if text.startswith(_EDGE[0]):
        return text[1:], "\n"
    return text, None


def _system_in_first_turn(messages: Sequence[Message]) -> list[Message]:
    system = [one["content"] for one in messages if one["role"] == "system"]
    rest = [one for one in messages if one["role"] != "system"]
    if not system:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": "\n\n".join(system)}, *rest]
    return [{"role": "user", "content": "\n\n".join([*system, rest[0]["content"]])}, *rest[1:]]


def _turns_joined(messages: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for one in messages:
        if joined and joined[-1]["role"] == one["role"]:
            joined[-1] = {"role": one["role"], "content": joined[-1]["content"] + "\n\n" + one["content"]}
        else:
            joined.append(one)
    return joined
