"""A reward model from preferences: the named language model with one scalar head, read at the end of the turn.

Soft-label Bradley-Terry (`cai.maths.losses`), as for the preference model of Bai et al. 2022 (arXiv 2212.08073, section
4) and the reward model of Lee et al. 2023 (arXiv 2309.00267). It learns from AI labels and from people's
(`source: human`) alike, never from held-out prompts: those tagged so, or where no row is, a share of the prompts that
is chosen here (`hold_out`). On these it is measured: how often it scores the better response higher, by the oracle's
gold scores where it has any and by the labels otherwise, with an interval clustered by topic. That is done when the
model is saved and the trainer's memory is free again; a run that ends in the middle of it has lost no training. Dropout
is off, that of `lora:` too.

Left out: centring of scores across prompts, ensembles, margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.references import OneOrMore, OutputKind, PreferencesRef, RewardStartRef
from cai.contracts.training_config import TrainingConfig
from cai.storage.rows import Preference, held_out_rank, is_held_out, row_lines, topic_of
from cai.text.errors import StageFailed
from cai.text.progress import part_counter

if TYPE_CHECKING:
    from cai.training.stage_training import StageTraining
    from cai.training.tokenised_rows import TokenisedPair

EVALUATION = "evaluation.jsonl"
"""Both scores of every held-out pair."""


class Config(TrainingConfig):
    gives: ClassVar[OutputKind] = "reward"
    train_class: ClassVar[str] = "trl.trainer.reward_config:RewardConfig"
    owned: ClassVar[tuple[str, ...]] = ("disable_dropout",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,  # more than one overfits (Ouyang et al. 2022, arXiv 2203.02155)
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
    }

    sequences_per_example: ClassVar[int] = 2

    kind: Literal["reward"] = "reward"
    model: RewardStartRef | None = Field(
        None, description="Starting model or stage, a reward model too; absent = the recipe's model."
    )
    from_: OneOrMore[PreferencesRef] = Field(alias="from", min_length=1, description="Stages to learn from.")
    hold_out: float = Field(0.1, gt=0, lt=1, description="Share of prompts held out where no row is tagged held_out.")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains on pairs that are not held out, measures on those that are. Raises StageFailed where there are none."""
    from cai.models.reward_model import RewardModel
    from cai.training import tokenised_rows
    from cai.training.stage_training import describe_left_out, stage_training

    with stage_training(config, context) as training:
        chat = training.chat
        rows: list[Preference] = context.rows(config.from_)
        pairs, left_out = tokenised_rows.tokenise_pairs(rows, chat, config.max_length)
        held_out_ids = held_out_prompts(rows, config.hold_out)
        learned = [pair for pair in pairs if pair.row["prompt_id"] not in held_out_ids]
        held_out = [pair for pair in pairs if pair.row["prompt_id"] in held_out_ids]
        if not learned or not held_out:
            raise StageFailed(
                f"stage {config.id!r}: of {len(rows)} pairs {len(learned)} can be learned from and {len(held_out)} are "
                f"held out, expected some of each; left out: {describe_left_out(left_out)}"
            )
        training.report_left_out("pairs", len(rows), left_out)

        if not training.is_saved:  # else an earlier run came to its end while it scored held-out pairs
            _train(training, learned, longest=max(pair.length for pair in pairs))
        conversations = [pair.prompt_ids + ids for pair in held_out for ids in (pair.chosen_ids, pair.rejected_ids)]
        reward_model = RewardModel(training.load_saved_classifier(), chat, context.profile)
        count = part_counter(context.progress, len(conversations), "held-out responses scored")
        scores = reward_model.scores(conversations, lambda: count(1))
        scored = list(map(_scored_row, held_out, scores[::2], scores[1::2]))
    (context.folder / EVALUATION).write_text("".join(row_lines(scored)), encoding="utf-8")
    counts = {"pairs": len(rows), "examples": len(learned), "held_out": len(held_out), "left_out": +left_out}
    return {"training": {config.id: {**training.figures(), **counts}}, "reward": {**measure(scored), **counts}}


def _train(training: StageTraining, learned: Sequence[TokenisedPair], longest: int) -> None:
    """Trains and saves the model. All memory that training takes is free afterwards."""
    from cai.training import tokenised_rows
    from cai.training.trainers import LabelledRewardCollator, SoftRewardTrainer

    args = training.arguments(longest, max_length=None)
    model = training.load_classifier()
    trainer = SoftRewardTrainer(
        model=model, args=args, data_collator=LabelledRewardCollator(pad_token_id=training.chat.pad_id),
        train_dataset=tokenised_rows.as_dataset([trainer_row(pair) for pair in learned]),
        processing_class=training.chat.tokenizer,
        peft_config=training.adapter("SEQ_CLS", model, trained_modules=("score",)),
    )  # fmt: skip
    training.train(trainer)
    training.save(trainer, examples=len(learned))


