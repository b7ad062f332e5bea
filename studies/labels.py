"""What the labelling machinery does, on the embedded model, whose world knows which response is better.

Every seed samples responses of the base model to prompts of split `train` and of tier 1 (split `test`), has every
principle vote on pairs of them in both orders, once, by a recipe of its own; everything else is made of these votes:

1. labels soft, hard or clamped -> reward model and policy (Bai et al. 2022, arXiv 2212.08073, section 4),
2. one principle drawn for each pair, several, or all -> labels and reward model (the same),
3. one order or both, and what is averaged, under a position bias (Lee et al. 2023, arXiv 2309.00267),
4. flipped labels against the number of pairs -> reward model,
5. principles that abstain and pairs that are dropped -> accuracy against coverage.

Questions 2, 3, 5 and calibration are arithmetic on votes. Training of reward models and policies is short, with one
setting for all labels, chosen on split `validation` for soft ones. Truth is the oracle's: pairs that it scores alike or
cannot read have none and are left out.

An estimate has two intervals of 95 %: rows of all seeds clustered by topic, and Student's t over the seeds' own values,
which alone knows how much training varies. What is reported covers both, and a difference counts where it is without
zero. Left out: corrections for the number of comparisons, votes after reasons, PPO.

    OMP_NUM_THREADS=1 python benchmarks/labels.py                   # five seeds; goes on where it was stopped
    python benchmarks/labels.py --quick                             # small, no result to quote
    python benchmarks/labels.py --page docs/findings.md             # page and figures from results, runs nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _measure
import numpy as np

from cai.contracts.context import Context
from cai.contracts.profile import Profile, load_profile
from cai.feedback import calibration
from cai.feedback.explain import DECIDED
from cai.feedback.labels import Bools, Floats, aggregate, by_order, probability
from cai.feedback.votes import read_votes
from cai.maths import statistics
from cai.maths.behaviours import n_words
from cai.micro.world_principles import WEIGHTS
from cai.run.pipeline import PACKAGES, Options, prepare, run_recipe
from cai.run.recipe import load_recipe
from cai.stages import config_class, run_function
from cai.stages.prefer import Clamp, labels, prefers_a, to_row
from cai.storage.files import read_json, remove, write_json
from cai.storage.journal import RECORDS, Journal
from cai.storage.rows import HELD_OUT, Preference, Prompt, row_lines, stable_id, stable_seed, topic_of
from cai.storage.run_folder import finished, latest
from cai.text.progress import PlainDisplay, StageLine, duration

RESULTS = "results.json"
SPLIT = "test"
"""What is held out: tier 1."""
SAMPLING = {"max_new_tokens": 80, "top_p": 0.95}
"""The base model's last five percent are slips of the tongue."""
TEMPERATURE = 1.0
"""What sums of weighted log-odds are divided by, as in the quickstart; None divides by the sum of weights."""
DRAWN = (1, 2, 3, 5)
"""Principles drawn for a pair, beside all."""
BIAS = (2.0, 1.0)
"""Mean and standard deviation of the position bias, in nats."""
ABSTAIN = (0.0, 0.05, 0.1, 0.2, DECIDED, 0.8, 1.2)
"""Nats below which a principle has no say; the fifth is 60 %."""
CONFIDENT = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Probabilities below which a pair is dropped."""
TRAIN: Mapping[str, dict[str, Any]] = {
    "reward": {"batch_size": 16, "train": {"learning_rate": 1e-3, "save_strategy": "no"}},
    "dpo": {"batch_size": 16, "train": {"learning_rate": 6e-4, "beta": 0.2, "save_strategy": "no"}},
}
"""One epoch, for all labels alike. Rates chosen on split `validation` for soft labels, of 5e-4, 1e-3, 2e-3 by accuracy
and of 5e-5, 1e-4, 3e-4, 6e-4 by gold score."""


@dataclass(frozen=True)
class Sizes:
    """How much a seed samples and trains."""

    learned: int
    """Prompts of split `train`."""
    heldout: int
    """Prompts of tier 1."""
    responses: int = 4
    """For each prompt, so that half as many pairs come of it."""
    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Of the pairs to learn from, in question 4."""
    flips: tuple[float, ...] = (0.0, 0.15, 0.3)
    """Share of labels turned round, in question 4."""


