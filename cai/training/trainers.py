"""TRL's SFT, reward and DPO trainers, changed only where they must be, and the order in which trainers take rows.

What differs from TRL: rows arrive tokenised, so nothing is rendered, truncated or dropped inside; the label of a pair
is a probability and reaches the loss through the collator as `p_chosen` (TRL's reward loss would subtract a column
named `margin`); the examples of a step are sorted by length, which saves padding and changes neither the step's
examples nor its gradient; on a CPU the language-model head is that of `cai.attention.cpu_lm_head`; and nothing is sent
or written except resume points and logs. tests/training/test_trainers.py checks TRL's private names that are used here,
so that an upgrade fails there instead of training wrongly.

Left out: DPO's other losses. Their meaning under a soft label is not settled, and `train:` refuses them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as DPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from cai.attention.cpu_lm_head import add_cpu_lm_head
from cai.maths import losses
from cai.training.dropout import configured_dropout, disable_dropout

LENGTH = "length"
"""Column with the tokens of a row, for sorting."""


class StageTrainerMixin:
    """What all trainers here change. Stands before TRL's class in the order of inheritance."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.is_deepspeed_enabled:  # type: ignore[attr-defined]  # whose optimizer has float32 copies
            # A module that is trained whole beside an adapter has its base's precision, and TRL 1.16 makes the adapter
            # of a quantised base bfloat16: small updates would be lost.
            for parameter in self.model.parameters():  # type: ignore[attr-defined]
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args  # type: ignore[attr-defined]
        processes, accumulation = args.world_size, args.gradient_accumulation_steps
        batch_size = args.train_batch_size * accumulation * processes
        lengths = self.train_dataset[LENGTH]  # type: ignore[attr-defined]
        sampler = LengthSortedSteps(lengths, batch_size, args.data_seed, processes, accumulation)
        self.add_callback(SamplerEpochCallback(sampler))  # type: ignore[attr-defined]
        return sampler

    def _send_telemetry(self) -> None:
        """TRL reports which trainer runs on which model; this package reports nothing."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with configured_dropout(self.model):  # type: ignore[attr-defined]
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`cai.models.saving` writes the card."""