def held_out_prompts(rows: Sequence[Preference], share: float) -> set[str]:
    """Ids of held-out prompts: those tagged so, else the `share` whose hashes come first, at least one."""
    if tagged := {row["prompt_id"] for row in rows if is_held_out(row)}:
        return tagged
    prompts = sorted({row["prompt_id"] for row in rows}, key=lambda prompt: (held_out_rank(prompt), prompt))
    return set(prompts[: max(1, round(share * len(prompts)))])


def measure(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over held-out pairs: accuracy with its interval, mean scores, and how well the margins are calibrated.

    `accuracy` compares the margin with the gold margin where the oracle knows any of the prompts, else with the label.
    Pairs whose gold margin or label favours neither response are ties, counted and not graded. `log_loss` is in nats
    against the label and `label_entropy` its lower bound; `calibration_error` is the gap between σ(|margin|) and how
    often the model is right, over ten bins.
    """
    by_label = [(row, row["p_chosen"] - 0.5) for row in scored]
    by_gold = [(row, row["gold_margin"]) for row in scored if row["gold_margin"] is not None]
    judged = by_gold or by_label
    graded = [(row, truth) for row, truth in judged if truth != 0]
    margins = [row["margin"] for row in scored]
    losses = [_log_loss(row["margin"], row["p_chosen"]) for row in scored]
    entropies = [_log_loss(math.log(p / (1 - p)), p) if 0 < p < 1 else 0.0 for p in (row["p_chosen"] for row in scored)]
    return {
        "accuracy": _accuracy(graded),
        "against": "gold" if by_gold else "labels",
        "ties": len(judged) - len(graded),
        "ungraded": len(scored) - len(judged),
        "label_accuracy": _accuracy([(row, truth) for row, truth in by_label if truth != 0]),
        "chosen_score": fmean(row["chosen_score"] for row in scored),
        "rejected_score": fmean(row["rejected_score"] for row in scored),
        "margin": fmean(margins),
        "log_loss": fmean(losses),
        "label_entropy": fmean(entropies),
        "calibration_error": _calibration_error(graded),
    }


def _accuracy(graded: Sequence[tuple[Mapping[str, Any], float]]) -> Mapping[str, Any]:
    """Rate at which the margin has the sign of the truth, clustered by topic."""
    from cai.maths.statistics import rate

    is_right = [float(row["margin"] * truth > 0) for row, truth in graded]
    return rate(is_right, [row["topic"] for row, _ in graded]).as_json()


def _log_loss(margin: float, p_chosen: float) -> float:
    """Cross-entropy of label and margin, in nats."""
    return (1 - p_chosen) * margin + math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)


def _calibration_error(graded: Sequence[tuple[Mapping[str, Any], float]]) -> float | None:
    """Expected calibration error of the model's confidence σ(|margin|); None where no pair is graded."""
    if not graded:
        return None
    import numpy as np

    from cai.maths.calibration import expected_calibration_error
    from cai.maths.vote_aggregation import sigmoid

    confidences = sigmoid(np.array([abs(row["margin"]) for row, _ in graded]))
    is_right = np.array([row["margin"] * truth > 0 for row, truth in graded])
    return expected_calibration_error(confidences, is_right)


def _scored_row(pair: TokenisedPair, chosen_score: float, rejected_score: float) -> dict[str, Any]:
    """One row of `evaluation.jsonl`."""
    from cai.micro.oracle import gold_score

    row = pair.row
    gold_chosen = gold_score(row["prompt"], row["chosen"][-1]["content"])
    gold_rejected = gold_score(row["prompt"], row["rejected"][-1]["content"])
    return {
        "id": row["id"], "prompt_id": row["prompt_id"], "topic": topic_of(row["tags"], row["prompt_id"]),
        "source": row["source"], "p_chosen": row["p_chosen"],
        "chosen_score": chosen_score, "rejected_score": rejected_score, "margin": chosen_score - rejected_score,
        "gold_margin": None if gold_chosen is None or gold_rejected is None else gold_chosen - gold_rejected,
    }  # fmt: skip


def trainer_row(pair: TokenisedPair) -> dict[str, Any]:
    """One pair as `SoftRewardTrainer` takes it: the token ids of both conversations."""
    return {
        "chosen_ids": pair.prompt_ids + pair.chosen_ids,
        "rejected_ids": pair.prompt_ids + pair.rejected_ids,
        "p_chosen": pair.row["p_chosen"],
        "length": pair.length,
    }