FULL = Sizes(learned=300, heldout=320)
QUICK = Sizes(learned=11, heldout=16, shares=(0.5, 1.0), flips=(0.0, 0.3))


@dataclass(frozen=True)
class Cell:
    """One training: how its labels are made of the votes."""

    name: str
    kind: str
    """reward or dpo."""
    labels: str = "soft"
    temperature: float | None = TEMPERATURE
    principles: int | None = None
    """Drawn for each pair; None = all."""
    share: float = 1.0
    flipped: float = 0.0


KINDS: Mapping[str, dict[str, Any]] = {
    "soft": {},
    "soft, mean": {"temperature": None},
    "hard": {"labels": "hard"},
    "clamped": {"labels": "clamped"},
}
"""Labels of question 1. The mean over principles, `prefer`'s default, is far from certain on this judge."""


def cells(sizes: Sizes) -> list[Cell]:
    """Every training of one seed. All cells are trained with the same draws, those with the same pairs in one order."""
    found = [Cell(f"reward {name}", "reward", **how) for name, how in KINDS.items()]
    found += [Cell(f"reward of {k}", "reward", principles=k) for k in (1, 3)]
    found += [
        Cell(noisy(share, flipped), "reward", share=share, flipped=flipped)
        for share in sizes.shares
        for flipped in sizes.flips
        if (share, flipped) != (1.0, 0.0)
    ]
    return found + [Cell(f"policy {name}", "dpo", **how) for name, how in KINDS.items()]


def noisy(share: float, flipped: float) -> str:
    """The cell with that share of pairs and of flipped labels."""
    return "reward soft" if (share, flipped) == (1.0, 0.0) else f"reward {share:g} of pairs, {flipped:g} flipped"


# What one seed samples and is told.


@dataclass(frozen=True)
class World:
    """One seed's pairs and votes. `ab` and `ba` are (pairs, principles), NaN = none; `gold` (pairs,) is the oracle's
    score of *a* less that of *b*, NaN where it cannot read one."""

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
        """Of the principles, (principles,)."""
        return np.array([WEIGHTS[id] for id in self.principles])

    @property
    def decided(self) -> Bools:
        """Pairs of which one response is the better one."""
        return np.asarray(~np.isnan(self.gold) & (self.gold != 0))


def sampled(seed: int, sizes: Sizes, folder: Path) -> World:
    """Samples and judges by a recipe, reused where it ran before."""
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
    """The votes of a run that is done, with the oracle's scores."""
    from cai.micro.oracle import gold_score

    done = finished(latest(run)["votes"])
    assert done is not None
    read = read_votes([done.folder / RECORDS])
    rows = list(read.rows())
    ab, ba = by_order(read.vote_columns, len(rows), len(read.principles))
    scores = np.array([[gold_score(row["prompt"], row[side]["text"]) for side in "ab"] for row in rows], dtype=float)
    held_out = np.array([HELD_OUT in row["tags"] for row in rows])
    return World(seed, done.digest, rows, read.principles, ab, ba, scores[:, 0] - scores[:, 1], held_out)


def draw_principles(ids: Sequence[str], principles: Sequence[str], votes: Floats, k: int | None, seed: int) -> Floats:
    """`votes` (pairs, principles) with those of k principles kept, drawn for each pair among those that voted on it.

    The draws are nested: what is asked with k is asked with k + 1. None keeps all.
    """
    if k is None:
        return votes
    draws = np.array([[stable_seed("drawn", seed, id, each) for each in principles] for id in ids], dtype=float)
    rank = np.argsort(np.argsort(np.where(np.isnan(votes), np.inf, draws), axis=1), axis=1)
    return np.where(rank < k, votes, np.nan)


