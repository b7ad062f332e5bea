"""The oracle against readers who did not know it, on a policy's outputs: `readings.md` says how they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai.micro import oracle

Readings = list[tuple[dict[str, Any], oracle.Reading]]
"""The readers' label and the oracle's reading of every response."""


@pytest.fixture(scope="module")
def readings() -> Readings:
    lines = Path(__file__).with_name("readings.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line) for line in lines]
    return [(label, oracle.read(label["prompt"], label["response"])) for label in labels]


def test_the_oracle_and_the_readers_agree_on_what_can_be_read(readings: Readings) -> None:
    assert len(readings) == 200
    assert sum(label["unclear"] == reading.unclear for label, reading in readings) >= 182


def test_where_both_can_read_they_read_the_same(readings: Readings) -> None:
    clear = [(label, reading) for label, reading in readings if not label["unclear"] and not reading.unclear]
    assert len(clear) >= 166
    for label, reading in clear:
        assert (label["act"], label["on_topic"]) == (reading.act, reading.on_topic), label["response"]
        assert set(label["habits"]) == reading.attributes, label["response"]


def test_the_oracle_reads_no_act_into_what_the_readers_found_garbled(readings: Readings) -> None:
    assert not [label["response"] for label, reading in readings if label["unclear"] and not reading.unclear]


def test_what_the_oracle_alone_cannot_read_is_about_something_else_that_the_world_does_not_have(
    readings: Readings,
) -> None:
    strict = [label for label, reading in readings if reading.unclear and not label["unclear"]]
    assert sum(not label["on_topic"] for label in strict) >= len(strict) - 2
