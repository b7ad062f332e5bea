"""TRL's SFT, reward and DPO trainers, changed only where they must be.

What is different here: rows arrive tokenised, so nothing is rendered, truncated or dropped inside; the label of a pair
is a probability and reaches the loss through the collator as `p_chosen` (a column named `margin` would be subtracted by
TRL's reward loss); the batches of a step are sorted by length, which changes neither the step's examples nor its
gradient but saves padding; on a CPU the language-model head is that of `cai.attention.cpu_kernels`; and nothing is sent
or written but checkpoints and logs. TRL's private names used here are held by tests/test_trainers.py, so that an
upgrade fails there and not in somebody's weights.

Left out: DPO's other losses. What a soft label means for them is not settled, and `train:` refuses them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as DPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from cai.attention.cpu_kernels import add_lm_head
from cai.maths import losses

if TYPE_CHECKING:
    from cai.training.rl.usable_prompts import PromptSteps

LENGTH = "length"
"""Column with the tokens of a row, for sorting."""


class LengthSortedSteps(Sampler[int]):
    """A shuffle that depends on seed and epoch alone, each optimizer step's examples sorted by length within it.

    Yields every row once. Where processes do not share the last step evenly, accelerate fills it up with rows from the
    epoch's start: these are learned from twice in that epoch, on several processes only.

    The processes take the step's micro-batches in turn, and in each turn wait for each other, for what they log. So a
    turn's examples are dealt to them there and back: their tokens, which are what a micro-batch costs where padding is
    not computed, then differ by no more in sum than the turn's longest and shortest example do.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, processes: int = 1, accumulation: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.processes, self.turn = processes, batch_size // accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            step = sorted(order[start : start + self.batch_size], key=lambda index: -self.lengths[index])
            for first in range(0, len(step), self.turn):
                turn = step[first : first + self.turn]
                yield from turn if len(turn) < self.turn else self._deal(turn, first)

    def _deal(self, turn: Sequence[int], before: int) -> Iterator[int]:
        """The turn, one process's micro-batch after the other's; `before` examples of the step were dealt already."""
        hands: list[list[int]] = [[] for _ in range(self.processes)]
        for number, index in enumerate(turn, before):
            place = number % (2 * self.processes)
            hands[min(place, 2 * self.processes - 1 - place)].append(index)
        return itertools.chain.from_iterable(hands)


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch it is. accelerate does not reach it on several processes that resume within one."""

    def __init__(self, sampler: LengthSortedSteps | PromptSteps) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class Quiet:
    """What all trainers share. Stands before TRL's class in the order of inheritance."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args  # type: ignore[attr-defined]
        processes, accumulation = args.world_size, args.gradient_accumulation_steps
        step = args.train_batch_size * accumulation * processes
        lengths = self.train_dataset[LENGTH]  # type: ignore[attr-defined]
        sampler = LengthSortedSteps(lengths, step, args.data_seed, processes, accumulation)
        self.add_callback(Epochs(sampler))  # type: ignore[attr-defined]
        return sampler

    def _send_telemetry(self) -> None:
        """TRL tells its makers which trainer runs on which model; this package tells nobody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`cai.models.reference` writes the card."""


