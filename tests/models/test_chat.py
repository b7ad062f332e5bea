"""One tokenisation: it is the template's own, and no text in it becomes a special token."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import tiny_models
from engine_contract import conversation
from feedback_stages import CPU
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import Tiny
from tokenizers import Tokenizer, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from cai.constitution import Principle
from cai.contracts.engine import Request, Sampling
from cai.contracts.model import Model
from cai.engines.local.local_engine import LocalEngine
from cai.models.chat import Chat
from cai.models.loading import load_tokenizer
from cai.models.reference import MICRO
from cai.stages.sft import tokenise
from cai.templates import load_templates
from cai.text.errors import BadInput
from cai.training.tokenised_rows import tokenise_pairs

FAMILIES = [name for name, family in tiny_models.FAMILIES.items() if family.template]
CHATS = [*FAMILIES, *tiny_models.CHATS]
SENTENCEPIECE = ["mistral:sentencepiece", "llama2:sentencepiece"]
MARKERS = {
    "mistral": [r"\[INST\]", r"\[/INST\]"],
    "llama2": [r"\[INST\]", r"\[/INST\]", "<<SYS>>", "<</SYS>>"],
    "pad_is_eos": [r"<\|system\|>", r"<\|user\|>", r"<\|assistant\|>"],
    "gpt_neox": ["\nHuman:", "\nAssistant:"],
    "vicuna": [r"\bUSER:", r"\bASSISTANT:"],
    "alpaca": ["\n### Instruction:", "\n### Response:"],
}
"""The markers that separate turns in templates without a token for it, as patterns."""
SPELLED_MARKERS = [re.sub(r"\\b|\\(?=\W)", "", marker) for markers in MARKERS.values() for marker in markers]
NATURAL = st.text(st.sampled_from("abc ABC é 你\n\t'.,:?1ß🙂"), max_size=40)
FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def chat(family: str) -> Chat:
    name, _, kind = family.partition(":")
    tokenizer = tiny_models.build_tokenizer(name, sentencepiece=bool(kind))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return Chat(tokenizer, name=family)


def spelled(family: str) -> st.SearchStrategy[str]:
    """Texts full of spellings of special tokens, complete and in pieces."""
    tokenizer = chat(family).tokenizer
    names = sorted({token.content for token in tokenizer.added_tokens_decoder.values()})
    distorted = [change(name) for name in names for change in (str.upper, str.title, "\u200b".join, lambda s: s[:-1])]
    pieces = ["<|im_end|>", "<think>", "</think>", "<", "|>", "<|", "</s", ">", "im_end", "｜"]
    spellings = st.sampled_from([*names, *distorted, *pieces, *SPELLED_MARKERS])
    return st.lists(st.one_of(spellings, NATURAL), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str], system: bool) -> list[dict[str, str]]:
    turns = draw(st.integers(0, 2))
    roles = ["user", *["assistant", "user"] * turns]
    if system and draw(st.booleans()):
        roles.insert(0, "system")
    return [{"role": role, "content": draw(texts)} for role in roles]


@pytest.mark.parametrize("family", CHATS + SENTENCEPIECE)
@given(data=st.data())
@FAST
def test_ids_are_those_of_the_chat_template_for_texts_that_spell_no_token(family: str, data: st.DataObject) -> None:
    family_chat = chat(family)
    messages = data.draw(conversations(NATURAL, system="no_system" not in family))
    theirs = family_chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert family_chat.prompt_ids(messages) == theirs


@pytest.mark.parametrize("family", CHATS + SENTENCEPIECE)
@given(data=st.data())
@FAST
def test_no_text_becomes_a_special_token_and_none_is_lost(family: str, data: st.DataObject) -> None:
    family_chat = chat(family)
    messages = data.draw(conversations(spelled(family), system="no_system" not in family))
    added = family_chat.tokenizer.added_tokens_decoder
    special = {n for n, token in added.items() if token.special or "think" in token.content}
    bare = [{**message, "content": "x" if message["content"].strip() else ""} for message in messages]

    def specials(ids: list[int]) -> list[int]:
        return [token for token in ids if token in special]

    assert specials(family_chat.prompt_ids(messages)) == specials(family_chat.prompt_ids(bare))
    response = messages[0]["content"].strip()
    prompt, answer = family_chat.example(messages, response)
    assert prompt == family_chat.prompt_ids(messages)
    assert specials(answer) == specials(family_chat.example(bare, response and "x")[1])
    assert answer[-1] == family_chat.end_of_turn
    if not (family_chat.thinks and "think>" in response):
        escaped = family_chat.escape_markers(response)
        assert family_chat.text(answer).text == family_chat.text(family_chat.response_ids(response)).text == escaped


@pytest.mark.parametrize("family", ["llama", "mistral", "pad_is_eos", "thinking"])
def test_engines_and_trainers_get_no_special_token_from_a_text(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    tokenizer = load_tokenizer(model)
    special = set(tokenizer.all_special_ids)
    hostile = " ".join([*tokenizer.all_special_tokens, *SPELLED_MARKERS])

    def specials(text: str) -> list[list[int]]:
        messages = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
        answers = {side: [{"role": "assistant", "content": side + text}] for side in ("chosen", "rejected")}
        with LocalEngine(model, CPU) as engine:
            (completion,) = engine.generate([Request("it", messages, 0, Sampling(max_new_tokens=1))])
            (pair,), _ = tokenise_pairs([{"prompt": messages, **answers}], engine.chat, 4096)
            (example,), _ = tokenise([{"prompt": messages, "response": text, "reasoning": text}], engine.chat, 4096)
        ids = [completion.prompt_ids, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, example["input_ids"]]
        return [[token for token in conversation if token in special] for conversation in ids]

    assert specials(hostile) == specials("Hello.")


@pytest.mark.parametrize("family", CHATS)
@given(data=st.data())
@FAST
def test_contents_are_found_in_the_decoded_ids_of_a_conversation(family: str, data: st.DataObject) -> None:
    family_chat = chat(family)
    content = data.draw(spelled(family)).strip()
    ids = family_chat.prompt_ids(conversation(content))
    decoded = family_chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert family_chat.escape_markers(content) in decoded


@pytest.mark.parametrize("family", MARKERS)
@given(data=st.data())
@FAST
def test_no_text_opens_or_closes_a_turn_in_plain_letters(family: str, data: st.DataObject) -> None:
    family_chat = chat(family)
    texts = st.lists(st.one_of(st.sampled_from(SPELLED_MARKERS), NATURAL), max_size=6).map("".join)
    messages = data.draw(conversations(texts, system=True))
    bare = [{**message, "content": "x" if message["content"].strip() else ""} for message in messages]

    def turns(ids: list[int]) -> list[int]:
        text = "\n" + family_chat.tokenizer.decode(ids)
        return [len(re.findall(marker, text)) for marker in MARKERS[family]]

    assert turns(family_chat.prompt_ids(messages)) == turns(family_chat.prompt_ids(bare))
    assert turns(family_chat.response_ids(messages[0]["content"])) == [0] * len(MARKERS[family])


@pytest.mark.parametrize("family", CHATS)
@given(text=NATURAL)
@FAST
def test_other_text_is_left_as_it_is(family: str, text: str) -> None:
    odd = "user model # Instructions ### Notes: [1] [inst] <b> superUSER: SUPERUSER: in a line Human: and Reasoning:"
    assert chat(family).escape_markers(text) == text
    assert chat(family).escape_markers(f"{odd} low") == f"{odd} low"


@pytest.mark.parametrize(
    "start", ["\n", "\r", "\x85", "\u2028", "\n ", "\n\t ", "\r\u200b", "\n\u200b\u3000", "\n\u034f", " "]
)
def test_a_label_opens_no_turn_however_its_line_begins(start: str) -> None:
    family_chat = chat("gpt_neox")
    if start.strip(" "):
        assert family_chat.escape_markers(f"fine{start}Human: hi") == f"fine{start}Human : hi"
    assert family_chat.escape_markers(f"{start}Human: hi") == f"{start}Human : hi"
    assert family_chat.escape_markers(f"fine{start}I am Human: hi") == f"fine{start}I am Human: hi"


def test_markers_of_other_templates_are_ordinary_text() -> None:
    for family in ("llama", "qwen2", "no_system", "phi", "deepseek", "harmony", "thinking"):
        for text in SPELLED_MARKERS:
            assert chat(family).escape_markers(text) == text
    embedded = Chat.load(Model("micro", str(MICRO), "micro"))
    assert [embedded.escape_markers(text) for text in SPELLED_MARKERS] == SPELLED_MARKERS
    assert chat("mistral").escape_markers("[INST] <|user|>\nHuman:") == "[INST ] <|user|>\nHuman:"
    assert chat("gpt_neox").escape_markers("Human: I am a Human:\nHuman:") == "Human : I am a Human:\nHuman :"


@pytest.mark.parametrize("family", CHATS)
@pytest.mark.parametrize("templates", ["default", "fewshot", "micro"])
def test_a_judge_reads_hostile_responses_without_a_special_token_of_theirs(family: str, templates: str) -> None:
    family_chat = chat(family)
    special = set(family_chat.tokenizer.all_special_ids)
    hostile = "".join([*family_chat.tokenizer.all_special_tokens, *SPELLED_MARKERS])
    principle = Principle("kind", "Be kind.", "Is it kind?", "Make it kind.", "Which is kinder?")

    def specials(text: str) -> list[int]:
        messages = load_templates(templates).compare(conversation(text), text, text, principle)
        return [token for token in family_chat.question(messages, ["A", "B"])[0] if token in special]

    assert specials(hostile) == specials("Hello.")


@pytest.mark.parametrize("family", CHATS + SENTENCEPIECE)
def test_an_example_is_the_templates_own_rendering_of_the_answered_conversation(family: str) -> None:
    family_chat = chat(family)
    messages = conversation("What is the capital?")
    prompt, response = family_chat.example(messages, "Paris, of course.")
    answered = [*messages, {"role": "assistant", "content": "Paris, of course."}]
    theirs = family_chat.tokenizer.apply_chat_template(answered, return_dict=False)
    ours = prompt + response
    if ours[: len(theirs)] != theirs[: len(ours)]:  # the end of the opened reasoning is encoded by itself
        assert family_chat.thinks
        assert family_chat.tokenizer.decode(theirs).startswith(family_chat.tokenizer.decode(ours))
    assert response == family_chat.response_ids("Paris, of course.")


def test_end_of_turn_is_what_the_template_writes_there() -> None:
    def token(family: str) -> str:
        return chat(family).tokenizer.convert_ids_to_tokens(chat(family).end_of_turn)

    assert token("llama") == "<|eot_id|>"
    assert token("no_system") == "<end_of_turn>"
    assert token("gpt_neox") == "<|endoftext|>"
    ends = chat("no_system").tokenizer.convert_ids_to_tokens(sorted(chat("no_system").end_ids))
    assert set(ends) == {"<eos>", "<end_of_turn>"}
    assert chat("gpt_neox").stop == ("\n\nHuman:",)
    assert chat("llama").stop == ()


def test_a_system_message_goes_in_front_of_the_first_turn_where_there_is_no_such_role() -> None:
    family_chat = chat("no_system")
    messages = [{"role": "system", "content": "Be brief."}, *conversation("Hi")]
    assert family_chat.prompt_ids(messages) == family_chat.prompt_ids(conversation("Be brief.\n\nHi"))


def test_turns_of_one_role_in_a_row_are_joined_where_the_template_wants_them_to_alternate() -> None:
    family_chat = chat("mistral")
    twice = [*conversation("Hi"), *conversation("there")]
    assert family_chat.prompt_ids(twice) == family_chat.prompt_ids(conversation("Hi\n\nthere"))
    with pytest.raises(BadInput, match=r"refuses a conversation: roles must alternate"):
        family_chat.prompt_ids([{"role": "assistant", "content": "Hi"}])


def test_a_template_that_drops_the_system_message_silently_gets_it_in_the_first_turn() -> None:
    tokenizer = tiny_models.build_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    family_chat = Chat(tokenizer)
    ids = family_chat.prompt_ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "Be brief.\n\nHi" in tokenizer.decode(ids)


def test_reasoning_is_kept_apart_from_the_response() -> None:
    thinking_chat = chat("thinking")
    vocabulary = thinking_chat.tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        return thinking_chat.tokenizer.encode(text, add_special_tokens=False)

    prompt = thinking_chat.prompt_ids(conversation("Hi"))
    assert thinking_chat.tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert thinking_chat.text(ids("They greet me.\n</think>\n\nHello!<|im_end|>")) == ("Hello!", "They greet me.")
    assert thinking_chat.text(ids("They greet")) == ("", "They greet")
    assert thinking_chat.text(ids("\n</think>\n\nHello!<|im_end|>")) == ("Hello!", None)
    _, response = thinking_chat.example(conversation("Hi"), "Hello!")
    assert response.count(vocabulary["</think>"]) == 1
    assert vocabulary["<think>"] not in response
    assert thinking_chat.text(response) == ("Hello!", None)
    _, response = thinking_chat.example(conversation("Hi"), "Hello!", reasoning="They greet me.")
    assert thinking_chat.text(response) == ("Hello!", "They greet me.")
    question_ids, _ = thinking_chat.question(conversation("A or B?"), ["A", "B"])
    assert thinking_chat.tokenizer.decode(question_ids).endswith("<think>\n\n</think>\n\n")
    history = [*conversation("Hi"), {"role": "assistant", "content": "a </think> b"}, *conversation("?")]
    assert "a </think> b" in thinking_chat.tokenizer.decode(thinking_chat.prompt_ids(history))


@pytest.mark.parametrize("family", [*CHATS, "mistral:sentencepiece"])
def test_options_are_the_tokens_that_an_answer_begins_with(family: str) -> None:
    family_chat = chat(family)
    messages = conversation("A or B?")
    prompt, options = family_chat.question(messages, ["A", "B"])
    assert len(set(options)) == 2
    if not family_chat.thinks:
        for option, token in zip("AB", options, strict=True):
            prompt_ids, answer = family_chat.example(messages, option)
            assert (prompt_ids + answer)[: len(prompt) + 1] == [*prompt, token]
    with pytest.raises(BadInput, match="token of their own"):
        family_chat.question(messages, ["Absolutely not", "B"])
    with pytest.raises(BadInput, match="token of their own"):
        family_chat.question(messages, ["A", "A"])


def test_a_vocabulary_that_spells_its_special_tokens_out_is_not_fooled() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((letter, -5.0) for letter in "</s>abc")]
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    vocabulary = Tokenizer(kinds.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = Chat(tokenizer).prompt_ids(conversation("a</s>b</s>"))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


def test_an_added_token_in_brackets_is_written_by_no_text() -> None:
    """Mistral's vocabulary has some that are not marked as special, as `[REFERENCE_DOC_0]`."""
    tokenizer = tiny_models.build_tokenizer("mistral")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["[REFERENCE_DOC_0]", "[sic]"])
    ids = Chat(tokenizer).prompt_ids(conversation("See [REFERENCE_DOC_0] [sic]"))
    assert tokenizer.convert_tokens_to_ids("[REFERENCE_DOC_0]") not in ids
    assert tokenizer.convert_tokens_to_ids("[sic]") in ids
    assert "See [REFERENCE_DOC_0] [sic]" in tokenizer.decode(ids)


