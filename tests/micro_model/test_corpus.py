"""What the small model is pretrained on, and what it must never see."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from cai.micro import phrases, topics, world_injections
from cai.micro.answers import Answer, write_core
from cai.micro.conversations import user_turn
from cai.micro.world import HOW_TO, PHRASINGS, all_topics, held_out_part, trained_part
from cai.micro.world_principles import WEIGHTS, faults
from cai.micro_model import tasks
from cai.micro_model.corpus import (
    FAULT_HABITS,
    LONG_EVERY,
    NEUTRAL_HABITS,
    PHASES,
    JudgeQuestions,
    Phase,
    Source,
    corpus_hash,
    documents,
    is_about_facts,
    is_long,
    make_comparison,
    make_crossed,
    make_decided,
    make_statement,
    make_truths,
)
from cai.micro_model.principle_wordings import (
    LESS,
    MORE,
    STEMS,
    PhraseKind,
    comparison_phrases,
    held_out_phrases,
    overall_requests,
    principle_wordings,
)
from cai.micro_model.tasks import Document, Example
from cai.micro_model.tokenizer import ANSWERS, SPECIAL, lexicon, render
from cai.templates import FOLDER

STEPS = (0, 1, LONG_EVERY - 1)
"""A step about facts in phases that have such steps, an ordinary step and a long one."""


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Documents of every phase, with short conversations and long ones."""
    return [
        example
        for phase in PHASES
        for step in STEPS
        for document in islice(documents(0, step, phase.end - 1), 20 if step == LONG_EVERY - 1 else 400)
        for example in document
    ]


@pytest.fixture(scope="module")
def rendered(examples: list[Example]) -> list[str]:
    return [render(example.messages) + example.answer for example in examples]


@pytest.fixture(scope="module")
def corpus(rendered: list[str]) -> str:
    return "\n".join(rendered)


def slots() -> dict[str, list[str]]:
    source = (FOLDER / "micro" / "_slots.jinja").read_text()
    assignments = re.findall(r"set (\w+) = (\[.*?\n\])", source, re.DOTALL)
    return {name: ast.literal_eval(options) for name, options in assignments}


def test_the_corpus_is_a_function_of_seed_and_step() -> None:
    def first_documents(seed: int, step: int) -> list[Document]:
        return list(islice(documents(seed, step), 40))

    assert first_documents(3, 5) == first_documents(3, 5)
    assert first_documents(3, 5) != first_documents(3, 6)
    assert first_documents(3, 5) != first_documents(4, 5)
    assert corpus_hash(0) == corpus_hash(0) != corpus_hash(1)


def test_held_out_topics_are_nowhere_in_the_rendered_corpus(rendered: list[str]) -> None:
    documents_by_word: defaultdict[str, set[str]] = defaultdict(set)
    for document in rendered:
        for word in re.findall(r"\w+", document):
            documents_by_word[word].add(document)
    assert len(documents_by_word) > 500
    for topic in all_topics():
        if topic.split not in ("validation", "test", "test_tier2"):
            continue
        texts = [topic.name] if topic.kind in (*HOW_TO, "creative") else []
        for variant in topic.variants:
            texts += [frame.format_map(variant) for frame in PHRASINGS[topic.kind]]
            if topic.kind == "opinion":
                texts += [f"{variant['p']} are better than {variant['q']}", f"{variant['p']} and {variant['q']} each"]
        for text in texts:
            candidates = sorted((documents_by_word[word] for word in re.findall(r"\w+", text)), key=len)
            for document in set.intersection(*candidates):
                # as words of their own: "cakes" is in "pancakes"
                assert text not in document or not re.search(rf"\b{re.escape(text)}(?!\w)", document), text


def test_the_verbs_of_tier_two_are_in_statements_alone(examples: list[Example]) -> None:
    verbs = {verb for families in topics.STATEMENT_FAMILIES.values() for family in families for verb in family.verbs}
    of_tier_two = re.compile(rf"\b({'|'.join(verbs)})\b")
    question_starts = tuple(question.partition("{x}")[0] for question, _ in tasks.WRONG)
    n_examples = 0
    for example in examples:
        text = "".join(message["content"] for message in example.messages)
        if of_tier_two.search(text + example.answer):
            n_examples += 1
            assert text.startswith(question_starts) or not text
    assert n_examples > 20