class _MeanOverPairs(StageTrainerMixin):
    """A loss is the mean over a step's pairs, however micro-batches and ranks split them, in the last step too."""

    # TRL averages the micro-batches' means, which gives the pairs of a small last micro-batch more weight.
    loss_is_scaled_for_ga = True
    """Tells Trainer that `_mean` has divided by the whole step already."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Pairs in all micro-batches of this optimizer step, over all ranks."""
        n_pairs = torch.tensor(sum(len(batch["p_chosen"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(n_pairs).sum()  # type: ignore[attr-defined, no-any-return]

    def _mean(self, per_pair: Tensor, n_pairs: Tensor | None) -> Tensor:
        """This rank's share of the mean, times the number of ranks, since gradients are averaged over ranks."""
        if n_pairs is None:
            return per_pair.mean()
        return per_pair.sum() / n_pairs * self.accelerator.num_processes  # type: ignore[attr-defined, no-any-return]


class SupervisedTrainer(StageTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """Rows: `input_ids`, and `labels` with -100 for what is not learned. The loss is TRL's mean over learned tokens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        add_cpu_lm_head(language_model(self, self.model), entropy=True)


class _LabelledPairs:
    """Adds the labels `p_chosen`, (pairs,), to a batch; stands before TRL's collator in the order of inheritance."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)  # type: ignore[misc]
        labels = torch.tensor([example["p_chosen"] for example in examples], dtype=torch.float32)
        return batch | {"p_chosen": labels}


class LabelledRewardCollator(_LabelledPairs, RewardCollator):  # type: ignore[misc]
    """TRL's batch of chosen then rejected sequences, with their labels."""


class LabelledDPOCollator(_LabelledPairs, DPOCollator):  # type: ignore[misc]
    """TRL's batch of prompt + chosen then prompt + rejected, with their labels."""


class SoftRewardTrainer(_MeanOverPairs, RewardTrainer):  # type: ignore[misc]
    """Rows: `chosen_ids` and `rejected_ids`, each a conversation up to its end-of-turn token, and `p_chosen`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        disable_dropout(self.model)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "p_chosen"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        p_chosen = inputs.pop("p_chosen")
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)  # for TRL's metrics, not its hard loss
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        per_pair = losses.bradley_terry(chosen - rejected, p_chosen)
        if self.args.center_rewards_coefficient is not None:
            per_pair = per_pair + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        loss = self._mean(per_pair, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class SoftDPOTrainer(_MeanOverPairs, DPOTrainer):  # type: ignore[misc]
    """Rows: `prompt_ids`, `chosen_ids`, `rejected_ids` and `p_chosen`. The reference is `ref_model`."""

    def __init__(self, *args: Any, sft_weight: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sft_weight = sft_weight
        for model in (self.model, self.ref_model):
            if model is not None:
                disable_dropout(model)
                add_cpu_lm_head(language_model(self, model))

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # TRL 1.16 would render and tokenise rows that are tokenised already

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "prompt_ids", "chosen_ids", "rejected_ids", "p_chosen", "ref_chosen_logps", "ref_rejected_logps",
        ]  # fmt: skip

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "p_chosen"})  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask = inputs["completion_mask"]  # (2 x pairs, seq): the responses' tokens, chosen first
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
            use_cache=False, fused_lm_head=True, **router,
        )  # fmt: skip
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)  # (pairs,) each, in nats over the whole response
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or model, inputs)
        chosen_ratios, rejected_ratios = chosen - ref_chosen, rejected - ref_rejected
        per_pair = losses.direct_preference(chosen_ratios, rejected_ratios, inputs["p_chosen"], self.beta)
        lengths = mask.sum(dim=1).float()
        extra_metrics: dict[str, Tensor] = {}
        if self.sft_weight:
            n_chosen, n_rejected = lengths.chunk(2)
            supervised = losses.negative_log_likelihood(chosen, rejected, n_chosen, n_rejected, inputs["p_chosen"])
            extra_metrics = {"loss/dpo": per_pair, "loss/sft": supervised}
            per_pair = per_pair + self.sft_weight * supervised
        if self.aux_loss_enabled:  # load-balancing loss of a mixture of experts, a scalar for each micro-batch
            per_pair = per_pair + self.router_aux_loss_coef * outputs.aux_loss
        loss = self._mean(per_pair, num_items_in_batch)
        if not self.model.training:
            extra_metrics["loss"] = per_pair.detach()  # Trainer's mean would count rows that fill up a last batch
        self._record(chosen, rejected, chosen_ratios, rejected_ratios, lengths, extra_metrics)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(
        self, chosen: Tensor, rejected: Tensor, chosen_ratios: Tensor, rejected_ratios: Tensor, lengths: Tensor,
        extra_metrics: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Diagnostics of one batch, over all ranks.

        DPO can go wrong while its loss looks well: `log_prob/chosen` falls, or the policy prefers the longer response
        in more pairs (`longer/reward`) than the labels do (`longer/label`), both over pairs of unequal length.
        """
        chosen_length, rejected_length = lengths.chunk(2)
        values = {
            "log_prob/chosen": chosen, "log_prob/rejected": rejected,
            "log_ratio/chosen": chosen_ratios, "log_ratio/rejected": rejected_ratios,
            "reward/margin": self.beta * (chosen_ratios - rejected_ratios),
            "reward/accuracy": (chosen_ratios > rejected_ratios).float(),
            "length/chosen": chosen_length, "length/rejected": rejected_length,
            "longer/reward": _prefers_longer(chosen_ratios > rejected_ratios, chosen_length, rejected_length),
            "longer/label": _prefers_longer(torch.ones_like(chosen).bool(), chosen_length, rejected_length),
            **extra_metrics,
        }  # fmt: skip
        # One value a pair, so that TRL's mean over the appended values is a mean over the step's pairs, or over all
        # evaluated ones. In training plain `gather` is right: `gather_for_metrics`, which drops rows that a last batch
        # was filled up with, would drop real pairs in an epoch's last step, whose micro-batches are fetched ahead.
        mode = "train" if self.model.training else "eval"
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        gathered = gather(torch.stack([value.float() for value in values.values()], dim=1))
        for name, column in zip(values, gathered.T.tolist(), strict=True):
            if defined := [value for value in column if not math.isnan(value)]:
                self._metrics[mode][name].extend(defined)


def _prefers_longer(prefers_chosen: Tensor, chosen_length: Tensor, rejected_length: Tensor) -> Tensor:
    """(pairs,): 1 where the longer response is preferred, 0 where the shorter one is, NaN in a tie."""
    longer = (prefers_chosen == (chosen_length > rejected_length)).float()
    return longer.masked_fill(chosen_length == rejected_length, math.nan)


def language_model(trainer: Trainer, model: Any) -> PreTrainedModel:
    """The model below DeepSpeed's engine and its adapter, where TRL puts its fused head too."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[no-any-return]


class LengthSortedSteps(Sampler[int]):
    """A shuffle that depends on seed and epoch alone, with each optimizer step's examples sorted by length.

    Yields every row once. Where several processes do not share the last step evenly, accelerate fills it with rows from
    the epoch's start, which are then learned from twice in that epoch.

    A step consists of global micro-batches, one micro-batch of each process at the same time, and the processes wait
    for each other after each of them. A global micro-batch is therefore dealt out in serpentine order (first process to
    last, then back), which keeps the processes' token counts within its longest less its shortest example.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, processes: int = 1, accumulation: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.processes, self.global_micro_batch = processes, batch_size // accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.global_micro_batch
        for start in range(0, len(order), self.batch_size):
            step = sorted(order[start : start + self.batch_size], key=lambda index: -self.lengths[index])
            for first in range(0, len(step), size):
                indices = step[first : first + size]
                yield from indices if len(indices) < size else self._deal_out(indices, first)

    def _deal_out(self, indices: Sequence[int], first: int) -> Iterator[int]:
        """A global micro-batch, one process's share after the other's; `first` is its position in the step."""
        shares: list[list[int]] = [[] for _ in range(self.processes)]
        for position, index in enumerate(indices, first):
            place = position % (2 * self.processes)
            shares[min(place, 2 * self.processes - 1 - place)].append(index)
        return itertools.chain.from_iterable(shares)


class PromptSteps(Sampler[int]):
    """Prompt indices by step: each of `prompts_per_step` prompts `repeats` times, and all of these `passes` times.

    The order depends on seed and epoch alone. Prompts left over at an epoch's end, fewer than a step takes, are skipped
    in that epoch.
    """

    def __init__(self, n_prompts: int, prompts_per_step: int, repeats: int, passes: int, seed: int) -> None:
        self.n_prompts, self.prompts_per_step, self.repeats, self.passes = n_prompts, prompts_per_step, repeats, passes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_prompts // self.prompts_per_step * self.prompts_per_step * self.repeats * self.passes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n_prompts, generator=generator).tolist()
        for start in range(0, self.n_prompts - self.prompts_per_step + 1, self.prompts_per_step):
            prompts = order[start : start + self.prompts_per_step]
            for _ in range(self.passes):
                yield from (index for index in prompts for _ in range(self.repeats))


class SamplerEpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch: accelerate 1.15 does not where several processes resume in the middle of one."""

    def __init__(self, sampler: LengthSortedSteps | PromptSteps) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))
