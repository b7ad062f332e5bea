"""Measures what choices about labels do to labels, reward models and policies, on the embedded model.

    OMP_NUM_THREADS=1 python studies/labels.py                   # five seeds; continues where it was stopped
    python studies/labels.py --quick                             # small sizes; no results to quote
    python studies/labels.py --page docs/findings.md             # page and figures from stored results; runs nothing

For every seed a recipe samples responses of the base model to prompts of split `train` and of tier 1 (split `test`),
and all principles vote once on pairs of them in both orders. All questions are answered from these votes:

1. soft, hard or clamped labels -> reward model and policy (Bai et al. 2022, arXiv 2212.08073, section 4),
2. one principle sampled for each pair, several, or all -> labels and reward model (the same),
3. one order or both, and which mean, under a position bias (Lee et al. 2023, arXiv 2309.00267),
4. flipped labels against the number of pairs -> reward model,
5. principles that abstain and pairs that are dropped -> accuracy against coverage.

Questions 2, 3, 5 and calibration are arithmetic on votes. Reward models and policies are trained briefly, with the same
settings for all labels, which were chosen for soft labels on split `validation`. The oracle says which response is
better; pairs that it scores equally or cannot read are left out.

An estimate has two 95 % intervals: one over the rows of all seeds, clustered by topic, and one from Student's t over
the means of the seeds, which includes how much training varies. The reported interval covers both, and a difference
counts if zero is outside of it. Left out: corrections for the number of comparisons, votes after rationales, PPO. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import measurement
from cai.contracts.context import Context
from cai.contracts.profile import Profile, load_profile
from cai.feedback.explain import DECIDED
from cai.feedback.judge_calibration import measure_calibration
from cai.feedback.labelled_votes import LabelRule
from cai.feedback.stored_votes import read_votes
from cai.maths import statistics
from cai.maths.behaviours import n_words
from cai.maths.calibration import confidence_and_correctness
from cai.maths.vote_aggregation import Bools, Floats, aggregate_votes, mean_over_orders, sigmoid
from cai.micro.world_principles import WEIGHTS
from cai.run.pipeline import run_recipe
from cai.run.plan import PACKAGES, Options
from cai.run.recipe import load_recipe
from cai.run.stage_run import prepare
from cai.stages import config_class, run_function
from cai.stages.prefer import prefers_a, to_preference
from cai.storage.files import read_json, remove_folder, write_json
from cai.storage.journal import RECORDS, Journal
from cai.storage.rows import HELD_OUT, Preference, Prompt, row_lines, stable_id, stable_seed, topic_of
from cai.storage.run_folder import finished, latest
from cai.text.progress import PlainDisplay, StageLine, duration

RESULTS = "results.json"
SPLIT = "test"
"""Split of the held-out prompts: tier 1."""
SAMPLING = {"max_new_tokens": 80, "top_p": 0.95}
"""The least likely five percent of the base model's tokens are mostly errors."""
TEMPERATURE = 1.0
"""Divisor of the weighted sum of log-odds, as in the quickstart; None is the sum of the weights."""
N_PRINCIPLES = (1, 2, 3, 5)
"""Numbers of principles that are sampled for a pair, in addition to all."""
BIAS = (2.0, 1.0)
"""Mean and standard deviation of the position bias, in nats."""
ABSTAIN = (0.0, 0.05, 0.1, 0.2, DECIDED, 0.8, 1.2)
"""Nats below which a principle abstains; the fifth is 60 %."""
CONFIDENT = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Probabilities below which a pair is dropped."""
TRAIN: Mapping[str, dict[str, Any]] = {
    "reward": {"batch_size": 16, "train": {"learning_rate": 1e-3, "save_strategy": "no"}},
    "dpo": {"batch_size": 16, "train": {"learning_rate": 6e-4, "beta": 0.2, "save_strategy": "no"}},
}
"""One epoch for all labels. Learning rates chosen for soft labels on split `validation`: from 5e-4, 1e-3, 2e-3 by
accuracy, and from 5e-5, 1e-4, 3e-4, 6e-4 by gold score."""


@dataclass(frozen=True)
class Sizes:
    """How much each seed samples and trains."""

    learned: int
    """Prompts of split `train`."""
    heldout: int
    """Prompts of tier 1."""
    responses: int = 4
    """Responses to each prompt; there are half as many pairs."""
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the pairs to learn from, in question 4."""
    flips: tuple[float, ...] = (0.0, 0.15, 0.3)
    """Shares of flipped labels, in question 4."""


FULL = Sizes(learned=300, heldout=320)
QUICK = Sizes(learned=11, heldout=16, shares=(0.5, 1.0), flips=(0.0, 0.3))


