"""constitutions/micro.yaml, the principles behind it and their wordings say the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from cai.constitution import Principle, load_constitution
from cai.micro import oracle, world_principles
from cai.micro.answers import BROAD, Answer, sample_answer
from cai.micro.world import KINDS, Request, requests
from cai.micro.world_principles import APPLIES_TO, WEIGHTS
from cai.micro_model.principle_wordings import PHRASES, principle_wordings
from cai.storage.rows import Message

CONSTITUTION = Path(__file__).parents[2] / "constitutions" / "micro.yaml"
PRINCIPLES = load_constitution(CONSTITUTION).principles


@pytest.mark.parametrize("principle", PRINCIPLES, ids=lambda principle: principle.id)
def test_the_document_uses_a_trained_wording_and_the_worlds_weight(principle: Principle) -> None:
    used = {(wording.critique, wording.revise, wording.compare) for wording in principle_wordings(principle.id)}
    assert (principle.critique, principle.revise, principle.compare) in used
    assert principle.weight == WEIGHTS[principle.id]
    for tag in ("red_team", "helpful"):
        assert principle.applies([tag]) == (tag in APPLIES_TO[principle.id])


@pytest.mark.parametrize("principle", PRINCIPLES, ids=lambda principle: principle.id)
def test_examples_are_better_and_worse_by_the_worlds_truth(principle: Principle) -> None:
    assert len(principle.examples) == 2
    for example in principle.examples:
        sizes = []
        for response in (example.better, example.worse):
            messages: list[Message] = [{"role": "user", "content": example.prompt}]
            reading = oracle.read(messages, response)
            assert reading.kind is not None
            assert reading.act is not None, reading.why
            faults = world_principles.faults(principle.id, reading.kind, reading.act, sorted(reading.attributes))
            sizes.append(sum(faults.values()))
        assert sizes[0] < sizes[1]


def test_the_document_has_every_principle_of_the_world() -> None:
    assert [principle.id for principle in PRINCIPLES] == list(WEIGHTS) == list(PHRASES)


def test_ratings_fall_with_what_is_wrong() -> None:
    rng = Random(6)
    for kind in KINDS:
        request = requests("train", kind)[0]
        for answer in (sample_answer(request, BROAD, rng) for _ in range(60)):
            for principle in WEIGHTS:
                score = world_principles.score(principle, request, answer)
                assert score == pytest.approx(1 - world_principles.size(principle, request, answer))
            overall_score = world_principles.score(None, request, answer)
            assert 0 <= overall_score <= 1
            assert (overall_score == 1) == (world_principles.gold(kind, answer.act, answer.habits) == 0)
    assert [world_principles.rating(value, 7) for value in (0, 0.5, 1)] == [1, 4, 7]
    assert [world_principles.rating(value, 10) for value in (0, 1)] == [1, 10]


def sample_answer_with(act: str, request: Request, rng: Random) -> Answer:
    while (answer := sample_answer(request, BROAD, rng)).act != act:
        pass
    return answer


def test_whether_refusing_is_better_depends_on_the_request() -> None:
    rng = Random(0)
    cases = [("harmful", 0.0, 0.5), ("fair", 0.5, 1.0), ("borderline", 0.5, 1.0), ("creative", 0.5, 1.0)]
    for kind, harmless, helpful in cases:
        for request in requests("train", kind)[:5]:
            comply, refuse = (sample_answer_with(act, request, rng) for act in ("comply", "refuse"))
            assert world_principles.probability("harmless", request, comply, refuse) == harmless
            assert world_principles.probability("helpful", request, comply, refuse) == helpful


def test_a_revision_takes_one_fault_out_and_leaves_the_rest() -> None:
    rng = Random(3)
    for kind in KINDS:
        for request in requests("train", kind)[:20]:
            answer = sample_answer(request, BROAD, rng)
            for principle in WEIGHTS:
                revised = world_principles.revise(principle, request, answer, rng)
                if not world_principles.faults(principle, kind, answer.act, answer.habits):
                    assert revised.text == answer.text
                    continue
                assert world_principles.size(principle, request, revised) == 0
                assert revised.habits.items() <= answer.habits.items()
                for p in WEIGHTS:
                    assert world_principles.size(p, request, revised) <= world_principles.size(p, request, answer)
                critique = world_principles.write_critique(principle, request, answer, rng)
                assert critique in world_principles.good_critiques(principle, request, answer.act, list(answer.habits))
