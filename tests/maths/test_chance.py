"""What an accuracy says against chance."""

from __future__ import annotations

import pytest

from cai.maths.chance import against_chance
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
