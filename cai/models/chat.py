"""Conversations to token ids and back, the same way for every engine and every trainer.

The model's own chat template defines how a conversation looks, and the ids are those of `apply_chat_template`, with one
difference: text from a user or a model never becomes a special token, and never opens or closes a turn. The template is
rendered once for each shape of conversation, with placeholders for the contents. This separates its own text from the
contents and shows whether it trims them; the conversation is then assembled as one string and encoded in one piece
(`cai.models.encoding`). For a template that replaces strings in contents, each content is rendered to see the result.

Some templates mark turns in plain letters: `[INST]`, `<|user|>` where that is no token, or `Human:` at the start of a
line, possibly behind blanks and invisible characters. A content that contains such a marker of its template is escaped:
a space goes in front of the marker's last character (`[INST ]`, `Human :`). Other text stays as it is, byte for byte.
The space is not removed again.

Messages are adapted to templates that refuse their roles: system text goes in front of the first user turn, and
consecutive turns of one role are joined with a blank line between. Reasoning (`<think>` … `</think>`) is kept apart
from responses: histories hold responses alone, and where the prompt opens the markup, a response to learn from closes
it first.

A prompt's ids are always a prefix of the ids of prompt and response. Where the template does not render them so (a
merge over the boundary, a turn that looks different once it is answered), the response is encoded by itself, as it
stands in the template, and ends with the template's end-of-turn token.

Left out: tools, images, tokenizers without tokenizer.json, other reasoning markup than `<think>`, plain-letter turn
markers other than tags in brackets and labels with a colon, and dates whose format a template computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cai.models.encoding import NONCE, Encoder
from cai.storage.rows import Message
from cai.templates.escaping import INVISIBLE
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cai.contracts.model import Model

THINK, THINK_END = "<think>", "</think>"
REASONING_END = f"\n{THINK_END}\n\n"
"""Closes reasoning that a prompt has opened."""

_PLACEHOLDER = re.compile(f"\ue000{NONCE}:(\\d+)\ue001")
_TRIM_PROBE = "\u2003" + 9 * "\n"
"""Whitespace at both ends of a placeholder, newlines outermost: what remains of it shows how a template trims."""
_REPLACE_CALL = re.compile(r"(\||\.)\s*replace\s*\(")
_MARKER = re.compile(r"(?P<tag>[\[<].*[\]>])|.*[:：]")
"""A tag in brackets or a label with a colon. The bare name of a role behind a control token is neither."""
_BETWEEN_TAGS = re.compile(r"(?<=[\]>])\s+(?=[\[<])")
_LINE_START = rf"(?:^|(?<=[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]))(?:[^\S\n]|[{INVISIBLE}])*"
_FIXED_DATE = datetime(2024, 7, 26)
"""For templates that write the current date, so that the ids of a conversation are the same on every day. Some take it
as `date_string`; others, such as gpt-oss's, call `strftime_now`, which transformers (5.23) lets no caller replace."""
_DATE_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")

Shape = tuple[tuple[str, str | None], ...]
"""(role, the content if it is blank, else None) of each message: what the layout of a conversation depends on."""
_QUESTION: Shape = (("user", None),)
_EXCHANGE: Shape = (*_QUESTION, ("assistant", None))
_SECOND_QUESTION: Shape = (*_EXCHANGE, ("user", None))
_WITH_SYSTEM: Shape = (("system", None), *_SECOND_QUESTION)


class TextAndReasoning(NamedTuple):
    """A generated response. `reasoning` is None where there is none."""

    text: str
    reasoning: str | None


@dataclass(frozen=True)
class Slot:
    """Where message `index` has its content, and the characters that the template trims there; None = whitespace."""

    index: int
    left_trim: str | None
    right_trim: str | None

    def fill(self, text: str) -> str:
        return text.lstrip(self.left_trim).rstrip(self.right_trim)


Layout = tuple[str | Slot, ...]
"""A template's own text, with control tokens under their names, and the slots between."""


