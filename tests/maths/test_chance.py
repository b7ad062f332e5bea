"""What an accuracy says against chance."""

from __future__ import annotations

import pytest

from cai.maths.chance import against_chance, can_beat_chance, n_to_beat_chance
from cai.maths.statistics import rate


@pytest.mark.parametrize(
    ("right", "n", "standing"),
    [
        (20, 39, "not distinguishable from chance"),
        (33, 39, "better than chance"),
        (5, 39, "worse than chance"),
        (2, 2, "not distinguishable from chance"),
        (0, 0, "not distinguishable from chance"),
    ],
)
def test_chance_is_left_where_the_interval_leaves_one_half(right: int, n: int, standing: str) -> None:
    assert against_chance(rate([1.0] * right + [0.0] * (n - right)).interval) == standing


@pytest.mark.parametrize("interval", [(0.5, 0.9), (0.1, 0.5)])
def test_an_interval_that_ends_at_one_half_contains_it(interval: tuple[float, float]) -> None:
    assert against_chance(interval) == "not distinguishable from chance"


def test_the_fewest_choices_that_can_beat_chance_are_where_the_interval_leaves_one_half() -> None:
    n = n_to_beat_chance()
    assert n == 7
    assert rate([1.0] * n).interval[0] > 0.5 >= rate([1.0] * (n - 1)).interval[0]
    assert not can_beat_chance(0)
    assert can_beat_chance(n, [str(i) for i in range(n)])
    assert not can_beat_chance(n, ["one prompt"] * n)
