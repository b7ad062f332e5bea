"""Direct preference optimisation: the policy learns from preferences without a reward model or sampling.

Rafailov et al. 2023 (arXiv 2305.18290), with the label of a pair as a probability: the loss is its expectation under
that label (`cai.maths.losses`). The reference is always the stage's starting policy: a frozen copy where all weights
are trained, the model with its adapter off where `lora:` is set. Dropout is off, that of `lora:` too.

Each step logs the loss and the log-probabilities and lengths of chosen and rejected responses. Two failures do not show
in the loss: chosen responses become less likely, or the policy prefers the longer response in more pairs than the
labels do. Both are reported as figures (on held-out pairs where there are any), drawn in `curves.svg`, and the user is
told where they are large. `sft_weight` counters the first (Pang et al. 2024, arXiv 2404.19733); its part of the loss is
logged as `loss/sft`, beside `loss/dpo`.

`train: {precompute_ref_log_probs: true}` computes the reference's log-probabilities once, before training: the same
numbers without a frozen copy in memory.

Left out: DPO's other losses (`train: {loss_type}`), whose meaning under a soft label is not settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.references import OneOrMore, OutputKind, PreferencesRef
from cai.contracts.training_config import Copy, TrainingConfig
from cai.storage.rows import is_held_out

if TYPE_CHECKING:
    from cai.training.tokenised_rows import TokenisedPair


class Config(TrainingConfig):
    gives: ClassVar[OutputKind] = "policy"
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

    sequences_per_example: ClassVar[int] = 2

    kind: Literal["dpo"] = "dpo"
    from_: OneOrMore[PreferencesRef] = Field(alias="from", min_length=1, description="Stages to learn from.")
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the expected negative log-likelihood a token (RPO); 0 = DPO alone."
    )

    def copies_of_start(self) -> tuple[Copy, ...]:
        """A reference, where no adapter can be switched off and its log-probabilities are not computed beforehand."""
        return () if self.lora is not None or self.train.get("precompute_ref_log_probs") else ("reference",)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Trains the policy on pairs that are not held out. Raises StageFailed where none is left."""
    from cai.report.pictures import draw_training_curves
    from cai.training import metrics
    from cai.training.stage_training import stage_training
    from cai.training.tokenised_rows import as_dataset, tokenise_pairs
    from cai.training.trainers import LabelledDPOCollator, SoftDPOTrainer

    with stage_training(config, context) as training:
        chat = training.chat
        rows = context.rows(config.from_)
        learned_rows = [row for row in rows if not is_held_out(row)]
        held_out_rows = [row for row in rows if is_held_out(row)]
        pairs, left_out = tokenise_pairs(learned_rows, chat, config.max_length)
        held_out, _ = tokenise_pairs(held_out_rows, chat, config.max_length)
        held_out.sort(key=lambda pair: pair.length)  # evaluated in this order, so that batches hold little padding
        left_out["held_out"] += len(held_out_rows)
        training.require(pairs, "no pair to learn from", left_out)
        training.report_left_out("pairs", len(rows), left_out)

        longest = max(pair.length for pair in [*pairs, *held_out])
        args = training.arguments(longest, max_length=None)
        model = training.load_language_model()
        needs_frozen_copy = "reference" in config.copies_of_start()
        trainer = SoftDPOTrainer(
            model=model, ref_model=training.load_reference() if needs_frozen_copy else None, args=args,
            data_collator=LabelledDPOCollator(pad_token_id=chat.pad_id),
            train_dataset=as_dataset([trainer_row(pair) for pair in pairs]),
            eval_dataset=as_dataset([trainer_row(pair) for pair in held_out]) if held_out else None,
            processing_class=chat.tokenizer, peft_config=training.adapter("CAUSAL_LM", model),
            sft_weight=config.sft_weight,
        )  # fmt: skip
        figures = training.train(trainer)
        if held_out:
            measured = training.evaluate(trainer)
            reported = {name: measured.get(f"eval_{name}") for name in REPORTED_METRICS}
            figures["held_out"] = {"pairs": len(held_out), **reported}
        training.save(trainer, examples=len(pairs))
    if trainer.is_world_process_zero():
        draw_training_curves(context.folder, CURVE_PANELS)
    figures["drift"] = drift(figures.get("held_out") or _late_means(metrics.read_metrics(context.folder)))
    if warnings := list(drift_warnings(figures["drift"])):
        context.progress.note("; ".join(warnings))
    return {"training": {config.id: {**figures, "pairs": len(rows), "examples": len(pairs), "left_out": +left_out}}}


REPORTED_METRICS = (
    "loss", "reward/accuracy", "reward/margin", "log_ratio/chosen", "log_ratio/rejected", "length/chosen",
    "longer/reward", "longer/label",
)  # fmt: skip
"""Metrics that the stage reports on held-out pairs."""
CURVE_PANELS = {
    "loss, nats": {"loss": "loss"},
    "accuracy on the step's pairs": {"reward/accuracy": "accuracy"},
    "log-probability, less the reference's, nats": {"log_ratio/chosen": "chosen", "log_ratio/rejected": "rejected"},
    "share that prefers the longer response": {"longer/reward": "policy", "longer/label": "labels"},
}
"""Panels of `curves.svg`: title to lines, a metric to its label."""
LIKELIHOOD_DROP = 0.1
"""Nats a token by which chosen responses must become less likely for a warning: about a tenth a token."""
LENGTH_BIAS = 0.1
"""Share of pairs by which the policy must prefer the longer response more often than the labels for a warning."""


def drift(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """How much likelier chosen responses became (nats a token), how much more often the policy prefers the longer one.

    The second is a difference of shares, None where no pair has responses of unequal length.
    """
    policy, labels = measured.get("longer/reward"), measured.get("longer/label")
    return {
        "chosen_log_ratio": measured["log_ratio/chosen"] / measured["length/chosen"],
        "longer": None if policy is None or labels is None else policy - labels,
    }


def drift_warnings(drift_figures: Mapping[str, float | None]) -> Iterator[str]:
    """A sentence for each figure of `drift` that a user should know about."""
    ratio, longer = drift_figures["chosen_log_ratio"], drift_figures["longer"]
    if ratio is not None and ratio < -LIKELIHOOD_DROP:
        remedies = "a higher `beta`, fewer steps or `sft_weight` counter that"
        yield f"chosen responses became less likely, by {-ratio:.2f} nats a token: {remedies}"
    if longer is not None and longer > LENGTH_BIAS:
        yield f"the policy prefers the longer response in {longer:.0%} more of the pairs than their labels do"


def _late_means(logged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the last quarter of the logged steps."""
    steps = [entry for entry in logged if "log_ratio/chosen" in entry]
    late = steps[-max(1, len(steps) // 4) :]
    values = {name: [entry[name] for entry in late if name in entry] for name in REPORTED_METRICS}
    return {name: fmean(logged_values) for name, logged_values in values.items() if logged_values}


def trainer_row(pair: TokenisedPair) -> dict[str, Any]:
    """One pair as `SoftDPOTrainer` takes it."""
    return {
        "prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids,
        "p_chosen": pair.row["p_chosen"], "length": pair.length,
    }  # fmt: skip
