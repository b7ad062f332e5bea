"""Supervised fine-tuning on the model's own revisions, mixed with its responses to harmless prompts: SL-CAI.

Bai et al. 2022 (arXiv 2212.08073), section 3: one epoch over critiqued and revised responses together with samples to
helpfulness prompts, so that the model becomes harmless without becoming evasive. Only responses are learned, their
end-of-turn token included.

What must not be learned is left out and counted: held-out prompts, revisions that changed nothing, responses that were
cut off or are empty, and examples that do not fit. A prompt belongs to a stage that revised its responses, else to the
first stage in `from` that has it, so that the raw response to a red-team prompt is never learned beside its revision or
in place of a failed one. A response that `revise` skipped, because of `only` or because no principle applies to its
prompt, is learned as it is: this is how responses to harmless prompts are mixed in. The constitution must therefore
have a principle for every red-team prompt; `revise` reports how many had none as `without_principle`.

Left out: packing, and learning several turns of a conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.references import OneOrMore, OutputKind, TextsAndFailedRef
from cai.contracts.training_config import TrainingConfig
from cai.storage.rows import Revision, Sample, is_held_out
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from cai.models.chat import Chat


class Config(TrainingConfig):
    gives: ClassVar[OutputKind] = "policy"
    revision: ClassVar[int] = 2
    train_class: ClassVar[str] = "trl.trainer.sft_config:SFTConfig"
    owned: ClassVar[tuple[str, ...]] = (
        "packing", "packing_strategy", "eval_packing", "padding_free", "shuffle_dataset", "loss_type",
    )  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,  # the paper's; its rate is half the pre-training rate
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
    }

    kind: Literal["sft"] = "sft"
    from_: OneOrMore[TextsAndFailedRef] = Field(alias="from", min_length=1, description="Stages to learn from.")


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the model on the responses to prompts that are not held out. Raises StageFailed where none is left."""
    from cai.training import tokenised_rows
    from cai.training.stage_training import stage_training
    from cai.training.trainers import SupervisedTrainer

    with stage_training(config, context) as training:
        rows_by_stage = {stage_id: context.rows(stage_id) for stage_id in config.from_}
        failed_ids = {stage_id: context.failed_ids(stage_id) for stage_id in config.from_}
        kept, left_out = select(rows_by_stage, failed_ids)
        limit = training.chat.token_limit(config.max_length)
        examples, unusable = tokenise([row for rows in kept.values() for row in rows], training.chat, limit)
        left_out += unusable
        training.require(examples, "no response to learn from", left_out)
        cut_off = context.cut_off_reason(left_out["cut_off"], rows_by_stage)
        training.report_left_out("responses", sum(map(len, rows_by_stage.values())), left_out, cut_off)

        args = training.arguments(max(example["length"] for example in examples), max_length=None)
        model = training.load_language_model()
        trainer = SupervisedTrainer(
            model=model, args=args, train_dataset=tokenised_rows.as_dataset(examples),
            processing_class=training.chat.tokenizer, peft_config=training.adapter("CAUSAL_LM", model),
        )  # fmt: skip
        figures = training.train(trainer)
        training.save(trainer, examples=len(examples))
    counts = {
        "examples": len(examples),
        "tokens_learned": sum(label != -100 for example in examples for label in example["labels"]),
        "fitting_by_stage": {stage_id: len(rows) for stage_id, rows in kept.items()},
        "left_out": +left_out,
    }
    return {"training": {config.id: {**figures, **counts}}}


def select(
    rows_by_stage: Mapping[str, Sequence[Sample | Revision]], failed_ids: Mapping[str, set[str]]
) -> tuple[dict[str, list[Sample | Revision]], Counter[str]]:
    """The rows of each stage that may be learned from, and how many were left out by reason.

    Stages that revise come first, then the order given. `failed_ids` names the items that a stage has no row for; in a
    stage that revises these are ids of another stage's samples.
    """
    kept: dict[str, list[Sample | Revision]] = {stage_id: [] for stage_id in rows_by_stage}
    left_out: Counter[str] = Counter()
    earlier_prompts: set[str] = set()
    failed_samples: set[str] = set()
    for stage_id, rows in sorted(rows_by_stage.items(), key=lambda item: not any("rounds" in row for row in item[1])):
        for row in rows:
            if reason := _reason_to_leave_out(row, earlier_prompts, failed_samples):
                left_out[reason] += 1
            else:
                kept[stage_id].append(row)
        earlier_prompts |= {row["prompt_id"] for row in rows}
        failed_samples |= failed_ids[stage_id]
    return kept, left_out


def _reason_to_leave_out(row: Sample | Revision, earlier_prompts: set[str], failed_samples: set[str]) -> str | None:
    if is_held_out(row):
        return "held_out"
    if row["prompt_id"] in earlier_prompts:
        return "superseded"
    if row["id"] in failed_samples:
        return "revision_failed"
    if row.get("rounds") and row["response"] == row.get("original"):
        return "not_revised"
    if row["finish_reason"] == "length":
        return "cut_off"
    if not row["response"].strip():
        return "empty"
    return None


def tokenise(rows: Sequence[Sample | Revision], chat: Chat, limit: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Each row as token ids with the prompt's labels masked (-100), and how many were left out by reason.

    A thinking model's reasoning is learned with its own response, but not with a revision, which it is not about.
    """
    examples: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        reasoning = None if row.get("rounds") else row.get("reasoning")
        try:
            prompt_ids, response_ids = chat.example(row["prompt"], row["response"], reasoning)
        except BadInput:  # the model's template refuses the conversation
            left_out["refused_by_template"] += 1
            continue
        ids = prompt_ids + response_ids
        if len(ids) > limit:
            left_out["too_long"] += 1
        else:
            labels = [-100] * len(prompt_ids) + response_ids
            examples.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return examples, left_out