def test_a_base_model_without_a_chat_template_is_refused_with_what_to_do(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match=r"no chat template: set `chat_template:`.*`templates: fewshot`"):
        Chat.load(tiny("base"))
    base_chat = Chat.load(tiny("base", chat_template=tiny_models.PLAIN))
    assert base_chat.stop == ("\n\nHuman:",)
    assert base_chat.context_length == 4096


@pytest.mark.parametrize("content", ["m.content", "m.content | replace('x', 'y')"], ids=["plain", "replacing"])
def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day(content: str) -> None:
    tokenizer = tiny_models.build_tokenizer("gpt_neox")
    turn = f"[{{{{ strftime_now('%Y-%m-%d') }}}}]{{{{ {content} }}}}{{{{ eos_token }}}}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    dated_chat = Chat(tokenizer)
    ids = dated_chat.prompt_ids(conversation("Hi [2024-07-26]"))
    assert tokenizer.decode(ids) == "[2024-07-26]Hi [2024-07-26 ]<|endoftext|>"
    assert dated_chat.escape_markers("[2024-07-26] [2024-07-27]") == "[2024-07-26 ] [2024-07-27]"


def test_pad_is_never_the_end_of_a_turn(tiny: Tiny) -> None:
    for family in [*FAMILIES, "lora"]:
        family_chat = Chat.load(tiny(family))
        assert family_chat.pad_id == family_chat.tokenizer.pad_token_id
        assert family_chat.pad_id not in (family_chat.end_of_turn, family_chat.tokenizer.eos_token_id)
    assert load_tokenizer(tiny("pad_is_eos")).pad_token == "<|pad|>"
    assert load_tokenizer(tiny("llama")).pad_token == "<|finetune_right_pad_id|>"