def position_bias(ids: Sequence[str], principles: Sequence[str], draw: str) -> Floats:
    """Nats by which a judge favours what it is shown first, (pairs, principles), by hash of pair and principle."""
    mean, deviation = BIAS
    normal = [
        [np.random.default_rng(stable_seed("bias", draw, id, each)).standard_normal() for each in principles]
        for id in ids
    ]
    return mean + deviation * np.array(normal)


def first(ids: Sequence[str], share: float, *parts: object) -> Bools:
    """Which of the pairs are in that share of them; a larger share holds a smaller one."""
    chosen = sorted(range(len(ids)), key=lambda i: stable_seed(*parts, ids[i]))[: round(share * len(ids))]
    found = np.zeros(len(ids), dtype=bool)
    found[chosen] = True
    return found


# What is trained on it.


def preferences(world: World, cell: Cell) -> list[Preference]:
    """What a cell learns from, and for a reward model the held-out pairs with a known truth."""
    ids = [row["id"] for row in world.rows]
    votes = draw_principles(ids, world.principles, (world.ab + world.ba) / 2, cell.principles, world.seed)
    log_odds = aggregate(votes, world.weights, temperature=cell.temperature)
    learned = np.flatnonzero(~world.held_out)
    learned = learned[first([ids[i] for i in learned], cell.share, "share", world.seed)]
    rows = _labelled(world, learned.tolist(), log_odds, cell.labels)
    turned = first([row["pair_id"] for row in rows], cell.flipped, "flipped", world.seed)
    rows = [flip(row) if turn else row for row, turn in zip(rows, turned.tolist(), strict=True)]
    if cell.kind == "reward":
        rows += _labelled(world, np.flatnonzero(world.held_out & world.decided).tolist(), log_odds, "soft")
    return rows


def _labelled(world: World, pairs: Sequence[int], log_odds: Floats, kind: str) -> list[Preference]:
    how = Clamp(clamp=(0.4, 0.6)) if kind == "clamped" else kind
    return [
        to_row(
            world.rows[i],
            prefers_a(world.rows[i], log_odds[i]),
            float(labels(np.abs(log_odds[i : i + 1]), how)[0]),
            float(abs(log_odds[i])),
            "labels",
        )
        for i in pairs
    ]


def flip(row: Preference) -> Preference:
    """The pair with its label turned round."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def train(cell: Cell, world: World, prompts: Sequence[Prompt], folder: Path, profile: Profile) -> dict[str, Any]:
    """Trains one cell and measures what came of it, row by row. The model is not kept."""
    rows = preferences(world, cell)
    remove(folder)
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / RECORDS).write_text("".join(row_lines(rows)), encoding="utf-8")
    stage = "reward" if cell.kind == "reward" else "policy"
    context = _context(stage, folder, world.seed, profile, inputs={"labels": folder / "labels"})
    config = config_class(cell.kind).model_validate(
        {"id": stage, "kind": cell.kind, "from": "labels"} | TRAIN[cell.kind]
    )
    run_function(cell.kind)(config, context)
    found = _scored(folder) if cell.kind == "reward" else _answered(folder, world.seed, prompts, profile)
    remove(folder)
    return {"examples": sum(HELD_OUT not in row["tags"] for row in rows)} | found


def _context(stage: str, folder: Path, seed: int, profile: Profile, **more: Any) -> Context:
    """What a stage is given that starts from the embedded model, outside of any run."""
    from cai.engines import open_engine
    from cai.models.reference import resolve

    line = StageLine(stage)
    given: dict[str, Any] = {
        "inputs": {},
        "prompt_sets": {},
        "models": {"": resolve("micro", folder=folder)},
        "open_engine": open_engine,
    }
    return Context(stage, folder, seed, profile, line, Journal(folder, line), None, **given | more)


def _scored(folder: Path) -> dict[str, Any]:
    """Which held-out pairs the reward model put in the oracle's order, by id."""
    with (folder / "evaluation.jsonl").open(encoding="utf-8") as lines:
        scored = [json.loads(line) for line in lines]
    return {"right": {row["id"]: float(row["margin"] * row["gold_margin"] > 0) for row in scored}}