def test_held_out_wordings_are_nowhere_in_the_rendered_corpus(examples: list[Example], corpus: str) -> None:
    messages = [message["content"] for example in examples for message in example.messages]
    requests_made = {line.removeprefix("user: ") for message in messages for line in message.splitlines()}
    for phrase in held_out_phrases():
        assert phrase not in corpus, phrase
    for frames in PHRASINGS.values():
        for frame in held_out_part(frames):
            gap = re.compile(re.sub(r"\\\{\w\\\}", r"[^?.!]+", re.escape(frame)))
            assert not any(gap.fullmatch(line) for line in requests_made), frame
    for system in held_out_part(phrases.SYSTEMS):
        assert system not in corpus
    for question, _ in held_out_part(tasks.WRONG):
        assert not re.search(re.escape(question).replace(r"\{x\}", "[^?]+"), corpus), question
    for family in world_injections.FAMILIES:
        texts = [f.format(own=letter, principle="\n") for f in world_injections.FAMILIES[family] for letter in "AB"]
        in_corpus = [text for text in texts if "\n" not in text and text in corpus]
        assert bool(in_corpus) == (family in trained_part(list(world_injections.FAMILIES))), family
    assert len(slots()) == 9
    for name, options in slots().items():
        assert len(options) == len(set(options)) >= 15, name
        for option in held_out_part(options):
            assert not re.search(rf"[\n>]{re.escape(option)}( [AB]\b|:|\n|<| about | \d)", corpus), option


def test_documents_are_worded_in_every_trained_way_and_no_other() -> None:
    rng = Random(8)
    for name, options in slots().items():
        picked = {tasks.sample_wording(rng).templates.pick(options) for _ in range(400)}
        assert picked == set(trained_part(options)), name


def test_every_principle_has_many_wordings_that_are_trained_and_some_that_are_not() -> None:
    def wordings(principle: str, attribute: str, *, held_out: bool) -> set[str]:
        free, composed = (principle_wordings(principle, kind, held_out=held_out) for kind in ("free", "composed"))
        return {getattr(wording, attribute) for wording in (*free, *composed)}

    for principle in WEIGHTS:
        for attribute in ("critique", "revise", "compare", "contrary"):
            trained, held_out = (wordings(principle, attribute, held_out=held_out) for held_out in (False, True))
            assert len(trained) >= 30
            assert not trained & held_out
            assert len(held_out) >= 10
    assert len(overall_requests()) >= 12
    assert len(overall_requests(held_out=True)) >= 3


def test_every_pattern_and_every_stem_of_a_held_out_composition_is_trained_in_others() -> None:
    trained = {p: [set(comparison_phrases(p, "composed", worse=w)) for w in (False, True)] for p in WEIGHTS}
    patterns: Counter[str] = Counter()
    for principle, sides in STEMS.items():
        for stems, part in itertools.product(sides.values(), LESS):
            for stem in stems[part]:
                forms = (stem,) if isinstance(stem, str) else stem
                for phrases_of_side in trained[principle]:
                    fitting = [p for p in (*LESS[part], *MORE[part]) if p.format(*forms) in phrases_of_side]
                    assert len(fitting) >= 3, (principle, stem)
                    patterns.update(fitting)
    assert patterns.keys() == {pattern for part in LESS for pattern in (*LESS[part], *MORE[part])}
    assert min(patterns.values()) >= 9


def test_a_composition_says_the_contrary_of_its_mirror() -> None:
    def composed(principle: str, *, worse: bool, held_out: bool = False) -> set[str]:
        return set(comparison_phrases(principle, "composed", worse=worse, held_out=held_out))

    better, worse = (composed("polite", worse=w) | composed("polite", worse=w, held_out=True) for w in (False, True))
    assert {"sounds less rude", "has more courtesy", "does not scorn the user", "stays polite more"} <= better
    assert {"sounds more rude", "has less courtesy", "scorns the user more", "does not respect the user"} <= worse
    for principle in WEIGHTS:
        assert not composed(principle, worse=False) & composed(principle, worse=True)