class _Pairs(Quiet):
    """A loss is the mean over a step's pairs, however the micro-batches and ranks split them, the last step's too.

    TRL averages the micro-batches' means, which weighs the pairs of a small last one more.
    """

    loss_is_scaled_for_ga = True
    """Tells Trainer that `_mean` has divided by the whole step already."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Pairs in all micro-batches of this optimizer step, over all ranks."""
        pairs = torch.tensor(sum(len(batch["p_chosen"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum()  # type: ignore[attr-defined, no-any-return]

    def _mean(self, per_pair: Tensor, pairs: Tensor | None) -> Tensor:
        """This rank's share of the mean, times the ranks, as gradients are averaged over them."""
        if pairs is None:
            return per_pair.mean()
        return per_pair.sum() / pairs * self.accelerator.num_processes  # type: ignore[attr-defined, no-any-return]


class SupervisedTrainer(Quiet, SFTTrainer):  # type: ignore[misc]
    """Rows: `input_ids`, and `labels` with -100 for what is not learned. The loss is TRL's mean over learned tokens."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        add_lm_head(language_model(self, self.model), entropy=True)


@dataclass
class LabelledRewardCollator(RewardCollator):  # type: ignore[misc]
    """TRL's batch of chosen then rejected sequences, with their labels `p_chosen` (pairs,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {"p_chosen": _labels(examples)}


class SoftRewardTrainer(_Pairs, RewardTrainer):  # type: ignore[misc]
    """Rows: `chosen_ids` and `rejected_ids`, each a whole conversation up to its end-of-turn token, and `p_chosen`."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "p_chosen"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        p_chosen = inputs.pop("p_chosen")
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)  # for TRL's metrics; its loss is hard
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        per_pair = losses.bradley_terry(chosen - rejected, p_chosen)
        if self.args.center_rewards_coefficient is not None:
            per_pair = per_pair + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        loss = self._mean(per_pair, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@dataclass
class LabelledDPOCollator(DPOCollator):  # type: ignore[misc]
    """TRL's batch of prompt + chosen then prompt + rejected, with their labels `p_chosen` (pairs,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {"p_chosen": _labels(examples)}


class SoftDPOTrainer(_Pairs, DPOTrainer):  # type: ignore[misc]
    """Rows: `prompt_ids`, `chosen_ids`, `rejected_ids` and `p_chosen`. The reference is what the trainer is given."""

    def __init__(self, *args: Any, sft_weight: float = 0.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sft_weight = sft_weight
        for model in (self.model, self.ref_model):
            if model is not None:
                add_lm_head(language_model(self, model))

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # TRL would render and tokenise even rows that are tokenised

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
        parts: dict[str, Tensor] = {}
        if self.sft_weight:
            chosen_length, rejected_length = lengths.chunk(2)
            supervised = losses.negative_log_likelihood(
                chosen, rejected, chosen_length, rejected_length, inputs["p_chosen"]
            )
            parts = {"loss/dpo": per_pair, "loss/sft": supervised}
            per_pair = per_pair + self.sft_weight * supervised
        if self.aux_loss_enabled:  # a mixture of experts' own loss for balance, one number a micro-batch
            per_pair = per_pair + self.router_aux_loss_coef * outputs.aux_loss
        loss = self._mean(per_pair, num_items_in_batch)
        if not self.model.training:
            parts["loss"] = per_pair.detach()  # else a mean over batches, whose last is filled up on several processes
        self._record(chosen, rejected, chosen_ratios, rejected_ratios, lengths, parts)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(
        self, chosen: Tensor, rejected: Tensor, chosen_ratios: Tensor, rejected_ratios: Tensor, lengths: Tensor,
        parts: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Diagnostics of one batch, over all ranks.

        A falling `log_prob/chosen` is how DPO goes wrong while its loss looks well; and so is a policy that prefers the
        longer response in more pairs (`longer/reward`, of those of unequal length) than the labels do (`longer/label`).
        """
        chosen_length, rejected_length = lengths.chunk(2)
        values = {
            "log_prob/chosen": chosen,
            "log_prob/rejected": rejected,
            "log_ratio/chosen": chosen_ratios,
            "log_ratio/rejected": rejected_ratios,
            "reward/margin": self.beta * (chosen_ratios - rejected_ratios),
            "reward/accuracy": (chosen_ratios > rejected_ratios).float(),
            "length/chosen": chosen_length,
            "length/rejected": rejected_length,
            "longer/reward": _of_the_longer(chosen_ratios > rejected_ratios, chosen_length, rejected_length),
            "longer/label": _of_the_longer(torch.ones_like(chosen).bool(), chosen_length, rejected_length),
            **parts,
        }
        # One value a pair: TRL's mean over what is appended is then a mean over the step's pairs, or all that are
        # measured. (In training `gather_for_metrics`, which drops what a last batch was filled up with, would drop
        # some in the last step of an epoch, whose micro-batches are fetched in advance.)
        mode = "train" if self.model.training else "eval"
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        gathered = gather(torch.stack([value.float() for value in values.values()], dim=1))
        for name, column in zip(values, gathered.T.tolist(), strict=True):
            if known := [value for value in column if not math.isnan(value)]:
                self._metrics[mode][name].extend(known)


def _of_the_longer(prefers_chosen: Tensor, chosen_length: Tensor, rejected_length: Tensor) -> Tensor:
    """(pairs,): 1 where the longer response is preferred, 0 where the shorter one is, NaN where none is longer."""
    longer = (prefers_chosen == (chosen_length > rejected_length)).float()
    return longer.masked_fill(chosen_length == rejected_length, math.nan)


def language_model(trainer: Trainer, model: Any) -> PreTrainedModel:
    """The model below DeepSpeed's engine and its adapter: where TRL, too, puts its head."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[no-any-return]


def _labels(examples: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([example["p_chosen"] for example in examples], dtype=torch.float32)
