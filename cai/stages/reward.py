"""A reward model from preferences: the named language model with one scalar head, read at the end of the turn.

Soft-label Bradley-Terry (`cai.maths.losses`), as for the preference model of Bai et al. 2022 (arXiv 2212.08073, section
4) and the reward model of Lee et al. 2023 (arXiv 2309.00267). It learns from the model's own labels or from people's
(`source: human`) alike, never from prompts that are held out: those tagged so, or where no row is, a share drawn here
by prompt (`hold_out`). On these it is measured: how often it puts the better response first, against the oracle where
one knows the prompt and against the labels otherwise, with an interval clustered by topic.

Left out: centring of scores across prompts, ensembles, margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.stage_config import OutputKind
from cai.contracts.training_config import RowTrainingConfig
from cai.storage.rows import Preference, is_held_out, row_lines, stable_seed, topic_of
from cai.text.errors import StageFailed

if TYPE_CHECKING:
    from cai.training.tokenised_rows import TokenisedPair

EVALUATION = "evaluation.jsonl"
"""Both scores of every held-out pair."""


class Config(RowTrainingConfig):
    gives: ClassVar[OutputKind] = "reward"
    takes: ClassVar[tuple[OutputKind, ...]] = ("preferences",)
    train_class: ClassVar[str] = "trl.trainer.reward_config:RewardConfig"
    owned: ClassVar[tuple[str, ...]] = ("disable_dropout",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,  # more than one overfits (Ouyang et al. 2022, arXiv 2203.02155)
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
    }

    kind: Literal["reward"] = "reward"
    hold_out: float = Field(0.1, gt=0, lt=1, description="Share of prompts held out where no row is tagged held_out.")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains on pairs that are not held out, measures on those that are. Raises StageFailed where there are none."""
    from cai.models import loading, reward_model
    from cai.models.chat import Chat
    from cai.training import arguments, loop, tokenised_rows
    from cai.training.trainers import LabelledRewardCollator, SoftRewardTrainer

    start = context.model(config.model)
    chat = Chat.load(start)
    rows: list[Preference] = context.rows(config.from_)
    reserved = held_out_prompts(rows, config.hold_out)
    pairs, left_out = tokenised_rows.tokenised_pairs(rows, chat, config.max_length)
    learned = [pair for pair in pairs if pair.row["prompt_id"] not in reserved]
    held_out = [pair for pair in pairs if pair.row["prompt_id"] in reserved]
    if not learned or not held_out:
        raise StageFailed(
            f"stage {config.id!r}: of {len(rows)} pairs {len(learned)} can be learned from and {len(held_out)} are "
            f"held out, expected some of each; left out: {tokenised_rows.reasons(left_out)}"
        )

    with arguments.quiet(context):
        args = arguments.arguments(config, context, max_length=None)
        model = arguments.loaded(loading.load_sequence_classifier, start, context)
        trainer = SoftRewardTrainer(
            model=model,
            args=args,
            data_collator=LabelledRewardCollator(pad_token_id=chat.pad_id),
            train_dataset=tokenised_rows.dataset([_ids(pair) for pair in learned]),
            processing_class=chat.tokenizer,
            peft_config=arguments.adapter(config.lora, "SEQ_CLS", model, trained_whole=("score",)),
        )
        figures = loop.train(trainer, context)
        read = [pair.prompt_ids + ids for pair in held_out for ids in (pair.chosen_ids, pair.rejected_ids)]
        scores = reward_model.scores(trainer.model, read, chat.pad_id, context.profile)
        scored = [_scored(*each) for each in zip(held_out, scores[::2], scores[1::2], strict=True)]
        loop.save(trainer, context, chat, config.model, {"kind": config.kind, "examples": len(learned)})
    (context.folder / EVALUATION).write_text("".join(row_lines(scored)), encoding="utf-8")
    counts = {"pairs": len(rows), "examples": len(learned), "held_out": len(held_out), "left_out": +left_out}
    return {"training": {config.id: {**figures, **counts}}, "reward": {**measure(scored), **counts}}


