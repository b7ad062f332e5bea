"""What the small model is pretrained on."""

from __future__ import annotations

from itertools import islice
from random import Random

from transformers import PreTrainedTokenizerFast

from cai.micro.corpus import Document, comparison, corpus_hash, documents
from cai.micro.tokenizer import SPECIAL, render
from cai.micro.world import KINDS, all_topics, requests


def some_documents(count: int = 1500) -> list[Document]:
    return list(islice(documents(0, 7), count))


def test_the_corpus_is_a_function_of_seed_and_step() -> None:
    assert list(islice(documents(3, 5), 40)) == list(islice(documents(3, 5), 40))
    assert list(islice(documents(3, 5), 40)) != list(islice(documents(3, 6), 40))
    assert list(islice(documents(3, 5), 40)) != list(islice(documents(4, 5), 40))
    assert corpus_hash(0) == corpus_hash(0) != corpus_hash(1)


def test_held_out_prompts_and_topics_are_nowhere_in_the_rendered_corpus() -> None:
    text = "\n".join(
        render(example.messages) + example.answer for step in range(4) for document in islice(documents(0, step), 500)
        for example in document
    )  # fmt: skip
    for split in ("validation", "test", "test_topics"):
        for kind in KINDS:
            for request in requests(split, kind):
                assert request.text not in text
    for topic in all_topics():
        if topic.held_out and topic.kind in ("harmful", "fair", "borderline"):
            for mark in ".?, ":
                # as words of their own: "burn dry leaves" is in no other deed
                assert f" {topic.name}{mark}" not in text, topic.name


def test_what_is_trained_is_what_the_shipped_chat_template_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    for document in some_documents(120):
        for example in document:
            if example.messages:
                ids = tokenizer.apply_chat_template(
                    list(example.messages), add_generation_prompt=True, return_dict=False
                )
                assert ids == tokenizer(render(example.messages), add_special_tokens=False).input_ids


def test_no_text_of_the_corpus_contains_a_special_token() -> None:
    for document in some_documents(300):
        for example in document:
            texts = [message["content"] for message in example.messages] + [example.answer]
            assert not any(token in text for token in SPECIAL for text in texts)


def test_options_are_single_tokens_also_behind_a_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    question = comparison(Random(0))[0]
    before = tokenizer(render(question.messages), add_special_tokens=False).input_ids
    for option in "AB":
        after = tokenizer(render(question.messages) + option, add_special_tokens=False).input_ids
        assert after[:-1] == before
        assert after[-1] == tokenizer.convert_tokens_to_ids(option)


def test_comparisons_are_balanced_and_often_even() -> None:
    rng = Random(5)
    targets = [e.p_first for _ in range(800) for e in comparison(rng) if e.p_first is not None]
    decided = [p for p in targets if p != 0.5]
    first = sum(p > 0.5 for p in decided) / len(decided)
    assert 0.45 < first < 0.55
    assert 0.3 < 1 - len(decided) / len(targets) < 0.75


def test_longer_and_shorter_responses_win_about_alike() -> None:
    rng = Random(6)
    longer = shorter = 0
    for _ in range(1500):
        for example in comparison(rng):
            content = example.messages[-1]["content"]
            first, second = content.split("Response A:\n")[-1].split("\nResponse B:\n")
            second = second.rsplit("\n", 1)[0]
            if example.p_first not in (None, 0.5) and len(first) != len(second):
                won = (example.p_first or 0) > 0.5
                longer += won == (len(first) > len(second))
                shorter += won != (len(first) > len(second))
    assert 0.2 < longer / (longer + shorter) < 0.8