@dataclass(frozen=True)
class Cell:
    """One training, and how its labels are made of the votes."""

    name: str
    kind: str
    """`reward` or `dpo`."""
    labels: str = "soft"
    temperature: float | None = TEMPERATURE
    principles: int | None = None
    """Number of principles sampled for each pair; None is all."""
    share: float = 1.0
    flipped: float = 0.0


KINDS: Mapping[str, dict[str, Any]] = {
    "soft": {},
    "soft, mean": {"temperature": None},
    "hard": {"labels": "hard"},
    "clamped": {"labels": "clamped"},
}
"""Labels of question 1. With the mean over principles, `prefer`'s default, this judge's labels are near to even."""


def cells(sizes: Sizes) -> list[Cell]:
    """Every training of one seed. All have the same random numbers, and with equal pairs equal order."""
    all_cells = [Cell(f"reward {name}", "reward", **fields) for name, fields in KINDS.items()]
    all_cells += [Cell(f"reward of {k}", "reward", principles=k) for k in (1, 3)]
    all_cells += [
        Cell(noisy_cell_name(share, flipped), "reward", share=share, flipped=flipped)
        for share in sizes.shares
        for flipped in sizes.flips
        if (share, flipped) != (1.0, 0.0)
    ]
    return all_cells + [Cell(f"policy {name}", "dpo", **fields) for name, fields in KINDS.items()]


def noisy_cell_name(share: float, flipped: float) -> str:
    """Name of the cell with that share of pairs and of flipped labels."""
    return "reward soft" if (share, flipped) == (1.0, 0.0) else f"reward {share:g} of pairs, {flipped:g} flipped"


# Samples and votes of one seed.


@dataclass(frozen=True)
class World:
    """One seed's pairs and votes.

    `ab` and `ba` are (pairs, principles) log-odds, NaN if there is no vote. `gold` (pairs,) is the score of *a*
    minus that of *b*, NaN if it cannot read one of them.
    """

    seed: int
    digest: str
    rows: Sequence[Mapping[str, Any]]
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    gold: Floats
    held_out: Bools

    @property
    def weights(self) -> Floats:
        """Weights of the principles, (principles,)."""
        return np.array([WEIGHTS[id] for id in self.principles])

    @property
    def decided(self) -> Bools:
        """Whether one response of the pair is better, (pairs,)."""
        return np.asarray(~np.isnan(self.gold) & (self.gold != 0))


def sample_world(seed: int, sizes: Sizes, folder: Path) -> World:
    """Samples and judges by a recipe; a run that exists is reused."""
    recipe = {
        "name": f"seed-{seed}",
        "seed": seed,
        "model": "micro",
        "judge": "model",
        "constitution": "micro",
        "prompts": {
            "learned": {"source": "micro", "split": "train", "limit": sizes.learned, "seed": seed},
            "heldout": {"source": "micro", "split": SPLIT, "limit": sizes.heldout, "seed": seed, "hold_out": True},
        },
        "stages": [
            {"id": "responses", "kind": "sample", "prompts": ["learned", "heldout"], "n": sizes.responses} | SAMPLING,
            {"id": "votes", "kind": "judge", "from": "responses", "pairs": "disjoint", "principles": "all"},
        ],
    }
    path = folder / f"seed-{seed}.yaml"
    write_json(path, recipe)  # JSON is YAML
    run_recipe(load_recipe(path), load_profile(), folder / f"seed-{seed}", Options(), PlainDisplay())
    return read_world(seed, folder / f"seed-{seed}")


def read_world(seed: int, run: Path) -> World:
    """The votes of a finished run, with the oracle's scores."""
    from cai.micro.oracle import gold_score

    judged = finished(latest(run)["votes"])
    assert judged is not None
    votes = read_votes([judged.folder / RECORDS])
    rows = list(votes.parsed_rows())
    ab, ba = votes.log_odds_by_order()
    scores = np.array([[gold_score(row["prompt"], row[side]["text"]) for side in "ab"] for row in rows], dtype=float)
    held_out = np.array([HELD_OUT in row["tags"] for row in rows])
    return World(seed, judged.digest, rows, votes.principles, ab, ba, scores[:, 0] - scores[:, 1], held_out)


