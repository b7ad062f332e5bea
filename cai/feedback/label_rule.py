"""The rule that turns votes into labels. A `prefer` stage applies it and writes it beside its rows.

Whoever explains or measures the labels of a finished stage reads the rule back instead of the stage's config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np

from cai.maths.vote_aggregation import Floats, aggregate_votes, sigmoid
from cai.storage.files import read_json, write_json
from cai.text.errors import BadInput

LABEL_RULE = "label_rule.json"
LabelKind = Literal["soft", "hard", "clamp"]


@dataclass(frozen=True)
class LabelRule:
    """Parameters of a pair's log-odds l = sum of w_i l_i / T, and of the label that is made of them."""

    weights: Mapping[str, float]
    """Weight of each principle that voted, by its id; factors of tags are included."""
    temperature: float | None = None
    """T; None divides by the sum of weights."""
    is_temperature_fitted: bool = False
    """Whether T was fitted, on prompts that are not held out."""
    abstain_below: float = 0.0
    """Nats from even below which a principle's log-odds do not count."""
    min_confidence: float = 0.5
    """Probability of the preferred response below which a pair gets no label."""
    tie_below: float = 0.0
    """Nats from even up to which a pair counts as a tie."""
    labels: LabelKind = "soft"
    """soft: the probability; hard: its side; clamp: the probability within the bounds `clamp`."""
    clamp: tuple[float, float] | None = None
    methods: tuple[str, ...] = ()
    """How the judges were asked: pairwise, reasoned, rating."""

    def aggregate(self, log_odds: Floats, principles: Sequence[str], *, without: str | None = None) -> Floats:
        """Log-odds of each pair, (pairs,), from those of its principles, (pairs, principles); NaN where all abstain.

        `without` is the id of a principle that gets weight 0.
        """
        weights = np.array([0.0 if id == without else self.weights[id] for id in principles], dtype=float)
        return aggregate_votes(log_odds, weights, temperature=self.temperature, abstain_below=self.abstain_below)

    def p_chosen(self, strength: Floats) -> Floats:
        """Labels of pairs from the log-odds that their chosen response is the better one, at least 0; both (pairs,)."""
        if self.labels == "hard":
            return np.ones_like(strength)
        p = sigmoid(strength)
        return p if self.clamp is None else np.minimum(p, self.clamp[1])

    def write(self, folder: Path) -> None:
        """Writes the rule into the folder of a stage."""
        write_json(folder / LABEL_RULE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The rule that a finished `prefer` stage wrote. Raises BadInput where the folder has none."""
        fields = read_json(folder / LABEL_RULE)
        if fields is None:
            raise BadInput(
                f"{folder}: found no {LABEL_RULE}, expected the rule of its labels; an earlier version made this "
                "stage: remove its folder and run the recipe again"
            )
        clamp = fields["clamp"] and tuple(fields["clamp"])
        return cls(**{**fields, "clamp": clamp, "methods": tuple(fields["methods"])})
