"""Direct preference optimisation: the policy learns from preferences without a reward model or sampling.

Rafailov et al. 2023 (arXiv 2305.18290), with the label of a pair as a probability: the loss is its expectation under
that label (`cai.losses`). The reference is the stage's starting policy, always: a frozen copy where all weights are
trained, the model with its adapter off where `lora:` is. Dropout is off.

Logged at each step beside the loss: log-probabilities and lengths of chosen and rejected responses. A chosen response
that gets less likely, or lengths that pull apart, show what the loss does not. Against the first there is `sft_weight`
(Pang et al. 2024, arXiv 2404.19733); with it, what it adds is logged as `loss/sft`, beside `loss/dpo`.

Left out: DPO's other losses (`train: {loss_type}`), whose meaning under a soft label is not settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cai.errors import StageFailed
from cai.stages import Context, Rows, RowTrainingConfig, is_held_out


class Config(RowTrainingConfig):
    gives: ClassVar[Rows] = "policy"
    takes: ClassVar[tuple[Rows, ...]] = ("preferences",)
    train_class: ClassVar[str] = "trl.trainer.dpo_config:DPOConfig"
    owned: ClassVar[tuple[str, ...]] = (
        "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type",
        "f_alpha_divergence_coef", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
        "padding_free", "disable_dropout",
    )  # fmt: skip
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 1,
        "learning_rate": 1e-6,  # the paper's
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # below 1: of all steps
        "beta": 0.1,
    }

    kind: Literal["dpo"] = "dpo"
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the responses' expected negative log-likelihood a token (RPO); 0 = DPO alone.",
    )


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the policy on pairs that are not held out. Raises StageFailed where none is left."""
    from cai import checkpoint, training
    from cai.chat import Chat
    from cai.trainers import LabelledDPOCollator, SoftDPOTrainer

    start = context.model(config.model)
    chat = Chat.load(start)
    rows = context.rows(config.from_)
    pairs, left_out = training.tokenised_pairs([row for row in rows if not is_held_out(row)], chat, config.max_length)
    held_out, _ = training.tokenised_pairs([row for row in rows if is_held_out(row)], chat, config.max_length)
    held_out.sort(key=lambda pair: pair.length)  # measured in this order: batches hold little padding
    left_out["held_out"] += sum(is_held_out(row) for row in rows)
    if not pairs:
        raise StageFailed(f"stage {config.id!r}: no pair to learn from; left out: {training.reasons(left_out)}")

    with training.quiet(context):
        args = training.arguments(config, context, max_length=None)
        frozen = config.lora is None and not args.precompute_ref_log_probs
        trainer = SoftDPOTrainer(
            model=training.loaded(checkpoint.load_causal_lm, start, context),
            ref_model=training.loaded(checkpoint.load_causal_lm, start, context) if frozen else None,
            args=args,
            data_collator=LabelledDPOCollator(pad_token_id=chat.pad_id),
            train_dataset=training.dataset([_ids(pair) for pair in pairs]),
            eval_dataset=training.dataset([_ids(pair) for pair in held_out]) if held_out else None,
            processing_class=chat.tokenizer,
            peft_config=training.adapter(config.lora, "CAUSAL_LM"),
            sft_weight=config.sft_weight,
        )
        figures = training.train(trainer, context)
        if held_out:
            measured = trainer.evaluate()
            figures["held_out"] = {"pairs": len(held_out), **{name: measured[f"eval_{name}"] for name in SHOWN}}
        training.save(trainer, context, chat, config.model, {"kind": config.kind, "examples": len(pairs)})
    return {"training": {config.id: {**figures, "pairs": len(rows), "examples": len(pairs), "left_out": +left_out}}}


SHOWN = ("loss", "reward/accuracy", "reward/margin", "log_ratio/chosen", "log_ratio/rejected")
"""What the stage reports of the pairs that it did not learn from."""


def _ids(pair: Any) -> dict[str, Any]:
    """One pair as the trainer takes it."""
    return {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "p_chosen": pair.row["p_chosen"],
        "length": pair.length,
    }