class Chat:
    """The conversations of one model.

    A response ends when one of `end_ids` is sampled or one of the strings in `stop` is written; examples end with
    `end_of_turn`. `context_length` is the longest sequence in tokens, None where the model's config does not say.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, name: str = "model", end_ids: Iterable[int] = (),
        context_length: int | None = None, stop: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if tokenizer.chat_template is None:
            raise BadInput(
                f"model {name!r} has no chat template: set `chat_template:` in the recipe to a Jinja file, or "
                f"`templates: fewshot` for a base model"
            )
        template = str(tokenizer.get_chat_template())
        self.tokenizer, self.name, self.context_length = tokenizer, name, context_length
        self.pad_id = int(tokenizer.pad_token_id)
        self.thinks = THINK_END in template or THINK_END in tokenizer.get_added_vocab()
        self._template = _DATE_CALL.sub(_format_fixed_date, template)
        self._encoder = Encoder(tokenizer, template)
        self._replaces_strings = _REPLACE_CALL.search(template) is not None
        self._option_ids: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[int] | None] = {}
        self._layouts: dict[tuple[Shape, bool, bool], Layout | str] = {}
        self._markers = self._compile_markers()
        self._prompt_opens_reasoning = self.thinks and self._opens_reasoning(self._layout(_QUESTION, generate=True))
        self._response_prefix = self._find_response_start(thinking=True)
        self._option_prefix = self._find_response_start(thinking=False)
        self.end_of_turn, self._end_text, other_end_ids, stop_strings = self._find_turn_end()
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.end_ids = frozenset([*end_ids, *eos, *other_end_ids, self.end_of_turn])
        self.stop = tuple(dict.fromkeys([*stop, *stop_strings]))

    @classmethod
    def load(cls, model: Model) -> Self:
        """The conversations of `model`. Raises BadInput where neither it nor the recipe has a chat template."""
        from cai.models.loading import load_tokenizer
        from cai.models.reference import read_model_json
        from cai.templates import load_templates

        tokenizer = load_tokenizer(model)
        config = read_model_json(model, "config.json")
        config = config.get("text_config") or config
        length_keys = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        eos_ids = read_model_json(model, "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
        templates = load_templates(model.templates)
        set_template, used_template = templates.chat_template, tokenizer.chat_template or ""
        uses_set_template = set_template is not None and set_template in used_template
        end_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
        context_length = next((int(config[key]) for key in length_keys if config.get(key)), None)
        stop = templates.stop if uses_set_template else ()
        return cls(tokenizer, name=model.name, end_ids=end_ids, context_length=context_length, stop=stop)

    def token_limit(self, max_length: int) -> int:
        """Tokens that an example may have: `max_length`, or the model's context where that is shorter."""
        return min(max_length, self.context_length or max_length)

    def prompt_ids(self, messages: Sequence[Message], *, thinking: bool = True) -> list[int]:
        """Ids of the conversation up to and including what opens the assistant's turn.

        `thinking` False makes a thinking model answer at once. Raises BadInput for a conversation that the template
        refuses.
        """
        fitted, layout = self._fit_roles(messages, generate=True, thinking=thinking)
        return self._encoder.encode(self._fill(layout, self._rendered_contents(fitted)))

    def response_ids(self, text: str, reasoning: str | None = None) -> list[int]:
        """Ids of a response as it follows a prompt, with the end-of-turn token."""
        prefix = self._response_prefix
        if reasoning is not None and self.thinks:
            prefix = self._encoder.name_control_tokens("" if self._prompt_opens_reasoning else f"{THINK}\n")
            prefix += self.escape_markers(reasoning.strip("\n")) + self._encoder.name_control_tokens(REASONING_END)
        slot = _last_slot(self._layout(_EXCHANGE), 1)
        content = self.escape_markers(slot.fill(text) if slot else text)
        ids = self._encoder.encode(prefix + content + self._end_text, inside=True)
        return ids if self._end_text else [*ids, self.end_of_turn]

    def example(
        self, messages: Sequence[Message], response: str, reasoning: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids) to learn from; the response ends with the end-of-turn token."""
        prompt = self.prompt_ids(messages)
        if reasoning is None:
            answered: list[Message] = [*messages, {"role": "assistant", "content": response}]
            fitted, layout = self._fit_roles(answered)
            if (slot := _last_slot(layout, len(fitted) - 1)) is not None:
                up_to_response = layout[: layout.index(slot) + 1]
                ids = self._encoder.encode(self._fill(up_to_response, self._rendered_contents(fitted)) + self._end_text)
                if ids[: len(prompt)] == prompt:
                    return prompt, ids[len(prompt) :] + ([] if self._end_text else [self.end_of_turn])
        return prompt, self.response_ids(response, reasoning)

    def text(self, ids: Sequence[int], *, stop: Sequence[str] = ()) -> TextAndReasoning:
        """The response in generated ids up to the first of `stop`, without control tokens and surrounding whitespace.

        Reasoning is returned apart. Where it was never closed, the text is empty.
        """
        response, reasoning = self._encoder.decode(ids), ""
        opening, close = (self._encoder.control.get(markup) for markup in (THINK, THINK_END))
        opens_reasoning = (opening is not None and opening in ids[:3]) or response.lstrip().startswith(THINK)
        if self.thinks and close is not None and close in ids:
            end = list(ids).index(close)
            reasoning, response = self._encoder.decode(ids[:end]), self._encoder.decode(ids[end + 1 :])
        elif self.thinks and (self._prompt_opens_reasoning or opens_reasoning):
            reasoning, _, response = response.partition(THINK_END)
        for stop_string in stop:
            response = response.partition(stop_string)[0]
        return TextAndReasoning(response.strip(), reasoning.strip().removeprefix(THINK).strip() or None)

    def same_ids(self, chat: Chat) -> bool:
        """Whether every conversation has the same ids in both: tokenizer, template and end of turn are equal."""

        def definition(chat: Chat) -> tuple[object, ...]:
            spec = json.loads(chat.tokenizer.backend_tokenizer.to_str())
            spec.update(truncation=None, padding=None)  # state of the tokenizer's last call
            return spec, chat.tokenizer.get_chat_template(), chat.end_of_turn

        return definition(self) == definition(chat)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without control tokens, whitespace kept."""
        return self._encoder.decode(ids)

    def question(self, messages: Sequence[Message], options: Sequence[str]) -> tuple[list[int], list[int]]:
        """(prompt ids, the id of each option as the next token). Raises BadInput if an option is not one token."""
        prompt = self.prompt_ids(messages, thinking=False)
        ids = self._single_ids(self._option_prefix, tuple(options), tuple(prompt[-8:]))
        if ids is None and self._option_prefix:
            # The text between prompt and response then becomes part of the question.
            prompt += self._encoder.encode(self._option_prefix, inside=True)
            ids = self._single_ids("", tuple(options), tuple(prompt[-8:]))
        if ids is None:
            shown = ", ".join(map(repr, options))
            raise BadInput(f"model {self.name!r}: the options {shown} are not each a token of their own in its answers")
        return prompt, list(ids)

    def escape_messages(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation, escaped, for a server that renders it. Raises BadInput where the template refuses it."""
        fitted, _ = self._fit_roles(messages, generate=True)
        contents = [self._encoder.escape_control_tokens(self.escape_markers(message["content"])) for message in fitted]
        return [{**message, "content": content} for message, content in zip(fitted, contents, strict=True)]

    def escape_markers(self, text: str) -> str:
        """`text` as it stands in a turn: with a space in whatever would read as one of the template's own markers."""
        return self._markers.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", text)

    def _compile_markers(self) -> re.Pattern[str]:
        """Matches the markers that the template writes around turns in plain letters."""
        layouts = [self._layout(shape, generate=True) for shape in (_SECOND_QUESTION, _WITH_SYSTEM)]
        parts = [part for layout in layouts if not isinstance(layout, str) for part in enumerate(layout)]
        markers: set[str] = set()
        for n, part in parts:
            if isinstance(part, str):
                markers.update(_markers_in(self._encoder.split_at_control_tokens(part), first=n == 0))
        return re.compile("|".join(sorted(markers, key=len, reverse=True)) or "(?!)", re.MULTILINE)

    def _fill(self, layout: Layout, contents: Sequence[str]) -> str:
        return "".join(
            part if isinstance(part, str) else self.escape_markers(part.fill(contents[part.index])) for part in layout
        )

    def _single_ids(self, prefix: str, options: tuple[str, ...], tail: tuple[int, ...]) -> list[int] | None:
        """The id of each option behind a prompt that ends in `tail`; None where an option is not a single token."""
        key = (prefix, options, tail)
        if key not in self._option_ids:
            encoded = [self._encoder.encode(prefix + option, inside=True) for option in options]
            ids = [option_ids[0] for option_ids in encoded if len(option_ids) == 1]
            are_single = len(options) == len(ids) == len(set(ids)) and all(
                self._encoder.decode([*tail, option_id]).endswith(option)
                for option_id, option in zip(ids, options, strict=True)
            )
            self._option_ids[key] = ids if are_single else None
        return self._option_ids[key]

    def _fit_roles(
        self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = True
    ) -> tuple[Sequence[Message], Layout]:
        """The conversation in roles that the template takes, and its layout."""
        if not messages:
            raise BadInput("a conversation without messages")
        refusals = []
        moved = _move_system_to_first_turn(messages)
        for fitted in (messages, moved, _join_turns(messages), _join_turns(moved)):
            contents = [None if message["content"].strip() else message["content"] for message in fitted]
            shape = tuple((message["role"], blank) for message, blank in zip(fitted, contents, strict=True))
            layout = self._layout(shape, generate=generate, thinking=thinking)
            if not isinstance(layout, str):
                return fitted, layout
            refusals.append(layout)
        raise BadInput(f"model {self.name!r}: its chat template refuses a conversation: {refusals[0]}")

    def _layout(self, shape: Shape, *, generate: bool = False, thinking: bool = True) -> Layout | str:
        """The layout of conversations of this shape, or why the template refuses them."""
        key = (shape, generate, thinking)
        if key not in self._layouts:
            self._layouts[key] = self._render_layout(*key)
        return self._layouts[key]

    def _render_layout(self, shape: Shape, generate: bool, thinking: bool) -> Layout | str:
        from jinja2 import TemplateError

        roles = [role for role, _ in shape]
        contents = [_placeholder(n, _TRIM_PROBE) if blank is None else blank for n, (_, blank) in enumerate(shape)]
        options: dict[str, Any] = {} if thinking else {"enable_thinking": False}
        try:
            text = self._apply_template(roles, contents, add_generation_prompt=generate, **options)
        except TemplateError as error:
            return str(error)
        parts = _PLACEHOLDER.split(text)
        literals, indices = parts[::2], [int(index) for index in parts[1::2]]
        for n, (role, blank) in enumerate(shape):
            if blank is None and n not in indices:
                return f"it leaves out message {n + 1}, of role {role!r}"
        layout: list[str | Slot] = []
        rest = literals[0]
        for index, literal in zip(indices, literals[1:], strict=True):
            rest, left_trim = _split_trim(rest[::-1])
            literal, right_trim = _split_trim(literal)
            layout += [self._encoder.name_control_tokens(rest[::-1]), Slot(index, left_trim, right_trim)]
            rest = literal
        layout.append(self._encoder.name_control_tokens(rest))
        if self.thinks and generate and not thinking and self._opens_reasoning(tuple(layout)):
            layout[-1] = f"{layout[-1]}{self._encoder.name_control_tokens(REASONING_END)}"
        return tuple(layout)

    def _apply_template(self, roles: Sequence[str], contents: Sequence[str], **options: Any) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        options |= {"chat_template": self._template, "date_string": f"{_FIXED_DATE:%d %b %Y}", "tokenize": False}
        return str(self.tokenizer.apply_chat_template(messages, **options))

    def _rendered_contents(self, messages: Sequence[Message]) -> list[str]:
        """The contents as the template renders them: unchanged, except for strings that it replaces."""
        contents = [message["content"] for message in messages]
        if not self._replaces_strings:
            return contents
        roles = [message["role"] for message in messages]
        placeholders = [_placeholder(n) if text.strip() else text for n, text in enumerate(contents)]
        frame = self._apply_template(roles, placeholders)
        for n, (placeholder, text) in enumerate(zip(placeholders, contents, strict=True)):
            before, separator, after = frame.partition(placeholder)
            rendered = self._apply_template(roles, [*placeholders[:n], text, *placeholders[n + 1 :]])
            if text.strip() and separator and rendered.startswith(before) and rendered.endswith(after):
                contents[n] = rendered[len(before) : len(rendered) - len(after)]
        return contents

    def _opens_reasoning(self, layout: Layout | str) -> bool:
        """Whether the template's last text opens the markup for reasoning."""
        is_text = isinstance(layout, tuple) and isinstance(layout[-1], str)
        last = self._encoder.spell_control_tokens(str(layout[-1])) if is_text else ""
        return last.rfind(THINK) > last.rfind(THINK_END)

    def _find_response_start(self, *, thinking: bool) -> str:
        """What the template writes between a prompt and the response."""
        prompt = self._layout(_QUESTION, generate=True, thinking=thinking)
        exchange = self._layout(_EXCHANGE, thinking=thinking)
        if isinstance(prompt, str) or isinstance(exchange, str):
            return ""
        slot = _last_slot(exchange, 1)
        assert slot is not None
        before_response = exchange[: exchange.index(slot)]
        if before_response[:-1] == prompt[:-1] and str(before_response[-1]).startswith(str(prompt[-1])):
            return str(before_response[-1]).removeprefix(str(prompt[-1]))
        return self._encoder.name_control_tokens(REASONING_END) if thinking and self._prompt_opens_reasoning else ""

    def _find_turn_end(self) -> tuple[int, str, list[int], list[str]]:
        """(end-of-turn id, the template's text up to that token, other ids that end a turn, strings that end one)."""
        exchange, second_question = self._layout(_EXCHANGE), self._layout(_SECOND_QUESTION)
        if isinstance(exchange, tuple) and (end := self._encoder.first_control_token(str(exchange[-1]))):
            return end[1], end[0], [], []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadInput(f"model {self.name!r}: neither its tokenizer nor its chat template ends a turn with a token")
        # eos ends a turn, and so does what the template writes between a response and the next question.
        between = ""
        if isinstance(second_question, tuple) and (slot := _last_slot(second_question, 1)) is not None:
            between = str(second_question[second_question.index(slot) + 1])
        if end := self._encoder.first_control_token(between):
            return int(eos), "", [end[1]], []
        return int(eos), "", [], [between.rstrip(" ")] if between.strip() else []


def _format_fixed_date(call: re.Match[str]) -> str:
    """The string literal that stands in a template for a call of `strftime_now`."""
    return f"{call['quote']}{_FIXED_DATE.strftime(call['format'])}{call['quote']}"


def _last_slot(layout: Layout | str, index: int) -> Slot | None:
    slots = [part for part in layout if isinstance(part, Slot) and part.index == index]
    return slots[-1] if slots else None


def _markers_in(texts: Sequence[str], first: bool) -> Iterator[str]:
    """Patterns of the markers in a template's own text, given in parts; `first`: it stands before all contents."""
    lines = [(number > 0, line) for text in texts for number, line in enumerate(text.split("\n"))]
    if first:  # a template may begin with any text: only its last line opens the turn
        lines = [(True, line) for line in texts[-1].split("\n") if line.strip()][-1:]
    for starts_line, line in lines:
        for text in _BETWEEN_TAGS.split(line.strip()):
            if match := _MARKER.fullmatch(text):  # a tag is a marker anywhere, a label where the template has it
                yield ("" if match["tag"] else _LINE_START if starts_line else r"(?<!\w)") + re.escape(text)


def _placeholder(index: int, around: str = "") -> str:
    """Stands for the content of message `index` when a template is rendered."""
    return f"{around[::-1]}\ue000{NONCE}:{index}\ue001{around}"


def _split_trim(text: str) -> tuple[str, str | None]:
    """(`text` behind a placeholder without the rest of `_TRIM_PROBE`, which characters the template trimmed)."""
    if text.startswith(_TRIM_PROBE):
        return text[len(_TRIM_PROBE) :], ""
    if text.startswith(_TRIM_PROBE[0]):
        return text[1:], "\n"
    return text, None


def _move_system_to_first_turn(messages: Sequence[Message]) -> list[Message]:
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not system:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": "\n\n".join(system)}, *rest]
    return [{"role": "user", "content": "\n\n".join([*system, rest[0]["content"]])}, *rest[1:]]


def _join_turns(messages: Sequence[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {"role": message["role"], "content": joined[-1]["content"] + "\n\n" + message["content"]}
        else:
            joined.append(message)
    return joined