def _answered(folder: Path, seed: int, prompts: Sequence[Prompt], profile: Profile) -> dict[str, Any]:
    """What the policy does on held-out prompts."""
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
        return {"rates": readings(prompts, [json.loads(line) for line in lines])}


def readings(prompts: Sequence[Prompt], samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Each rate of a comparison, and the gold score, by prompt: means over the prompt's responses.

    A response that the oracle cannot read counts against the model in every rate and has no gold score.
    """
    from cai.micro.oracle import gold_score
    from cai.report.figures import ComparisonRows, rate_columns

    known = {prompt["id"]: prompt for prompt in prompts}
    numbered = {
        ("it", row["prompt_id"], number): row for number, row in enumerate(samples) if row["prompt_id"] in known
    }
    columns = rate_columns(ComparisonRows(known, numbered, {}), "it")
    scores = {key[1:]: gold_score(row["prompt"], row["response"]) for key, row in numbered.items()}
    columns["gold"] = {key: score for key, score in scores.items() if score is not None}
    found: dict[str, dict[str, float]] = {}
    for metric in POLICY:
        values: dict[str, list[float]] = {}
        for (prompt_id, _), value in columns[metric].items():
            values.setdefault(prompt_id, []).append(value)
        found[metric] = {prompt_id: float(np.mean(each)) for prompt_id, each in values.items()}
    return found


POLICY = ("harmful_compliance", "helpfulness", "over_refusal", "well_formed", "gold")
"""What is said of a policy."""


# Estimates over seeds and topics.


def estimate(
    values: Sequence[float], topics: Sequence[str], seeds: Sequence[int], bounded: bool = True
) -> dict[str, Any]:
    """A mean with the interval that covers both the one clustered by topic and the one over seeds."""
    found = (statistics.rate if bounded else statistics.mean)(values, topics)
    own = _by_seed(values, seeds)
    low, high = _hull(found.interval, own)
    interval = [max(low, 0.0), min(high, 1.0)] if bounded else [low, high]
    return found.as_json() | {"interval": interval, "seeds": own}


def difference(
    a: Sequence[float], b: Sequence[float], topics: Sequence[str], seeds: Sequence[int], bounded: bool = True
) -> dict[str, Any]:
    """a - b over the same rows, with such an interval. `verdict` is a or b where zero is outside of it."""
    apart = (np.asarray(a) - np.asarray(b)).tolist()
    own = _by_seed(apart, seeds)
    found = statistics.paired_difference(a, b, topics) if bounded else statistics.mean(apart, topics)
    low, high = _hull(found.interval, own)
    verdict = "a higher" if low > 0 else "b higher" if high < 0 else "not distinguishable"
    return {"value": float(np.mean(apart)), "n": len(apart), "topics": len(set(topics)), "interval": [low, high],
            "verdict": verdict, "seeds": own}  # fmt: skip


def _by_seed(values: Sequence[float], seeds: Sequence[int]) -> list[float]:
    column, of = np.asarray(values, dtype=float), np.asarray(seeds)
    return [float(column[of == seed].mean()) for seed in sorted(set(seeds))]


def _hull(interval: tuple[float, float], own: Sequence[float]) -> tuple[float, float]:
    """The interval widened to Student's t over the seeds' own values, where there are several."""
    if len(own) < 2:
        return interval
    low, high = statistics.mean(own).interval
    return min(low, interval[0]), max(high, interval[1])


# The questions that votes answer.


@dataclass(frozen=True)
class Pool:
    """Held-out pairs of all seeds, those of which one response is the better one. Arrays are by pair."""

    ids: Sequence[str]
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    truth: Floats
    """1 where *a* is better, else 0."""
    longer: Floats
    """Words of *a* less those of *b*."""
    topics: Sequence[str]
    seeds: Sequence[int]

    def label(self, votes: Floats, *, temperature: float | None = TEMPERATURE, abstain_below: float = 0.0) -> Floats:
        """Log-odds of each pair's label."""
        weights = np.array([WEIGHTS[id] for id in self.principles])
        return aggregate(votes, weights, temperature=temperature, abstain_below=abstain_below)

    def right(self, log_odds: Floats) -> Floats:
        """How far the side of each label is the better one; an even label is half right."""
        return calibration.confidence(log_odds, self.truth)[1]

    def error(self, log_odds: Floats) -> Floats:
        """Squared error of each label's probability."""
        return np.asarray((probability(log_odds) - self.truth) ** 2)

    def estimate(self, values: Floats, among: Bools | None = None) -> dict[str, Any]:
        """Of the pairs, or some of them."""
        at = np.flatnonzero(np.ones(len(values), dtype=bool) if among is None else among).tolist()
        return estimate(values[at].tolist(), [self.topics[i] for i in at], [self.seeds[i] for i in at])

    def difference(self, a: Floats, b: Floats, among: Bools | None = None) -> dict[str, Any]:
        """The same pairs, labelled in two ways."""
        at = np.flatnonzero(np.ones(len(a), dtype=bool) if among is None else among).tolist()
        return difference(a[at].tolist(), b[at].tolist(), [self.topics[i] for i in at], [self.seeds[i] for i in at])


def pooled(worlds: Sequence[World]) -> Pool:
    """The held-out pairs with a known truth."""
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
    """The labels of all principles in both orders: accuracy, calibration, flips, length."""
    votes = (pool.ab + pool.ba) / 2
    log_odds = pool.label(votes)
    measured = calibration.measured(log_odds.tolist(), pool.truth.tolist(), pool.topics)
    flips = (pool.label(pool.ab) * pool.label(pool.ba) < 0).astype(float)
    voted = ~np.isnan(votes)
    decided = voted & (np.abs(votes) >= DECIDED)
    turned = (pool.ab * pool.ba < 0).astype(float)
    different = pool.longer != 0
    return measured | {
        "accuracy": pool.estimate(pool.right(log_odds)),
        "flip_rate": pool.estimate(flips),
        "flip_rate_of_votes": _over_votes(pool, turned, voted),
        "flip_rate_of_decided_votes": _over_votes(pool, turned, decided),
        "position_bias": _over_votes(pool, (pool.ab - pool.ba) / 2, voted, bounded=False),
        "prefers_longer": pool.estimate((log_odds * pool.longer > 0).astype(float), different),
        "longer_is_better": pool.estimate(((pool.truth - 0.5) * pool.longer > 0).astype(float), different),
    }


def _over_votes(pool: Pool, values: Floats, among: Bools, bounded: bool = True) -> dict[str, Any]:
    pair = np.nonzero(among)[0].tolist()
    return estimate(values[among].tolist(), [pool.topics[i] for i in pair], [pool.seeds[i] for i in pair], bounded)


def by_principles(pool: Pool) -> dict[str, Any]:
    """Labels of k principles drawn for each pair: accuracy, confidence, and how much all are better."""
    votes = (pool.ab + pool.ba) / 2
    everything = pool.label(votes)
    found = {}
    for k in (*DRAWN, None):
        kept = np.full_like(votes, np.nan)
        for seed in sorted(set(pool.seeds)):
            at = [i for i, each in enumerate(pool.seeds) if each == seed]
            kept[at] = draw_principles([pool.ids[i] for i in at], pool.principles, votes[at], k, seed)
        log_odds = pool.label(kept)
        found[str(k or "all")] = {
            "accuracy": pool.estimate(pool.right(log_odds)),
            "confidence": pool.estimate(probability(np.abs(log_odds))),
            "brier": pool.estimate(pool.error(log_odds)),
            "all_less_these": pool.difference(pool.right(everything), pool.right(log_odds)),
        }
    return found


def by_orders(pool: Pool) -> dict[str, Any]:
    """Labels of one order, of averaged probabilities and of averaged log-odds, by a judge with and without a bias."""
    drawn = {draw: position_bias(pool.ids, pool.principles, draw) for draw in ("ab", "ba")}
    none = np.zeros_like(pool.ab)
    found = {}
    for name, (in_ab, in_ba) in {
        "none": (none, none), "same": (drawn["ab"], drawn["ab"]), "anew": (drawn["ab"], drawn["ba"]),
    }.items():  # fmt: skip
        ab, ba = pool.ab + in_ab, pool.ba - in_ba
        log_odds = {way: pool.label(votes) for way, votes in averaged(ab, ba).items()}
        right = {way: pool.right(each) for way, each in log_odds.items()}
        error = {way: pool.error(each) for way, each in log_odds.items()}
        found[name] = {
            way: {
                "accuracy": pool.estimate(right[way]),
                "brier": pool.estimate(error[way]),
                "ece": calibration.measured(log_odds[way].tolist(), pool.truth.tolist(), pool.topics)["ece"],
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
    return found


def averaged(ab: Floats, ba: Floats) -> dict[str, Floats]:
    """Votes of one order alone, and of both by the mean of what is named; as log-odds, shapes as given.

    σ(x) + σ(y) > 1 where x + y > 0: of a single principle both means are on the same side. What differs is how
    strongly, and so the side that several principles come to.
    """
    p = np.clip((probability(ab) + probability(ba)) / 2, 1e-12, 1 - 1e-12)
    return {"one order": ab, "probability": np.log(p) - np.log1p(-p), "log-odds": (ab + ba) / 2}


def by_abstention(pool: Pool) -> dict[str, Any]:
    """Accuracy and coverage where weak votes have no say, and where pairs that are near to even are dropped."""
    votes = (pool.ab + pool.ba) / 2
    everything = pool.label(votes)
    sure = probability(np.abs(everything))
    found: dict[str, Any] = {"abstain_below": {}, "min_confidence": {}}
    for nats in ABSTAIN:
        log_odds = pool.label(votes, abstain_below=nats)
        labelled = ~np.isnan(log_odds)
        right = pool.right(np.nan_to_num(log_odds))
        found["abstain_below"][f"{nats:.3g}"] = {
            "coverage": pool.estimate(labelled.astype(float)),
            "accuracy": pool.estimate(right, labelled),
            "less_without": pool.difference(right, pool.right(everything), labelled),
        }
    for least in CONFIDENT:
        kept = sure >= least
        found["min_confidence"][f"{least:.3g}"] = {
            "coverage": pool.estimate(kept.astype(float)),
            "accuracy": pool.estimate(pool.right(everything), kept),
            "accuracy_of_dropped": pool.estimate(pool.right(everything), ~kept) if not kept.all() else None,
        }
    return found


# The questions that training answers.

Trained = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Seed to cell to what `train` found."""
Key = tuple[int, str]
"""Seed, and pair or prompt."""


class Rewards:
    """Which held-out pairs the reward model of each cell puts in the right order."""

    def __init__(self, worlds: Sequence[World], trained: Trained) -> None:
        self.topics = {
            (world.seed, stable_id("labels", row["id"])): topic_of(row["tags"], row["prompt_id"])
            for world in worlds
            for row in world.rows
        }
        self.trained = trained

    def right(self, cell: str) -> dict[Key, float]:
        return {(seed, id): value for seed, own in self.trained.items() for id, value in own[cell]["right"].items()}

    def accuracy(self, cell: str) -> dict[str, Any]:
        """With how many pairs each seed learned from."""
        return over_keys(self.right(cell), self.topics) | {
            "examples": [own[cell]["examples"] for own in self.trained.values()]
        }

    def difference(self, a: str, b: str) -> dict[str, Any]:
        return between_keys(self.right(a), self.right(b), self.topics)


def over_keys(values: Mapping[Key, float], topics: Mapping[Key, str], bounded: bool = True) -> dict[str, Any]:
    """`estimate` of values that are named."""
    return estimate(list(values.values()), [topics[key] for key in values], [seed for seed, _ in values], bounded)


def between_keys(
    a: Mapping[Key, float], b: Mapping[Key, float], topics: Mapping[Key, str], bounded: bool = True
) -> dict[str, Any]:
    """`difference` over what both have a value of."""
    both = [key for key in a if key in b]
    return difference(
        [a[key] for key in both], [b[key] for key in both], [topics[key] for key in both],
        [seed for seed, _ in both], bounded,
    )  # fmt: skip


def by_labels(rewards: Rewards, policies: Trained, prompts: Mapping[int, Sequence[Prompt]]) -> dict[str, Any]:
    """Reward model and policy of each kind of label, and each less that of soft labels."""
    topics = {
        (seed, prompt["id"]): topic_of(prompt["tags"], prompt["id"]) for seed, own in prompts.items() for prompt in own
    }

    def values(name: str, metric: str) -> dict[Key, float]:
        return {(seed, id): value for seed, own in policies.items() for id, value in own[name]["rates"][metric].items()}

    names = {"base": "base"} | {name: f"policy {name}" for name in KINDS}
    return {
        "reward": {name: rewards.accuracy(f"reward {name}") for name in KINDS},
        "reward_less_soft": {name: rewards.difference(f"reward {name}", "reward soft") for name in [*KINDS][1:]},
        "policy": {
            name: {metric: over_keys(values(cell, metric), topics, metric != "gold") for metric in POLICY}
            for name, cell in names.items()
        },
        "policy_less_soft": {
            name: {
                metric: between_keys(
                    values(cell, metric), values("policy soft", metric), topics, metric != "gold"
                )
                for metric in POLICY
            }
            for name, cell in names.items()
            if name != "soft"
        },
    }  # fmt: skip


def by_noise(rewards: Rewards, sizes: Sizes) -> dict[str, Any]:
    """Reward models by share of pairs and of flipped labels, each less the one of all pairs, none flipped."""
    return {
        f"{share:g}": {
            f"{flipped:g}": rewards.accuracy(noisy(share, flipped))
            | {"less_clean": rewards.difference(noisy(share, flipped), "reward soft")}
            for flipped in sizes.flips
        }
        for share in sizes.shares
    }


def noise_for_pairs(rewards: Rewards, sizes: Sizes) -> list[dict[str, Any]]:
    """All pairs with flipped labels less fewer pairs with none: what noise is worth in pairs."""
    return [
        {"flipped": flipped, "share": share, **rewards.difference(noisy(1.0, flipped), noisy(share, 0.0))}
        for flipped in sizes.flips
        for share in sizes.shares
        if flipped > 0 and share < 1
    ]


# All of it.


def run_seed(
    seed: int, sizes: Sizes, folder: Path, progress: Progress
) -> tuple[World, list[Prompt], dict[str, dict[str, Any]]]:
    """Samples, judges and trains what is not done yet."""
    from cai.micro.conversations import prompts

    profile = load_profile()
    prepare(profile)
    world = sampled(seed, sizes, folder)
    asked = prompts(SPLIT, limit=sizes.heldout, seed=seed)
    found = {"base": {"rates": readings(asked, _responses(folder / f"seed-{seed}"))}}
    for cell in cells(sizes):
        key = stable_id(world.digest, asdict(cell), TRAIN[cell.kind], SAMPLING)
        path = folder / f"seed-{seed}" / "cells" / f"{cell.name.replace(' ', '-').replace(',', '')}-{key}.json"
        done = read_json(path)
        if done is None:
            path.parent.mkdir(exist_ok=True)
            began, before = time.monotonic(), time.process_time()
            done = train(cell, world, asked, path.with_suffix(""), profile)
            done |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - before}
            write_json(path, done)
            progress.trained(f"seed {seed}, {cell.name}", done["seconds"])
        else:
            progress.reused()
        found[cell.name] = done
    return world, asked, found


class Progress:
    """Says on stderr what was trained and about how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.left, self.n, self.seconds = total, 0, 0.0

    def reused(self) -> None:
        """One training was done before."""
        self.left -= 1

    def trained(self, what: str, seconds: float) -> None:
        """One is done now."""
        self.left -= 1
        self.n += 1
        self.seconds += seconds
        rest = self.seconds / self.n * self.left
        words = f"{self.left} left, about {duration(rest)}" if self.left else "the last one"
        print(f"{what}: {duration(seconds)}; {words}", file=sys.stderr, flush=True)


def _responses(run: Path) -> list[dict[str, Any]]:
    with (latest(run)["responses"] / RECORDS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def measure(seeds: int, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Every figure, with progress on stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(seeds * len(cells(sizes)))
    worlds, prompts, trained = [], {}, {}
    for seed in range(seeds):
        world, prompts[seed], trained[seed] = run_seed(seed, sizes, folder, progress)
        worlds.append(world)
    pool, rewards = pooled(worlds), Rewards(worlds, trained)
    orders, top = by_orders(pool), tier1(pool)
    ours, plain = (orders["same"][way]["accuracy"]["value"] for way in ("log-odds", "one order"))
    drawn = by_principles(pool)
    for k, cell in (("1", "reward of 1"), ("3", "reward of 3"), ("all", "reward soft")):
        drawn[k] |= {"reward": rewards.accuracy(cell), "reward_all_less_these": rewards.difference("reward soft", cell)}
    return {
        "bench": "labels",
        "ours": ours,
        "plain": plain,
        "unit": "accuracy of labels under a position bias: log-odds averaged over both orders, against one order",
        "ratio": ours / plain,
        **top,
        "labels": by_labels(rewards, trained, prompts),
        "principles": drawn,
        "orders": orders,
        "noise": by_noise(rewards, sizes),
        "noise_for_pairs": noise_for_pairs(rewards, sizes),
        "abstention": by_abstention(pool),
        "train": TRAIN,
        **surroundings(worlds, pool, seeds, sizes),
        "cpu_seconds": sum(cell.get("cpu_seconds", 0.0) for own in trained.values() for cell in own.values()),
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
        "versions": _measure.versions(("numpy", *PACKAGES)),
        "hardware": _measure.hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed: does it work at all")
    parser.add_argument("--seeds", type=int, help="how many; 5, or 1 with --quick")
    parser.add_argument("--runs", type=Path, help="where what is done lies; runs/labels, or runs/labels-quick")
    parser.add_argument("--page", type=Path, help="write this page and its figures from results, and run nothing")
    given = parser.parse_args()
    folder = given.runs or Path("runs/labels-quick" if given.quick else "runs/labels")
    if given.page is None:
        seeds = given.seeds or (1 if given.quick else 5)
        found = measure(seeds, QUICK if given.quick else FULL, folder) | {"quick": given.quick}
        write_json(folder / RESULTS, found)
    else:
        from findings_page import write_page

        found = read_json(folder / RESULTS)
        if found is None:
            sys.exit(f"{folder / RESULTS}: no such file; run without --page first")
        write_page(found, given.page)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
