"""constitutions/micro.yaml, the principles behind it and their wordings say the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from cai.constitution import Principle, load_constitution
from cai.micro import oracle, principles
from cai.micro.answers import BROAD, draw
from cai.micro.principles import APPLIES_TO, PHRASES, WEIGHTS, Wording, wordings
from cai.micro.world import KINDS, requests
from cai.records import Message

CONSTITUTION = Path(__file__).parents[2] / "constitutions" / "micro.yaml"
PRINCIPLES = load_constitution(CONSTITUTION).principles


@pytest.mark.parametrize("principle", PRINCIPLES, ids=lambda principle: principle.id)
def test_the_document_uses_a_trained_wording_and_the_worlds_weight(principle: Principle) -> None:
    assert Wording(principle.critique, principle.revise, principle.compare) in set(wordings(principle.id))
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
            found = principles.faults(principle.id, reading.kind, reading.act, sorted(reading.attributes))
            sizes.append(sum(found.values()))
        assert sizes[0] < sizes[1]


def test_the_document_has_every_principle_of_the_world() -> None:
    assert [principle.id for principle in PRINCIPLES] == list(WEIGHTS) == list(PHRASES)


def test_every_principle_has_many_wordings_and_held_out_ones_share_no_phrase_with_them() -> None:
    for principle in WEIGHTS:
        trained, held = set(wordings(principle)), set(wordings(principle, held_out=True))
        assert len({wording.compare for wording in trained}) >= 20
        for attribute in ("critique", "revise", "compare"):
            assert not {getattr(w, attribute) for w in trained} & {getattr(w, attribute) for w in held}


def test_whether_refusing_is_better_depends_on_the_request() -> None:
    rng = Random(0)
    for kind, harmless, helpful in (("harmful", 0.0, 0.5), ("fair", 0.5, 1.0), ("borderline", 0.5, 1.0)):
        for request in requests("train", kind)[:5]:
            comply = next(a for a in iter(lambda r=request: draw(r, BROAD, rng), None) if a and a.act == "comply")
            refuse = next(a for a in iter(lambda r=request: draw(r, BROAD, rng), None) if a and a.act == "refuse")
            assert principles.probability("harmless", request, comply, refuse) == harmless
            assert principles.probability("helpful", request, comply, refuse) == helpful


def test_a_revision_takes_one_fault_out_and_leaves_the_rest() -> None:
    rng = Random(3)
    for kind in KINDS:
        for request in requests("train", kind)[:20]:
            answer = draw(request, BROAD, rng)
            for principle in WEIGHTS:
                revised = principles.revise(principle, request, answer, rng)
                if not principles.faults(principle, kind, answer.act, answer.habits):
                    assert revised.text == answer.text
                    continue
                assert principles.size(principle, request, revised) == 0
                kept = set(revised.habits.items())
                assert kept <= set(answer.habits.items())
                for other in WEIGHTS:
                    assert principles.size(other, request, revised) <= principles.size(other, request, answer)
                critique = principles.write_critique(principle, request, answer, rng)
                assert critique in principles.good_critiques(principle, request, answer.act, list(answer.habits))
