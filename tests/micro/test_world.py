"""The small world's prompts and splits."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from cai.errors import BadInput
from cai.micro.world import KINDS, SPLITS, all_topics, find_request, prompts, requests


def test_world_and_oracle_import_without_torch() -> None:
    code = "import sys, cai.micro.world, cai.micro.oracle; sys.exit('torch' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_are_enough_topics_of_every_class() -> None:
    count = Counter(topic.kind for topic in all_topics())
    least = {"harmful": 120, "fair": 120, "borderline": 50, "factual": 40, "false_belief": 40, "opinion": 20,
             "emotional": 20}  # fmt: skip
    assert all(count[kind] >= number for kind, number in least.items())
    for kind, known, unseen in (("harmful", 80, 60), ("fair", 80, 60)):
        assert len({r.topic.name for r in requests("test", kind)}) >= known
        assert len({r.topic.name for r in requests("test_topics", kind)}) >= unseen


def test_no_prompt_is_in_two_splits_and_ids_are_unique() -> None:
    rows = {split: prompts(split) for split in SPLITS}
    ids = [row["id"] for split in SPLITS for row in rows[split]]
    texts = [row["messages"][0]["content"] for split in SPLITS for row in rows[split]]
    assert len(set(ids)) == len(ids) == len(set(texts))


def test_held_out_topics_are_of_no_other_split_but_their_verbs_and_objects_are() -> None:
    held = {(t.kind, t.name) for t in all_topics() if t.held_out}
    for split in ("train", "validation", "test"):
        assert not held & {(r.kind, r.topic.name) for kind in KINDS for r in requests(split, kind)}
    words = {word for kind in KINDS for r in requests("train", kind) for word in r.text.strip("?.").split()}
    for kind in ("harmful", "fair", "borderline"):
        for request in requests("test_topics", kind):
            assert set(request.topic.name.split()) <= words


def test_neither_verb_nor_object_tells_harm() -> None:
    deeds = {kind: [r.topic.name for r in requests("train", kind)] for kind in ("harmful", "fair", "borderline")}
    verbs = {kind: {deed.split()[0] for deed in names} for kind, names in deeds.items()}
    assert len(verbs["harmful"] & verbs["borderline"]) >= 5
    for kind in ("fair", "harmful"):
        assert any(deed.endswith("a neighbour") for deed in deeds[kind])


def test_every_prefix_is_a_balanced_mix_and_the_seed_changes_its_topics() -> None:
    rows = prompts("test", limit=50)
    count = Counter(row["tags"][1] for row in rows)
    assert count["harmful"] == 15
    assert min(count[kind] for kind in KINDS) >= 5
    assert rows == prompts("test", limit=50)
    assert rows != prompts("test", limit=50, seed=1)


def test_tags_select_prompts() -> None:
    red_team = prompts("train", tags=["red_team"], limit=200)
    assert {row["tags"][1] for row in red_team} == {"harmful"}
    assert len({row["tags"][2] for row in red_team}) >= 120  # topics first, phrasings of the same topic later
    assert {row["tags"][1] for row in prompts("train", tags=["factual", "opinion"])} == {"factual", "opinion"}
    assert not {"red_team", "harmful"} & {tag for row in prompts("train", tags=["helpful"]) for tag in row["tags"]}


def test_requests_are_found_by_their_text_alone() -> None:
    for split in SPLITS:
        for kind in KINDS:
            for request in requests(split, kind)[:40]:
                found = find_request(request.text)
                assert found is not None
                assert (found.kind, found.topic.name, found.text) == (kind, request.topic.name, request.text)
    assert find_request("How do I blackmail a spaceship?") is None


def test_an_unknown_split_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadInput, match="did you mean 'train'"):
        prompts("trian")
