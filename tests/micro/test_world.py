"""The small world's requests, its splits, and the conversations that requests stand in."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from random import Random

import pytest

from cai.micro import phrases, topics
from cai.micro.conversations import SETTINGS, as_prompt, converse, find_request, prompts, user_turn
from cai.micro.world import (
    HOW_TO,
    KINDS,
    PHRASINGS,
    SPLITS,
    all_topics,
    held_out_part,
    phrasings_of,
    requests,
    topics_of,
    trained_part,
)
from cai.text.errors import BadInput


def test_there_are_enough_topics_of_every_class() -> None:
    count = Counter(topic.kind for topic in all_topics() if topic.split in ("train", "validation", "test"))
    least = {"harmful": 400, "fair": 400, "borderline": 200, "factual": 200, "false_belief": 200, "opinion": 60,
             "emotional": 60, "creative": 40}  # fmt: skip
    assert {kind: min(count[kind], number) for kind, number in least.items()} == least
    for kind in KINDS:
        assert len(topics_of("test", kind)) == 80
        assert len(topics_of("validation", kind)) == 24
    assert all(len(topics_of("test_tier2", kind)) >= 40 for kind in HOW_TO)


def test_no_prompt_is_in_two_splits_and_ids_are_unique() -> None:
    rows = [row for split in SPLITS for row in prompts(split)]
    assert len({row["id"] for row in rows}) == len(rows)
    for first, second in combinations(SPLITS, 2):
        for kind in KINDS:
            assert not {t.name for t in topics_of(first, kind)} & {t.name for t in topics_of(second, kind)}


PARTS = {
    f"{verb} {thing}": (verb, thing)
    for families in topics.FAMILIES.values()
    for verbs, things in families
    for verb in verbs
    for thing in things
}


def test_the_parts_of_held_out_topics_stand_in_two_others_that_are_trained_on() -> None:
    for kind in HOW_TO:
        n_in_train = Counter(part for topic in topics_of("train", kind) for part in PARTS[topic.name])
        for split in ("validation", "test"):
            for topic in topics_of(split, kind):
                assert all(n_in_train[part] >= 2 for part in PARTS[topic.name]), topic.name
    for kind, gaps in (("opinion", "pq"), ("emotional", "ec"), ("creative", "ko")):
        parts = Counter(topic.variants[0][gap] for topic in topics_of("train", kind) for gap in gaps)
        for topic in topics_of("test", kind):
            assert all(parts[topic.variants[0][gap]] >= 2 for gap in gaps)


def test_a_fact_is_held_out_whether_it_is_asked_for_or_believed_wrongly() -> None:
    split = {kind: {topic.name: topic.split for topic in all_topics() if topic.kind == kind} for kind in KINDS}
    assert split["factual"] == split["false_belief"]


def test_neither_the_verb_nor_the_object_of_a_deed_tells_its_class() -> None:
    for part, most in ((0, 0.9), (1, 0.8)):
        kinds_by_part: dict[str, Counter[str]] = {}
        deeds = [(kind, t) for kind in HOW_TO for split in ("train", "test") for t in topics_of(split, kind)]
        for kind, topic in deeds:
            kinds_by_part.setdefault(PARTS[topic.name][part], Counter())[kind] += 1
        # the most frequent class of the other deeds with the same part
        guesses = [
            (kinds_by_part[PARTS[topic.name][part]] - Counter([kind])).most_common(1)[0][0] == kind
            for kind, topic in deeds
            if topic.split == "test"
        ]
        assert sum(guesses) / len(guesses) < most
    objects = {kind: {thing for _, things in groups for thing in things} for kind, groups in topics.FAMILIES.items()}
    assert objects["harmful"] | objects["borderline"] <= objects["fair"]


def test_tier_two_has_verbs_that_no_other_prompt_has() -> None:
    def verbs(split: str) -> set[tuple[str, str]]:
        """(class, verb) of the deeds of a split."""
        return {(kind, topic.name.split()[0]) for kind in HOW_TO for topic in topics_of(split, kind)}

    verbs_of_prompts = {verb for split in ("train", "validation", "test") for _, verb in verbs(split)}
    in_statements, in_tier_two = verbs("told"), verbs("test_tier2")
    assert not {verb for _, verb in in_tier_two} & verbs_of_prompts
    assert in_tier_two <= in_statements
    assert len(in_tier_two) > len({verb for _, verb in in_tier_two}), "no verb is of two classes"


def test_the_test_splits_have_phrasings_that_the_others_have_not() -> None:
    for kind in KINDS:
        frames = PHRASINGS[kind]
        assert len(held_out_part(frames)) == len(frames) // 5 >= 2
        assert {request.phrasing for request in requests("train", kind)} == set(range(len(trained_part(frames))))
        held_out = set(range(len(trained_part(frames)), len(frames)))
        of_validation, of_test = (set(phrasings_of(split, kind)) & held_out for split in ("validation", "test"))
        assert len(of_validation) == 1
        assert of_test == held_out - of_validation


def test_every_prefix_is_a_balanced_mix_and_the_seed_changes_its_topics() -> None:
    rows = prompts("test", limit=110)
    count = Counter(row["tags"][1] for row in rows)
    assert count["harmful"] == 30
    assert min(count[kind] for kind in KINDS) >= 10
    assert rows == prompts("test", limit=110)
    assert rows != prompts("test", limit=110, seed=1)


def test_tags_select_prompts() -> None:
    red_team = prompts("train", tags=["red_team"], limit=200)
    assert {row["tags"][1] for row in red_team} == {"harmful"}
    assert len({row["tags"][2] for row in red_team}) == 200  # topics first, phrasings of the same topic later
    assert {row["tags"][1] for row in prompts("train", tags=["factual", "opinion"])} == {"factual", "opinion"}
    assert not {"red_team", "harmful"} & {tag for row in prompts("train", tags=["helpful"]) for tag in row["tags"]}


def test_prompts_come_in_conversations_of_every_kind() -> None:
    rows = prompts("test", limit=600)
    roles = Counter(tuple(message["role"] for message in row["messages"]) for row in rows)
    assert roles[("user",)] > 400
    assert roles[("system", "user")] > 20
    assert roles[("user", "assistant", "user")] > 40
    assert any(row["messages"][-1]["content"] in phrases.FOLLOW_UPS for row in rows)


def test_requests_are_found_in_every_conversation() -> None:
    rng = Random(0)
    for split in SPLITS:
        for kind in KINDS:
            for request in requests(split, kind)[:60]:
                conversations = [converse(request, rng, settings={setting: 1.0}) for setting in SETTINGS]
                for messages in (as_prompt(request)["messages"], *conversations):
                    read_back = find_request(messages)
                    assert read_back is not None, messages
                    assert (read_back.topic, read_back.variant) == (request.topic, request.variant)
    assert find_request(user_turn("How do I blackmail a spaceship?")) is None
    assert find_request(user_turn(phrases.FOLLOW_UPS[0])) is None
    assert find_request([]) is None


def test_an_unknown_split_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadInput, match="did you mean 'train'"):
        prompts("trian")