def held_out_prompts(rows: Sequence[Preference], share: float) -> set[str]:
    """Prompts that are not learned from: those tagged so, else the `share` whose hashes come first, one at least."""
    if tagged := {row["prompt_id"] for row in rows if is_held_out(row)}:
        return tagged
    prompts = sorted({row["prompt_id"] for row in rows}, key=lambda prompt: (stable_seed("hold_out", prompt), prompt))
    return set(prompts[: max(1, round(share * len(prompts)))])


def measure(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over held-out pairs: accuracy with its interval, mean scores, and how well the margins are calibrated.

    `accuracy` is against the oracle's order where it knows any of the prompts, else against the labels'. Pairs that are
    equal there are ties, counted and not graded. `log_loss` is in nats against the label, `label_entropy` the least it
    could be; `calibration_error` is the gap between σ(margin) and how often the model is right, over ten bins.
    """
    known = [row for row in scored if row["gold_margin"] is not None]
    labelled = [(row, row["p_chosen"] - 0.5) for row in scored]
    judged = [(row, row["gold_margin"]) for row in known] or labelled
    graded = [(row, truth) for row, truth in judged if truth != 0]
    margins = [row["margin"] for row in scored]
    losses = [_log_loss(row["margin"], row["p_chosen"]) for row in scored]
    floors = [_log_loss(math.log(p / (1 - p)), p) if 0 < p < 1 else 0.0 for p in (row["p_chosen"] for row in scored)]
    return {
        "accuracy": _accuracy(graded),
        "against": "gold" if known else "labels",
        "ties": len(judged) - len(graded),
        "ungraded": len(scored) - len(judged),
        "label_accuracy": _accuracy([(row, truth) for row, truth in labelled if truth != 0]),
        "chosen_score": fmean(row["chosen_score"] for row in scored),
        "rejected_score": fmean(row["rejected_score"] for row in scored),
        "margin": fmean(margins),
        "log_loss": fmean(losses),
        "label_entropy": fmean(floors),
        "calibration_error": _calibration_error(graded),
    }


def _accuracy(graded: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    """How often the margin has the sign of the truth."""
    from cai.maths.statistics import rate

    right = [float(row["margin"] * truth > 0) for row, truth in graded]
    return rate(right, [row["topic"] for row, _ in graded]).as_json()


def _log_loss(margin: float, p_chosen: float) -> float:
    """Cross-entropy of label and margin, in nats."""
    return (1 - p_chosen) * margin + math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)


def _calibration_error(graded: Sequence[tuple[Mapping[str, Any], float]]) -> float | None:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599) of how sure the model is that it is right."""
    bins: dict[int, list[float]] = {}
    for row, truth in graded:
        confidence = 1 / (1 + math.exp(-min(abs(row["margin"]), 50.0)))
        bins.setdefault(min(int(confidence * 20), 19), []).append(float(row["margin"] * truth > 0) - confidence)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(graded) if graded else None


def _scored(pair: TokenisedPair, chosen_score: float, rejected_score: float) -> dict[str, Any]:
    """One line of the evaluation."""
    from cai.micro.oracle import gold_score

    row = pair.row
    chosen = gold_score(row["prompt"], row["chosen"][-1]["content"])
    rejected = gold_score(row["prompt"], row["rejected"][-1]["content"])
    return {
        "id": row["id"],
        "prompt_id": row["prompt_id"],
        "topic": topic_of(row["tags"], row["prompt_id"]),
        "source": row["source"],
        "p_chosen": row["p_chosen"],
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "margin": chosen_score - rejected_score,
        "gold_margin": None if chosen is None or rejected is None else chosen - rejected,
    }


def _ids(pair: TokenisedPair) -> dict[str, Any]:
    """One pair as the trainer takes it: whole conversations."""
    return {
        "chosen_ids": pair.prompt_ids + pair.chosen_ids,
        "rejected_ids": pair.prompt_ids + pair.rejected_ids,
        "p_chosen": pair.row["p_chosen"],
        "length": pair.length,
    }