def keep_sampled_principles(
    ids: Sequence[str], principles: Sequence[str], votes: Floats, k: int | None, seed: int
) -> Floats:
    """`votes` (pairs, principles) with the votes of k principles a pair kept, others NaN. None keeps all.

    Samples are nested: the principles kept with k are kept with k + 1 too.
    """
    if k is None:
        return votes
    keys = np.array(
        [[stable_seed("drawn", seed, id, principle) for principle in principles] for id in ids], dtype=float
    )
    rank = np.argsort(np.argsort(np.where(np.isnan(votes), np.inf, keys), axis=1), axis=1)
    return np.where(rank < k, votes, np.nan)


def position_bias(ids: Sequence[str], principles: Sequence[str], salt: str) -> Floats:
    """Nats by which a judge favours the response shown first, (pairs, principles); hashed from pair and principle."""
    mean, deviation = BIAS
    normal = [
        [np.random.default_rng(stable_seed("bias", salt, id, principle)).standard_normal() for principle in principles]
        for id in ids
    ]
    return mean + deviation * np.array(normal)


def sample_share(ids: Sequence[str], share: float, *salt: object) -> Bools:
    """Whether each pair is in a random share of them; a larger share contains a smaller one."""
    chosen = sorted(range(len(ids)), key=lambda i: stable_seed(*salt, ids[i]))[: round(share * len(ids))]
    is_chosen = np.zeros(len(ids), dtype=bool)
    is_chosen[chosen] = True
    return is_chosen


# Training.


def preferences(world: World, cell: Cell) -> list[Preference]:
    """The pairs that a cell learns from, and for a reward model also the decided held-out pairs."""
    ids = [row["id"] for row in world.rows]
    votes = keep_sampled_principles(
        ids, world.principles, mean_over_orders(world.ab, world.ba), cell.principles, world.seed
    )
    log_odds = aggregate_votes(votes, world.weights, temperature=cell.temperature)
    learned = np.flatnonzero(~world.held_out)
    learned = learned[sample_share([ids[i] for i in learned], cell.share, "share", world.seed)]
    rows = _label_pairs(world, learned.tolist(), log_odds, cell.labels)
    is_flipped = sample_share([row["pair_id"] for row in rows], cell.flipped, "flipped", world.seed)
    rows = [flip_label(row) if flipped else row for row, flipped in zip(rows, is_flipped.tolist(), strict=True)]
    if cell.kind == "reward":
        rows += _label_pairs(world, np.flatnonzero(world.held_out & world.decided).tolist(), log_odds, "soft")
    return rows


def _label_pairs(world: World, pairs: Sequence[int], log_odds: Floats, kind: str) -> list[Preference]:
    rules = {
        "soft": LabelRule({}),
        "hard": LabelRule({}, labels="hard"),
        "clamped": LabelRule({}, labels="clamp", clamp=(0.4, 0.6)),
    }
    rule = rules[kind]
    return [
        to_preference(
            world.rows[i],
            prefers_a(world.rows[i], log_odds[i]),
            float(rule.p_chosen(np.abs(log_odds[i : i + 1]))[0]),
            float(abs(log_odds[i])),
            "labels",
        )
        for i in pairs
    ]


