"""Supervised fine-tuning on the model's own revisions, mixed with its answers to harmless prompts: SL-CAI.

Bai et al. 2022 (arXiv 2212.08073), section 3: one epoch over critiqued and revised responses together with samples to
helpfulness prompts, so that the model becomes harmless without becoming evasive. Only responses are learned, their
end-of-turn token included.

What must not be learned is left out and counted: prompts that are held out, revisions that came to nothing (the
response is still the original), what the model was cut off in, and examples that do not fit. A prompt belongs to a
stage that revised its answers, and else to the first stage in `from` that had it, so that the raw answer to a red-team
prompt never comes back beside its revision, nor in place of one that failed. An answer that `revise` passed over,
because of `only` or because no principle applies to its prompt, is learned as it is: that is what answers to harmless
prompts are mixed in by, so the constitution must have a principle for every red-team prompt. `revise` reports how many
had none as `without_principle`.

Left out: packing, and several turns learned at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cai.contracts.context import Context
from cai.contracts.stage_config import OutputKind
from cai.contracts.training_config import RowTrainingConfig
from cai.storage.journal import FAILURES
from cai.storage.rows import Revision, Sample, is_held_out, read_rows
from cai.text.errors import BadInput, StageFailed

if TYPE_CHECKING:
    from cai.models.chat import Chat


class Config(RowTrainingConfig):
    gives: ClassVar[OutputKind] = "policy"
    takes: ClassVar[tuple[OutputKind, ...]] = ("texts",)
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


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the model on the responses to prompts that are not held out. Raises StageFailed where none is left."""
    from cai.models import loading
    from cai.models.chat import Chat
    from cai.training import arguments, loop, tokenised_rows
    from cai.training.trainers import SupervisedTrainer

    start = context.model(config.model)
    chat = Chat.load(start)
    stages = {name: context.rows(name) for name in config.from_}
    kept, left_out = select(stages, {name: _failed_ids(context, name) for name in stages})
    rows = [row for rows in kept.values() for row in rows]
    examples, unusable = tokenised(rows, chat, tokenised_rows.longest(chat, config.max_length))
    left_out += unusable
    if not examples:
        raise StageFailed(
            f"stage {config.id!r}: no response to learn from; left out: {tokenised_rows.reasons(left_out)}"
        )

    with arguments.quiet(context):
        args = arguments.arguments(config, context, max_length=None)
        model = arguments.loaded(loading.load_causal_lm, start, context)
        trainer = SupervisedTrainer(
            model=model,
            args=args,
            train_dataset=tokenised_rows.dataset(examples),
            processing_class=chat.tokenizer,
            peft_config=arguments.adapter(config.lora, "CAUSAL_LM", model),
        )
        figures = loop.train(trainer, context)
        loop.save(trainer, context, chat, config.model, {"kind": config.kind, "examples": len(examples)})
    return {
        "training": {
            config.id: {
                **figures,
                "examples": len(examples),
                "tokens_learned": sum(label != -100 for example in examples for label in example["labels"]),
                "fitting_by_stage": {name: len(rows) for name, rows in kept.items()},
                "left_out": +left_out,
            }
        }
    }


def select(
    stages: Mapping[str, Sequence[Sample | Revision]], failed: Mapping[str, set[str]]
) -> tuple[dict[str, list[Sample | Revision]], Counter[str]]:
    """The rows of each stage that may be learned from, and how many were left out for which reason.

    Stages that revise come first, then the order given. `failed` names the items that a stage has no row for; those of
    a stage that revises are samples of another one.
    """
    kept: dict[str, list[Sample | Revision]] = {name: [] for name in stages}
    left_out: Counter[str] = Counter()
    taken: set[str] = set()
    lost: set[str] = set()
    for name, rows in sorted(stages.items(), key=lambda stage: not any("rounds" in row for row in stage[1])):
        for row in rows:
            if reason := _unfit(row, taken, lost):
                left_out[reason] += 1
            else:
                kept[name].append(row)
        taken |= {row["prompt_id"] for row in rows}
        lost |= failed[name]
    return kept, left_out


def _unfit(row: Sample | Revision, taken: set[str], lost: set[str]) -> str | None:
    if is_held_out(row):
        return "held_out"
    if row["prompt_id"] in taken:
        return "superseded"
    if row["id"] in lost:
        return "revision_failed"
    if row.get("rounds") and row["response"] == row.get("original"):
        return "not_revised"
    if row["finish_reason"] == "length":
        return "cut_off"
    if not row["response"].strip():
        return "empty"
    return None


def tokenised(rows: Sequence[Sample | Revision], chat: Chat, longest: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Each row as token ids with the prompt's labels masked, and how many were left out for which reason.

    What a thinking model thought is learned with its own response, and not with a revision, which it is not about.
    """
    examples: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        reasoning = None if row.get("rounds") else row.get("reasoning")
        try:
            prompt_ids, response_ids = chat.example(row["prompt"], row["response"], reasoning)
        except BadInput:  # a conversation that the model's template does not take
            left_out["refused_by_template"] += 1
            continue
        ids = prompt_ids + response_ids
        if len(ids) > longest:
            left_out["too_long"] += 1
        else:
            labels = [-100] * len(prompt_ids) + response_ids
            examples.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return examples, left_out


def _failed_ids(context: Context, stage: str) -> set[str]:
    path = context.inputs[stage] / FAILURES
    return {row["id"] for row in read_rows(path)} if path.exists() else set()