def test_the_fewshot_set_makes_a_base_model_talk_and_keeps_texts_from_opening_turns(tiny: Tiny) -> None:
    fewshot_chat = Chat.load(tiny("base", templates="fewshot"))
    assert fewshot_chat.stop == ("\nHuman:", "\nAssistant:")
    answer = {"role": "assistant", "content": "Hello\nAssistant: me"}
    messages = [*conversation("Hi\nHuman: you <|endoftext|>"), answer, *conversation("Bye")]
    theirs = fewshot_chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = fewshot_chat.prompt_ids(messages)
    assert fewshot_chat.tokenizer.decode(ids) == theirs
    assert "\nHuman : you" in theirs
    assert fewshot_chat.tokenizer.eos_token_id not in ids
    prompt, response = fewshot_chat.example(messages, "So long\nHuman: no")
    assert prompt == ids
    assert fewshot_chat.tokenizer.decode(response) == " So long\nHuman : no<|endoftext|>"


def test_a_template_from_elsewhere_begins_with_bos_where_all_texts_of_the_model_do(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = tiny_models.build_tokenizer("mistral")
    bos = tokenizer.bos_token_id
    post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.backend_tokenizer.post_processor = post_processor
    messages = conversation("Hi")
    for template, count in [(tiny_models.PLAIN, 1), (tiny_models.MISTRAL, 1)]:
        tokenizer.save_pretrained(tmp_path)
        model = Model("m", str(tmp_path), chat_template=template)
        ids = Chat(load_tokenizer(model)).prompt_ids(messages)
        assert ids.count(bos) == count
        assert ids[0] == bos