def flip_label(row: Preference) -> Preference:
    """The preference with chosen and rejected exchanged."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def train(cell: Cell, world: World, prompts: Sequence[Prompt], folder: Path, profile: Profile) -> dict[str, Any]:
    """Trains one cell and measures its model row by row. The model is deleted."""
    rows = preferences(world, cell)
    remove_folder(folder)
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / RECORDS).write_text("".join(row_lines(rows)), encoding="utf-8")
    stage = "reward" if cell.kind == "reward" else "policy"
    context = _context(stage, folder, world.seed, profile, inputs={"labels": folder / "labels"})
    config = config_class(cell.kind).model_validate(
        {"id": stage, "kind": cell.kind, "from": "labels"} | TRAIN[cell.kind]
    )
    run_function(cell.kind)(config, context)
    figures = _score_reward(folder) if cell.kind == "reward" else _score_policy(folder, world.seed, prompts, profile)
    remove_folder(folder)
    return {"examples": sum(HELD_OUT not in row["tags"] for row in rows)} | figures


def _context(stage: str, folder: Path, seed: int, profile: Profile, **fields: Any) -> Context:
    """Context of a stage outside of a run, by default starting from the embedded model."""
    from cai.engines import open_engine
    from cai.models.reference import resolve

    line = StageLine(stage)
    defaults: dict[str, Any] = {
        "inputs": {},
        "prompt_sets": {},
        "models": {"": resolve("micro", folder=folder)},
        "open_engine": open_engine,
    }
    return Context(stage, folder, seed, profile, line, Journal(folder, line), None, **defaults | fields)


def _score_reward(folder: Path) -> dict[str, Any]:
    """1 for each held-out pair that the reward model orders as the oracle does, else 0, by preference id."""
    with (folder / "evaluation.jsonl").open(encoding="utf-8") as lines:
        scored = [json.loads(line) for line in lines]
    return {"right": {row["id"]: float(row["margin"] * row["gold_margin"] > 0) for row in scored}}


def _score_policy(folder: Path, seed: int, prompts: Sequence[Prompt], profile: Profile) -> dict[str, Any]:
    """Figures of the policy on held-out prompts (`read_responses`)."""
    from cai.models.reference import resolve

    model = resolve(str(folder / "model"), folder=folder)
    (folder / "answers").mkdir()
    context = _context(
        "answers", folder / "answers", seed, profile, models={"": model}, prompt_sets={"heldout": list(prompts)}
    )
    config = config_class("sample").model_validate(
        {"id": "answers", "kind": "sample", "prompts": ["heldout"]} | SAMPLING
    )
    run_function("sample")(config, context)
    with (folder / "answers" / RECORDS).open(encoding="utf-8") as lines:
        return {"rates": read_responses(prompts, [json.loads(line) for line in lines])}


def read_responses(prompts: Sequence[Prompt], samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Rates of a comparison and gold scores by prompt, as means over its responses.

    A response that the oracle cannot read counts against the model in every rate and has no gold score.
    """
    from cai.micro.oracle import gold_score
    from cai.report.figures import ComparisonRows, metric_values

    prompts_by_id = {prompt["id"]: prompt for prompt in prompts}
    numbered = {
        ("it", row["prompt_id"], number): row for number, row in enumerate(samples) if row["prompt_id"] in prompts_by_id
    }
    columns = metric_values(ComparisonRows(prompts_by_id, numbered, {}), "it")
    scores = {key[1:]: gold_score(row["prompt"], row["response"]) for key, row in numbered.items()}
    columns["gold"] = {key: score for key, score in scores.items() if score is not None}
    means_by_metric: dict[str, dict[str, float]] = {}
    for metric in POLICY_METRICS:
        values: dict[str, list[float]] = {}
        for (prompt_id, _), value in columns[metric].items():
            values.setdefault(prompt_id, []).append(value)
        means_by_metric[metric] = {prompt_id: float(np.mean(own)) for prompt_id, own in values.items()}
    return means_by_metric


POLICY_METRICS = ("harmful_compliance", "helpfulness", "over_refusal", "well_formed", "gold")
"""Figures of a policy."""


# Estimates over seeds and topics.


def estimate(
    values: Sequence[float], topics: Sequence[str], seeds: Sequence[int], bounded: bool = True
) -> dict[str, Any]:
    """A mean with an interval that covers both the one clustered by topic and the one over seeds."""
    mean = (statistics.rate if bounded else statistics.mean)(values, topics)
    seed_means = _means_by_seed(values, seeds)
    low, high = _widen(mean.interval, seed_means)
    interval = [max(low, 0.0), min(high, 1.0)] if bounded else [low, high]
    return mean.as_json() | {"interval": interval, "seeds": seed_means}


def difference(
    a: Sequence[float], b: Sequence[float], topics: Sequence[str], seeds: Sequence[int], bounded: bool = True
) -> dict[str, Any]:
    """a - b over the same rows with an interval as in `estimate`. `verdict`: is zero outside of it?"""
    differences = (np.asarray(a) - np.asarray(b)).tolist()
    seed_means = _means_by_seed(differences, seeds)
    mean = statistics.paired_difference(a, b, topics) if bounded else statistics.mean(differences, topics)
    low, high = _widen(mean.interval, seed_means)
    verdict = "a higher" if low > 0 else "b higher" if high < 0 else "not distinguishable"
    return {
        "value": float(np.mean(differences)), "n": len(differences), "topics": len(set(topics)),
        "interval": [low, high], "verdict": verdict, "seeds": seed_means,
    }  # fmt: skip


def _means_by_seed(values: Sequence[float], seeds: Sequence[int]) -> list[float]:
    column, seed_of_row = np.asarray(values, dtype=float), np.asarray(seeds)
    return [float(column[seed_of_row == seed].mean()) for seed in sorted(set(seeds))]


def _widen(interval: tuple[float, float], seed_means: Sequence[float]) -> tuple[float, float]:
    """The interval widened to that of Student's t over the seeds' means, if there are several seeds."""
    if len(seed_means) < 2:
        return interval
    low, high = statistics.mean(seed_means).interval
    return min(low, interval[0]), max(high, interval[1])


# Questions that are answered by arithmetic on votes.


