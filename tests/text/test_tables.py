"""Tables of plain text: columns line up, and no cell can steer a terminal."""

from __future__ import annotations

from cai.text.tables import aligned_lines, rate_text, table


def test_columns_are_as_wide_as_their_widest_cell():
    lines = table(["name", "n"], [["a", "1,000"], ["longer", ""]])
    assert lines == ["name    n", "------  -----", "a       1,000", "longer"]


def test_numbers_can_be_aligned_to_the_right():
    lines = aligned_lines([["", "n", "why"], ["a", "1,000", "first"], ["b", "7", ""]], "<>")
    assert lines == ["       n  why", "a  1,000  first", "b      7"]
    assert aligned_lines([]) == []


def test_cells_are_printable():
    assert aligned_lines([["a\x1b[2J\nb", "c"]]) == ["a\N{REPLACEMENT CHARACTER}[2J b  c"]


def test_a_rate_shows_its_interval_and_what_failures_could_make_of_it():
    rate = {"value": 0.5, "n": 3, "topics": 3, "interval": [0.25, 0.75]}
    assert rate_text(rate) == "0.50 [0.25, 0.75]"
    assert rate_text(rate | {"missing": 1, "bounds": [0.4, 0.6]}) == "0.50 [0.25, 0.75], worst case 0.40 to 0.60"
    assert rate_text(rate | {"value": None}) == rate_text(None) == "-"
