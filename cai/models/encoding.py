"""Text to token ids in which only a template can write a control token, and ids back to text.

A control token is a special token, or an added one that works like one: written by the chat template, or markup such as
`<|…|>`, `<think>`, `[TOOL_CALLS]`. Texts are encoded by a copy of the tokenizer in which each control token has a name
with a random part that no text can contain; `name_control_tokens` puts the names into a template's own text. Everything
else is the tokenizer's own work on the whole string, so that merges, prefixes and added words are as always.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONCE = secrets.token_hex(8)
"""Random part of every name that only this package may write. New at each start; it never shows in ids."""

_BREAK = f"\ue000{NONCE}|\ue001"
"""A token of the copy that separates two texts and is then dropped."""
_NAME = re.compile(f"\ue000{NONCE}#(\\d+)\ue001")
_MARKUP = re.compile(r"<\|.*\|>|<｜.*｜>|</?think>|</?tool_call>|\[/?[A-Z][A-Z0-9_]*\]", re.DOTALL)


class Encoder:
    """Encodes and decodes with one tokenizer. `control` maps each control token to its id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        if not tokenizer.is_fast:
            raise BadInput("the tokenizer has no tokenizer.json, which is needed to encode conversations")
        self._tokenizer = tokenizer
        self.control = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or (token.content in template and not token.content.isspace())
            or _MARKUP.fullmatch(token.content)
        }
        longest_first = sorted(self.control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._texts = sorted(self.control)
        self._names = {text: f"\ue000{NONCE}#{n}\ue001" for n, text in enumerate(self._texts)}
        self._control_ids = frozenset(self.control.values())
        self._build_copy()
        newline = self._ids("\n")
        self._newline = newline if self._ids("\na") != [*newline, *self._ids("a")] else []

    def name_control_tokens(self, text: str) -> str:
        """A template's own text with its control tokens replaced by their names."""
        return self._spelled.sub(lambda match: self._names[match[0]], text)

    def escape_control_tokens(self, text: str) -> str:
        """`text` with a space before the last character of each control token that it spells."""
        return self._spelled.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", text)

    def first_control_token(self, text: str) -> tuple[str, int] | None:
        """(`text` up to and including its first named control token, that token's id), or None without one."""
        match = _NAME.search(text)
        return None if match is None else (text[: match.end()], self.control[self._texts[int(match[1])]])

    def split_at_control_tokens(self, text: str) -> list[str]:
        """The text before, between and after the named control tokens of `text`."""
        return _NAME.split(text)[::2]

    def spell_control_tokens(self, text: str) -> str:
        """`text` with the names of control tokens replaced by the tokens: the inverse of `name_control_tokens`."""
        return _NAME.sub(lambda match: self._texts[int(match[1])], text)

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Ids of `text`, in which names of control tokens become control tokens. `inside`: it continues other text.

        A tokenizer that puts a space in front of every text must not do so inside one: a newline is put in front to
        take the space, and its ids are removed.
        """
        if inside and self._newline:
            ids = self._ids("\n" + text)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self._ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens leave nothing."""
        kept = [token_id for token_id in ids if token_id not in self._control_ids]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _ids(self, text: str) -> list[int]:
        encoding = self._copy.encode(text, add_special_tokens=False)
        while not self._reachable.isdisjoint(encoding.ids):
            # The vocabulary itself has the control token, and merges made it of plain text: a break prevents that.
            position = next(n for n, token_id in enumerate(encoding.ids) if token_id in self._reachable)
            start, end = encoding.offsets[position]
            if end - start < 2:
                token = self._tokenizer.decode([encoding.ids[position]])
                raise BadInput(f"the tokenizer makes its control token {token!r} of plain text")
            text = text[: start + 1] + _BREAK + text[start + 1 :]
            encoding = self._copy.encode(text, add_special_tokens=False)
        return [self._original_ids.get(token_id, token_id) for token_id in encoding.ids if token_id != self._break_id]

    def _build_copy(self) -> None:
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(self._tokenizer.backend_tokenizer.to_str())
        spec.update(post_processor=None, truncation=None, padding=None)
        added = [token["content"] for token in spec["added_tokens"]]
        for token in spec["added_tokens"]:
            if token["content"] in self._names:
                token.update(content=self._names[token["content"]], normalized=False, single_word=False)
        self._copy = Tokenizer.from_str(json.dumps(spec))
        self._copy.add_special_tokens([AddedToken(_BREAK, normalized=False)])
        self._break_id = self._copy.token_to_id(_BREAK)
        # The copy gives added tokens new ids, which `_ids` maps back.
        original = self._tokenizer.get_vocab()
        self._original_ids = {self._copy.token_to_id(self._names.get(text, text)): original[text] for text in added}
        vocabulary = self._copy.get_vocab(with_added_tokens=False)
        unknown = self._tokenizer.unk_token  # stands for characters outside the vocabulary, so plain text may give it
        self._reachable = frozenset(vocabulary[text] for text in self.control if text in vocabulary and text != unknown)