@dataclass(frozen=True)
class Pool:
    """Held-out pairs of all seeds of which one response is better. All arrays have a row a pair."""

    ids: Sequence[str]
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    truth: Floats
    """1 if *a* is better, else 0."""
    longer: Floats
    """Words of *a* minus words of *b*."""
    topics: Sequence[str]
    seeds: Sequence[int]

    def label(self, votes: Floats, *, temperature: float | None = TEMPERATURE, abstain_below: float = 0.0) -> Floats:
        """Log-odds of each pair's label."""
        weights = np.array([WEIGHTS[id] for id in self.principles])
        return aggregate_votes(votes, weights, temperature=temperature, abstain_below=abstain_below)

    def right(self, log_odds: Floats) -> Floats:
        """1 if a label is for the better response, 0 if not, 0.5 if it is even."""
        return confidence_and_correctness(log_odds, self.truth)[1]

    def error(self, log_odds: Floats) -> Floats:
        """Squared error of each label's probability."""
        return np.asarray((sigmoid(log_odds) - self.truth) ** 2)

    def estimate(self, values: Floats, among: Bools | None = None) -> dict[str, Any]:
        """Mean over the pairs, or those in `among`."""
        at = np.flatnonzero(np.ones(len(values), dtype=bool) if among is None else among).tolist()
        return estimate(values[at].tolist(), [self.topics[i] for i in at], [self.seeds[i] for i in at])

    def difference(self, a: Floats, b: Floats, among: Bools | None = None) -> dict[str, Any]:
        """Mean difference over the pairs, or those in `among`."""
        at = np.flatnonzero(np.ones(len(a), dtype=bool) if among is None else among).tolist()
        return difference(a[at].tolist(), b[at].tolist(), [self.topics[i] for i in at], [self.seeds[i] for i in at])


def pool_worlds(worlds: Sequence[World]) -> Pool:
    """The decided held-out pairs of all seeds."""
    chosen = [(world, i) for world in worlds for i in np.flatnonzero(world.held_out & world.decided).tolist()]
    rows = [world.rows[i] for world, i in chosen]
    return Pool(
        [row["id"] for row in rows],
        worlds[0].principles,
        np.array([world.ab[i] for world, i in chosen]),
        np.array([world.ba[i] for world, i in chosen]),
        np.array([float(world.gold[i] > 0) for world, i in chosen]),
        np.array([float(n_words(row["a"]["text"]) - n_words(row["b"]["text"])) for row in rows]),
        [topic_of(row["tags"], row["prompt_id"]) for row in rows],
        [world.seed for world, _ in chosen],
    )


def tier1(pool: Pool) -> dict[str, Any]:
    """Labels of all principles in both orders: accuracy, calibration, order effects and length bias."""
    votes = mean_over_orders(pool.ab, pool.ba)
    log_odds = pool.label(votes)
    measured = measure_calibration(log_odds.tolist(), pool.truth.tolist(), pool.topics)
    flips = (pool.label(pool.ab) * pool.label(pool.ba) < 0).astype(float)
    voted = ~np.isnan(votes)
    decided = voted & (np.abs(votes) >= DECIDED)
    is_turned = (pool.ab * pool.ba < 0).astype(float)
    different = pool.longer != 0
    return measured | {
        "accuracy": pool.estimate(pool.right(log_odds)),
        "flip_rate": pool.estimate(flips),
        "flip_rate_of_votes": _over_votes(pool, is_turned, voted),
        "flip_rate_of_decided_votes": _over_votes(pool, is_turned, decided),
        "position_bias": _over_votes(pool, (pool.ab - pool.ba) / 2, voted, bounded=False),
        "prefers_longer": pool.estimate((log_odds * pool.longer > 0).astype(float), different),
        "longer_is_better": pool.estimate(((pool.truth - 0.5) * pool.longer > 0).astype(float), different),
    }


def _over_votes(pool: Pool, values: Floats, among: Bools, bounded: bool = True) -> dict[str, Any]:
    pair = np.nonzero(among)[0].tolist()
    return estimate(values[among].tolist(), [pool.topics[i] for i in pair], [pool.seeds[i] for i in pair], bounded)


def by_principles(pool: Pool) -> dict[str, Any]:
    """Labels of k principles sampled for each pair: accuracy, confidence, and how much better all are."""
    votes = mean_over_orders(pool.ab, pool.ba)
    all_log_odds = pool.label(votes)
    figures = {}
    for k in (*N_PRINCIPLES, None):
        kept_votes = np.full_like(votes, np.nan)
        for seed in sorted(set(pool.seeds)):
            at = [i for i, pair_seed in enumerate(pool.seeds) if pair_seed == seed]
            kept_votes[at] = keep_sampled_principles([pool.ids[i] for i in at], pool.principles, votes[at], k, seed)
        log_odds = pool.label(kept_votes)
        figures[str(k or "all")] = {
            "accuracy": pool.estimate(pool.right(log_odds)),
            "confidence": pool.estimate(sigmoid(np.abs(log_odds))),
            "brier": pool.estimate(pool.error(log_odds)),
            "all_less_these": pool.difference(pool.right(all_log_odds), pool.right(log_odds)),
        }
    return figures


