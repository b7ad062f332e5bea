"""Direct preference optimisation: the policy learns from preferences without a reward model or sampling.

Rafailov et al. 2023 (arXiv 2305.18290), with the label of a pair as a probability: the loss is its expectation under
that label (`cai.maths.losses`). The reference is the stage's starting policy, always: a frozen copy where all weights
are trained, the model with its adapter off where `lora:` is. Dropout is off.

Logged at each step beside the loss: log-probabilities and lengths of chosen and rejected responses. Two things show
what the loss does not: chosen responses that get less likely, and a policy that prefers the longer response in more
pairs than the labels do. Both are figures, on held-out pairs where there are any, drawn in the stage's folder, and said
in a sentence where they are large. Against the first there is `sft_weight` (Pang et al. 2024, arXiv 2404.19733); with
it, what it adds is logged as `loss/sft`, beside `loss/dpo`.

`train: {precompute_ref_log_probs: true}` computes the reference's log-probabilities once, before training: the same
numbers without a frozen copy in memory.

Left out: DPO's other losses (`train: {loss_type}`), whose meaning under a soft label is not settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.stage_config import OutputKind
from cai.contracts.training_config import RowTrainingConfig
from cai.storage.rows import is_held_out
from cai.text.errors import StageFailed


class Config(RowTrainingConfig):
    gives: ClassVar[OutputKind] = "policy"
    takes: ClassVar[tuple[OutputKind, ...]] = ("preferences",)
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
    from cai.models import loading
    from cai.models.chat import Chat
    from cai.report.training_curves import curves
    from cai.training import arguments, loop, metrics, tokenised_rows
    from cai.training.trainers import LabelledDPOCollator, SoftDPOTrainer

    start = context.model(config.model)
    chat = Chat.load(start)
    rows = context.rows(config.from_)
    pairs, left_out = tokenised_rows.tokenised_pairs(
        [row for row in rows if not is_held_out(row)], chat, config.max_length
    )
    held_out, _ = tokenised_rows.tokenised_pairs([row for row in rows if is_held_out(row)], chat, config.max_length)
    held_out.sort(key=lambda pair: pair.length)  # measured in this order: batches hold little padding
    left_out["held_out"] += sum(is_held_out(row) for row in rows)
    if not pairs:
        raise StageFailed(f"stage {config.id!r}: no pair to learn from; left out: {tokenised_rows.reasons(left_out)}")

    with arguments.quiet(context):
        args = arguments.arguments(config, context, max_length=None)
        model = arguments.loaded(loading.load_causal_lm, start, context)
        frozen = config.lora is None and not args.precompute_ref_log_probs
        trainer = SoftDPOTrainer(
            model=model,
            ref_model=arguments.loaded(loading.load_causal_lm, start, context) if frozen else None,
            args=args,
            data_collator=LabelledDPOCollator(pad_token_id=chat.pad_id),
            train_dataset=tokenised_rows.dataset([_ids(pair) for pair in pairs]),
            eval_dataset=tokenised_rows.dataset([_ids(pair) for pair in held_out]) if held_out else None,
            processing_class=chat.tokenizer,
            peft_config=arguments.adapter(config.lora, "CAUSAL_LM", model),
            sft_weight=config.sft_weight,
        )
        figures = loop.train(trainer, context)
        if held_out:
            measured = loop.evaluate(trainer)
            figures["held_out"] = {"pairs": len(held_out), **{name: measured.get(f"eval_{name}") for name in SHOWN}}
        loop.save(trainer, context, chat, config.model, {"kind": config.kind, "examples": len(pairs)})
    if trainer.is_world_process_zero():
        curves(context.folder, PANELS)
    figures["drift"] = drift(figures.get("held_out") or _late(metrics.read_metrics(context.folder)))
    if said := list(warnings(figures["drift"])):
        context.progress.note("; ".join(said))
    return {"training": {config.id: {**figures, "pairs": len(rows), "examples": len(pairs), "left_out": +left_out}}}


SHOWN = (
    "loss", "reward/accuracy", "reward/margin", "log_ratio/chosen", "log_ratio/rejected", "length/chosen",
    "longer/reward", "longer/label",
)  # fmt: skip
"""What the stage reports of the pairs that it did not learn from."""
PANELS = {
    "loss, nats": {"loss": "loss"},
    "accuracy on the step's pairs": {"reward/accuracy": "accuracy"},
    "log-probability, less the reference's, nats": {"log_ratio/chosen": "chosen", "log_ratio/rejected": "rejected"},
    "share that prefers the longer response": {"longer/reward": "policy", "longer/label": "labels"},
}
"""What the stage's picture shows."""
FALLS = 0.1
"""Nats a token from which on chosen responses have become less likely: each of their tokens by a tenth, on average."""
LENGTHENS = 0.1
"""Share of pairs by which the policy prefers the longer response more than the labels do."""


def drift(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """How much likelier chosen responses became, nats a token, and how much more the policy likes length than labels.

    The second is None where no pair has responses of unequal length.
    """
    policy, labels = measured.get("longer/reward"), measured.get("longer/label")
    return {
        "chosen_log_ratio": measured["log_ratio/chosen"] / measured["length/chosen"],
        "longer": None if policy is None or labels is None else policy - labels,
    }


def warnings(found: Mapping[str, float | None]) -> Iterator[str]:
    """What of it a user should know about, in words."""
    ratio, longer = found["chosen_log_ratio"], found["longer"]
    if ratio is not None and ratio < -FALLS:
        yield (
            f"chosen responses became less likely, by {-ratio:.2f} nats a token: a higher `beta`, fewer steps or "
            f"`sft_weight` hold against that"
        )
    if longer is not None and longer > LENGTHENS:
        yield f"the policy prefers the longer response in {longer:.0%} more of the pairs than their labels do"


def _late(logged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the last quarter of the steps."""
    late = [entry for entry in logged if "log_ratio/chosen" in entry]
    late = late[-max(1, len(late) // 4) :]
    return {name: fmean(known) for name in SHOWN if (known := [entry[name] for entry in late if name in entry])}


def _ids(pair: Any) -> dict[str, Any]:
    """One pair as the trainer takes it."""
    return {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "p_chosen": pair.row["p_chosen"],
        "length": pair.length,
    }
