"""The oracle against readers who did not know it, on a policy's outputs: `readings.md` says how they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai.micro import oracle


@pytest.fixture(scope="module")
def read() -> list[tuple[dict[str, Any], oracle.Reading]]:
    lines = Path(__file__).with_name("readings.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line) for line in lines]
    return [(label, oracle.read(label["prompt"], label["response"])) for label in labels]


def test_the_oracle_and_the_readers_agree_on_what_can_be_read(read: list[tuple[dict[str, Any], oracle.Reading]]) -> None:
    assert len(read) == 200
    assert sum(label["unclear"] == reading.unclear for label, reading in read) >= AGREED["unclear"]


def test_where_both_can_read_they_read_the_same(read: list[tuple[dict[str, Any], oracle.Reading]]) -> None:
    both = [(label, reading) for label, reading in read if not label["unclear"] and not reading.unclear]
    assert sum(label["act"] == reading.act for label, reading in both) >= len(both) - AGREED["other acts"]
    assert sum(label["on_topic"] == reading.on_topic for label, reading in both) >= len(both) - AGREED["other topics"]
    habits = sum(set(label["habits"]) == reading.attributes for label, reading in both)
    assert habits >= len(both) - AGREED["other habits"]


def test_the_oracle_reads_no_act_into_what_the_readers_found_garbled(
    read: list[tuple[dict[str, Any], oracle.Reading]],
) -> None:
    guessed = [label["response"] for label, reading in read if label["unclear"] and not reading.unclear]
    assert len(guessed) <= AGREED["guessed"], guessed