def by_orders(pool: Pool) -> dict[str, Any]:
    """Labels from one order, averaged probabilities and averaged log-odds, without and with a position bias."""
    bias = {order: position_bias(pool.ids, pool.principles, order) for order in ("ab", "ba")}
    no_bias = np.zeros_like(pool.ab)
    figures = {}
    for name, (in_ab, in_ba) in {
        "none": (no_bias, no_bias), "same": (bias["ab"], bias["ab"]), "anew": (bias["ab"], bias["ba"]),
    }.items():  # fmt: skip
        ab, ba = pool.ab + in_ab, pool.ba - in_ba
        log_odds = {way: pool.label(votes) for way, votes in average_orders(ab, ba).items()}
        right = {way: pool.right(own) for way, own in log_odds.items()}
        error = {way: pool.error(own) for way, own in log_odds.items()}
        figures[name] = {
            way: {
                "accuracy": pool.estimate(right[way]),
                "brier": pool.estimate(error[way]),
                "ece": measure_calibration(log_odds[way].tolist(), pool.truth.tolist(), pool.topics)["ece"],
            }
            for way in log_odds
        } | {
            "differences": {
                f"{a} - {b}": {
                    "accuracy": pool.difference(right[a], right[b]), "brier": pool.difference(error[a], error[b]),
                }
                for a, b in (("log-odds", "one order"), ("log-odds", "probability"), ("probability", "one order"))
            }
        }  # fmt: skip
    return figures


def average_orders(ab: Floats, ba: Floats) -> dict[str, Floats]:
    """Log-odds of order ab alone, and of both orders by the mean of probabilities and of log-odds; shapes as passed.

    σ(x) + σ(y) > 1 if x + y > 0, so that for a single principle both means have the same sign. They differ in size,
    and therefore in the sign of the sum over several principles.
    """
    p = np.clip((sigmoid(ab) + sigmoid(ba)) / 2, 1e-12, 1 - 1e-12)
    return {"one order": ab, "probability": np.log(p) - np.log1p(-p), "log-odds": mean_over_orders(ab, ba)}


def by_abstention(pool: Pool) -> dict[str, Any]:
    """Accuracy and coverage if weak votes abstain, and if pairs that are near to even are dropped."""
    votes = mean_over_orders(pool.ab, pool.ba)
    all_log_odds = pool.label(votes)
    p_label = sigmoid(np.abs(all_log_odds))
    figures: dict[str, Any] = {"abstain_below": {}, "min_confidence": {}}
    for nats in ABSTAIN:
        log_odds = pool.label(votes, abstain_below=nats)
        labelled = ~np.isnan(log_odds)
        right = pool.right(np.nan_to_num(log_odds))
        figures["abstain_below"][f"{nats:.3g}"] = {
            "coverage": pool.estimate(labelled.astype(float)),
            "accuracy": pool.estimate(right, labelled),
            "less_without": pool.difference(right, pool.right(all_log_odds), labelled),
        }
    for threshold in CONFIDENT:
        is_kept = p_label >= threshold
        figures["min_confidence"][f"{threshold:.3g}"] = {
            "coverage": pool.estimate(is_kept.astype(float)),
            "accuracy": pool.estimate(pool.right(all_log_odds), is_kept),
            "accuracy_of_dropped": pool.estimate(pool.right(all_log_odds), ~is_kept) if not is_kept.all() else None,
        }
    return figures


# Questions that are answered by training.

Trained = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""By seed and name of the cell, what `train` returned."""
Key = tuple[int, str]
"""(seed, id of a pair or prompt)."""


class Rewards:
    """Accuracy of each cell's reward model on held-out pairs."""

    def __init__(self, worlds: Sequence[World], trained: Trained) -> None:
        self.topics = {
            (world.seed, stable_id("labels", row["id"])): topic_of(row["tags"], row["prompt_id"])
            for world in worlds
            for row in world.rows
        }
        self.trained = trained

    def right(self, cell: str) -> dict[Key, float]:
        return {
            (seed, id): value for seed, of_seed in self.trained.items() for id, value in of_seed[cell]["right"].items()
        }

    def accuracy(self, cell: str) -> dict[str, Any]:
        """Also has the number of pairs that each seed learned from."""
        return estimate_by_key(self.right(cell), self.topics) | {
            "examples": [of_seed[cell]["examples"] for of_seed in self.trained.values()]
        }

    def difference(self, a: str, b: str) -> dict[str, Any]:
        return difference_by_key(self.right(a), self.right(b), self.topics)