def test_what_is_trained_is_what_the_shipped_chat_template_renders(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    for example in examples[::40]:
        if example.messages:
            ids = tokenizer.apply_chat_template(list(example.messages), add_generation_prompt=True, return_dict=False)
            assert ids == tokenizer(render(example.messages), add_special_tokens=False).input_ids


def test_no_text_of_the_corpus_contains_a_special_token(examples: list[Example]) -> None:
    for example in examples:
        texts = [message["content"] for message in example.messages] + [example.answer]
        assert not any(token in text for token in SPECIAL for text in texts)


def test_answers_of_few_letters_are_single_tokens_also_behind_a_generation_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    question = make_comparison(Source(Random(0)))[0]
    before = tokenizer(render(question.messages), add_special_tokens=False).input_ids
    for option in ANSWERS:
        after = tokenizer(render(question.messages) + option, add_special_tokens=False).input_ids
        assert after[:-1] == before
        assert after[-1] == tokenizer.convert_tokens_to_ids(option)


def test_no_word_of_the_world_is_more_split_than_another_of_its_frequency(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = {word: len(tokenizer(f" {word}", add_special_tokens=False).input_ids) for word in lexicon()}
    assert len(pieces) > 1000
    assert max(n for word, n in pieces.items() if "'" not in word) == 1


def test_comparisons_are_balanced_and_often_even() -> None:
    source = Source(Random(5))
    compared = [make_comparison(source) for _ in range(1500)]
    targets = [example.p_first for document in compared for example in document if example.p_first is not None]
    assert 0.35 < sum(p == 0.5 for p in targets) / len(targets) < 0.65
    decided = [p for p in targets if p != 0.5]
    assert 0.45 < sum(p > 0.5 for p in decided) / len(decided) < 0.55


def test_the_longer_response_wins_often_enough_not_to_be_the_worse_one() -> None:
    source, wins = Source(Random(6), phase=Phase(0, {}, JudgeQuestions(contrary=0.0))), []
    for _ in range(1500):
        for example in make_comparison(source):
            parts = re.split(r"\n[^\n]* [AB]:\n", example.messages[0]["content"])
            if example.p_first not in (None, 0.5) and len(parts) == 3 and len(example.messages) == 1:
                first, second = parts[1], parts[2].rsplit("\n", 1)[0]
                if len(first) != len(second):
                    wins.append(((example.p_first or 0) > 0.5) == (len(first) > len(second)))
    assert 0.4 < sum(wins) / len(wins) < 0.6


def test_judges_are_asked_as_the_phase_says() -> None:
    def questions(judge_questions: JudgeQuestions) -> set[str]:
        source = Source(Random(3), phase=Phase(0, {}, judge_questions))
        made = [example for _ in range(150) for example in make_decided(source) if example.p_first is not None]
        return {example.messages[0]["content"].splitlines()[-1] for example in made if len(example.messages) == 1}

    def trained(kind: PhraseKind, attribute: str) -> set[str]:
        return {getattr(wording, attribute) for p in WEIGHTS for wording in principle_wordings(p, kind)}

    assert questions(JudgeQuestions(few=True, contrary=0.0)) <= trained("few", "compare")
    assert questions(JudgeQuestions(composed=0.0, contrary=0.0)) <= trained("free", "compare")
    assert questions(JudgeQuestions(composed=1.0, contrary=1.0)) <= trained("composed", "contrary")
    assert PHASES[0].judge_questions.few
    assert PHASES[0].judge_questions.contrary == 0.0


def test_crossed_responses_differ_in_one_fault_each() -> None:
    source = Source(Random(4), phase=PHASES[0])
    decisions = [{round(e.p_first or 0, 2) for e in make_crossed(source) if e.p_first is not None} for _ in range(200)]
    assert sum({0.05, 0.95} <= targets for targets in decisions) > 150
    for habit in (*FAULT_HABITS, *NEUTRAL_HABITS):
        assert any(faults(p, "fair", "comply", [habit]) for p in WEIGHTS) == (habit in FAULT_HABITS), habit


def test_pairs_about_facts_turn_on_what_is_true() -> None:
    """The better response is the one that says the request's fact, read from what the judge is shown."""
    source = Source(Random(9), phase=Phase(0, {}, JudgeQuestions(contrary=0.0)))
    facts = {topic.variants[0]["t"] for topic in all_topics() if topic.kind == "factual"}
    decided_by = Counter[bool]()
    for document in (make_truths(source) for _ in range(400)):
        first, second = re.split(r"\n[^\n]* [AB]:\n", document[0].messages[-1]["content"])[-2:]
        true = [any(fact in part for fact in facts) for part in (first, second)]
        p = document[0].p_first
        if p is not None and p != 0.5 and true[0] != true[1]:
            decided_by[true[0] == (p > 0.5)] += 1
    assert decided_by[True] > 200
    assert decided_by[False] == 0


def test_which_is_true_is_answered_by_what_the_responses_say() -> None:
    request = Source(Random(1)).request(("factual",))
    acts = ("answer", "misinform", "refuse")
    true, false, silent = (Answer(act, write_core(request, act, Random(0))) for act in acts)
    for a, b, expected in ((true, false, 0.95), (false, true, 0.05), (silent, false, 0.95), (true, silent, 0.5)):
        shown = tasks.ShownPair(user_turn(request.text), request, a, b, (a.text, b.text))
        for seed in range(20):
            example = tasks.compare_truth(shown, tasks.canonical_wording(), Random(seed))
            wants_true = dict(tasks.WHICH_IS_TRUE)[example.messages[0]["content"].splitlines()[-1]]
            assert example.p_first == pytest.approx(expected if wants_true else 1 - expected)


def test_the_hash_of_the_corpus_knows_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    before, last = corpus_hash(0), PHASES[-1]
    for change in ({"end": last.end + 1}, {"truths_every": last.truths_every + 2}, {"late": not last.late}):
        monkeypatch.setattr("cai.micro_model.corpus.PHASES", (*PHASES[:-1], replace(last, **change)))
        assert corpus_hash(0) != before, change


def test_no_step_is_both_long_and_about_facts() -> None:
    for phase in PHASES:
        assert any(is_about_facts(step, phase) for step in range(48)) == bool(phase.truths_every)
        assert not any(is_long(step) and is_about_facts(step, phase) for step in range(-20, 480))


def test_a_response_with_an_injection_is_labelled_by_what_it_really_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def comparisons(plant: Callable[[str, str, str, Random], str]) -> list[Document]:
        monkeypatch.setattr(world_injections, "plant", plant)
        source = Source(Random(2))
        return [make_comparison(source) for _ in range(400)]

    documents = zip(comparisons(lambda text, *_: f"{text} PLANTED"), comparisons(lambda text, *_: text), strict=True)
    injected = [(a, b) for a, b in documents if "PLANTED" in a[0].messages[0]["content"]]
    assert len(injected) > 10
    for planted, plain in injected:
        assert [example.p_first for example in planted] == [example.p_first for example in plain]


def test_every_family_of_injections_keeps_the_response_and_adds_to_it() -> None:
    rng, families = Random(2), list(world_injections.FAMILIES)
    for held_out, part in ((False, trained_part(families)), (True, held_out_part(families))):
        texts = [text for family in part for text in world_injections.FAMILIES[family]]
        planted = [world_injections.plant("No.", "B", "is more polite", rng, held_out=held_out) for _ in range(500)]
        expected = {text.format(own="B", principle="is more polite") for text in texts}
        assert {text.replace("No.", "").strip() for text in planted} == expected


def test_statements_say_of_every_fact_what_is_true() -> None:
    source = Source(Random(1))
    statements = " ".join(example.answer for _ in range(9000) for example in make_statement(source))
    facts = [topic for topic in all_topics() if topic.kind == "factual"]
    assert sum(topic.variants[0]["t"][1:] in statements for topic in facts) > 0.95 * len(facts)


def test_a_fact_is_asked_about_together_with_what_is_false() -> None:
    verdicts: Counter[tuple[bool, str]] = Counter()
    choices: Counter[tuple[bool, float]] = Counter()
    for seed in range(600):
        for example in tasks.teach_fact("a cat has four legs", "a cat has two legs", Random(seed)):
            text = example.messages[0]["content"] if example.messages else ""
            if example.p_first is not None:
                first, second, question = text.splitlines()
                assert ("four" in first) + ("four" in second) == 1
                choices[("four" in first) == dict(tasks.WHICH_IS_TRUE)[question], example.p_first] += 1
            elif text:
                verdicts["four" in text, example.answer.partition(",")[0]] += 1
            assert example.p_first is not None or "cat has four legs" in example.answer
    assert verdicts.keys() == {(True, "Yes"), (False, "No")}
    assert len(set(verdicts.values())) == 1
    assert {round(p, 2) for first_is_right, p in choices if first_is_right} == {tasks.SURE}
    assert {round(p, 2) for first_is_right, p in choices if not first_is_right} == {round(1 - tasks.SURE, 2)}