def estimate_by_key(values: Mapping[Key, float], topics: Mapping[Key, str], bounded: bool = True) -> dict[str, Any]:
    """`estimate` of values by key."""
    return estimate(list(values.values()), [topics[key] for key in values], [seed for seed, _ in values], bounded)


def difference_by_key(
    a: Mapping[Key, float], b: Mapping[Key, float], topics: Mapping[Key, str], bounded: bool = True
) -> dict[str, Any]:
    """`difference` over the keys that both have."""
    shared_keys = [key for key in a if key in b]
    return difference(
        [a[key] for key in shared_keys], [b[key] for key in shared_keys], [topics[key] for key in shared_keys],
        [seed for seed, _ in shared_keys], bounded,
    )  # fmt: skip


def by_labels(rewards: Rewards, policies: Trained, prompts: Mapping[int, Sequence[Prompt]]) -> dict[str, Any]:
    """Reward model and policy of each kind of label, and their differences from those of soft labels."""
    topics = {
        (seed, prompt["id"]): topic_of(prompt["tags"], prompt["id"])
        for seed, of_seed in prompts.items()
        for prompt in of_seed
    }

    def values(name: str, metric: str) -> dict[Key, float]:
        return {
            (seed, id): value
            for seed, of_seed in policies.items()
            for id, value in of_seed[name]["rates"][metric].items()
        }

    names = {"base": "base"} | {name: f"policy {name}" for name in KINDS}
    return {
        "reward": {name: rewards.accuracy(f"reward {name}") for name in KINDS},
        "reward_less_soft": {name: rewards.difference(f"reward {name}", "reward soft") for name in [*KINDS][1:]},
        "policy": {
            name: {metric: estimate_by_key(values(cell, metric), topics, metric != "gold") for metric in POLICY_METRICS}
            for name, cell in names.items()
        },
        "policy_less_soft": {
            name: {
                metric: difference_by_key(
                    values(cell, metric), values("policy soft", metric), topics, metric != "gold"
                )
                for metric in POLICY_METRICS
            }
            for name, cell in names.items()
            if name != "soft"
        },
    }  # fmt: skip


def by_noise(rewards: Rewards, sizes: Sizes) -> dict[str, Any]:
    """Reward models by share of pairs and of flipped labels, and differences from all pairs, none flipped."""
    return {
        f"{share:g}": {
            f"{flipped:g}": rewards.accuracy(noisy_cell_name(share, flipped))
            | {"less_clean": rewards.difference(noisy_cell_name(share, flipped), "reward soft")}
            for flipped in sizes.flips
        }
        for share in sizes.shares
    }


def noise_for_pairs(rewards: Rewards, sizes: Sizes) -> list[dict[str, Any]]:
    """All pairs with flipped labels minus fewer pairs with none: what noise costs, in pairs."""
    return [
        {
            "flipped": flipped,
            "share": share,
            **rewards.difference(noisy_cell_name(1.0, flipped), noisy_cell_name(share, 0.0)),
        }
        for flipped in sizes.flips
        for share in sizes.shares
        if flipped > 0 and share < 1
    ]


# The whole study.


def run_seed(
    seed: int, sizes: Sizes, folder: Path, progress: Progress
) -> tuple[World, list[Prompt], dict[str, dict[str, Any]]]:
    """Samples, judges and trains; what exists from an earlier run is reused."""
    from cai.micro.conversations import prompts

    profile = load_profile()
    prepare(profile)
    world = sample_world(seed, sizes, folder)
    held_out_prompts = prompts(SPLIT, limit=sizes.heldout, seed=seed)
    trained = {"base": {"rates": read_responses(held_out_prompts, _responses(folder / f"seed-{seed}"))}}
    for cell in cells(sizes):
        key = stable_id(world.digest, asdict(cell), TRAIN[cell.kind], SAMPLING)
        path = folder / f"seed-{seed}" / "cells" / f"{cell.name.replace(' ', '-').replace(',', '')}-{key}.json"
        figures = read_json(path)
        if figures is None:
            path.parent.mkdir(exist_ok=True)
            start, cpu_start = time.monotonic(), time.process_time()
            figures = train(cell, world, held_out_prompts, path.with_suffix(""), profile)
            figures |= {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu_start}
            write_json(path, figures)
            progress.note_trained(f"seed {seed}, {cell.name}", figures["seconds"])
        else:
            progress.note_reused()
        trained[cell.name] = figures
    return world, held_out_prompts, trained


class Progress:
    """Prints on stderr what was trained and about how long the remaining trainings will take."""

    def __init__(self, total: int) -> None:
        self.n_remaining, self.n_trained, self.seconds = total, 0, 0.0

    def note_reused(self) -> None:
        """A training is reused from an earlier run."""
        self.n_remaining -= 1

    def note_trained(self, cell_name: str, seconds: float) -> None:
        """A training has ended."""
        self.n_remaining -= 1
        self.n_trained += 1
        self.seconds += seconds
        estimate = duration(self.seconds / self.n_trained * self.n_remaining)
        remaining = f"{self.n_remaining} left, about {estimate}" if self.n_remaining else "the last one"
        print(f"{cell_name}: {duration(seconds)}; {remaining}", file=sys.stderr, flush=True)


def _responses(run: Path) -> list[dict[str, Any]]:
    with (latest(run)["responses"] / RECORDS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def measure(seeds: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """All figures, with progress on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(seeds * len(cells(sizes)))
    worlds, prompts, trained = [], {}, {}
    for seed in range(seeds):
        world, prompts[seed], trained[seed] = run_seed(seed, sizes, folder, progress)
        worlds.append(world)
    pool, rewards = pool_worlds(worlds), Rewards(worlds, trained)
    orders = by_orders(pool)
    ours, plain = (orders["same"][way]["accuracy"]["value"] for way in ("log-odds", "one order"))
    principles = by_principles(pool)
    for k, cell in (("1", "reward of 1"), ("3", "reward of 3"), ("all", "reward soft")):
        principles[k] |= {
            "reward": rewards.accuracy(cell),
            "reward_all_less_these": rewards.difference("reward soft", cell),
        }
    return {
        "bench": "labels",
        "ours": ours,
        "plain": plain,
        "unit": "accuracy of labels under a position bias: log-odds averaged over both orders, against one order",
        "ratio": ours / plain,
        **tier1(pool),
        "labels": by_labels(rewards, trained, prompts),
        "principles": principles,
        "orders": orders,
        "noise": by_noise(rewards, sizes),
        "noise_for_pairs": noise_for_pairs(rewards, sizes),
        "abstention": by_abstention(pool),
        "train": TRAIN,
        **surroundings(worlds, pool, seeds, sizes),
        "cpu_seconds": sum(cell.get("cpu_seconds", 0.0) for of_seed in trained.values() for cell in of_seed.values()),
    }


def surroundings(worlds: Sequence[World], pool: Pool, seeds: int, sizes: Sizes) -> dict[str, Any]:
    """Sizes, versions and hardware."""
    return {
        "sizes": {
            "seeds": seeds,
            **asdict(sizes),
            "pairs": [int(world.held_out.sum()) for world in worlds],
            "pairs_with_a_better_one": [pool.seeds.count(seed) for seed in range(seeds)],
            "ties": [int((world.held_out & (world.gold == 0)).sum()) for world in worlds],
            "unclear": [int((world.held_out & np.isnan(world.gold)).sum()) for world in worlds],
            "pairs_learned": [int((~world.held_out).sum()) for world in worlds],
        },
        "versions": measurement.versions(("numpy", *PACKAGES)),
        "hardware": measurement.hardware(),
    }


def main() -> None:
    parser = measurement.argument_parser(__doc__, quick="small sizes and one seed: does it work at all", clock=False)
    parser.add_argument("--seeds", type=int, help="number of seeds; 5, or 1 with --quick")
    parser.add_argument("--runs", type=Path, help="folder of runs and results; runs/labels, or runs/labels-quick")
    parser.add_argument(
        "--page", type=Path, help="write this page and its figures from stored results, and run nothing"
    )
    arguments = parser.parse_args()
    folder = arguments.runs or Path("runs/labels-quick" if arguments.quick else "runs/labels")
    if arguments.page is None:
        seeds = arguments.seeds or (1 if arguments.quick else 5)
        results = measure(seeds, QUICK if arguments.quick else FULL, folder) | {"quick": arguments.quick}
        write_json(folder / RESULTS, results)
    else:
        from studies.findings_page import write_page

        stored = read_json(folder / RESULTS)
        if stored is None:
            sys.exit(f"{folder / RESULTS}: no such file; run without --page first")
        results = stored
        write_page(results, arguments.page)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
