"""Proximal policy optimisation on transformers' Trainer: rollouts, and clipped updates from them.

Schulman et al. 2017 (arXiv 1707.06347) as it is used on language models by Ouyang et al. 2022 (arXiv 2203.02155): the
score stands at a response's last token, every token pays for its KL to the reference, advantages are estimated by GAE
and whitened over the whole rollout, and the losses of policy and value function are clipped.

One epoch of the Trainer is one rollout. Its data are (passes × episodes) slots, and seed, rollout and pass decide which
episode stands in a slot. So resume points, schedules, logging, DeepSpeed and callbacks are the Trainer's own, and on
one CPU process a run that is killed anywhere continues with the numbers of an undisturbed one (where vLLM samples, up
to its rounding). A step's loss is the mean over its learned tokens, however micro-batches and ranks split them.

Left out: actions other than tokens, rollouts that run ahead of the learner, several responses to a prompt in one
rollout (`rloo` is for that).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl.distributed import DistributedBackend

from cai.contracts.engine import Request, Sampling
from cai.contracts.training_config import Limits
from cai.maths import losses
from cai.models.loading import unpartitioned
from cai.storage.rows import Failure, Prompt, stable_seed
from cai.text.progress import Progress, part_counter
from cai.training.dropout import disable_dropout
from cai.training.loop import newest_resume_point
from cai.training.metrics import keep_rows
from cai.training.rl.actor_critic import ActorCritic
from cai.training.rl.early_stopping import (
    SAMPLES,
    repetition,
    stop_if_limits_passed,
    stop_if_rewards_failed,
    write_samples,
)
from cai.training.rl.policy_sampler import Sampler, generate_all
from cai.training.rl.ppo_config import PPOConfig
from cai.training.rl.rewards import Response
from cai.training.rl.rollouts import Episode, EpisodeBatch, Rollout, pad_episodes


class Scores(Protocol):
    """What responses are worth: `cai.training.rl.rewards.Rewards`, or anything with its methods."""

    def scores(
        self, responses: Sequence[Response], *, on_answer: Callable[[float], None]
    ) -> list[dict[str, float] | Failure]: ...

    def total(self, scores: Mapping[str, float]) -> float: ...


class PPOTrainer(Trainer):  # type: ignore[misc]
    """Prompts are taken without replacement until all have been used, then again in a new order.

    `reference` is a frozen model with `add_log_prob_head`, the string "adapter off", or None for no KL at all. Both
    `sampler` and `rewards` run on every rank, on its share of a rollout.
    """

    loss_is_scaled_for_ga = True
    """Tells Trainer that a loss has been divided by all of the step's tokens."""

    def __init__(
        self, model: ActorCritic, args: PPOConfig, *, prompts: Sequence[Prompt], sampler: Sampler, rewards: Scores,
        reference: PreTrainedModel | str | None, rollout_size: int, sampling: Sampling, pad_id: int, folder: Path,
        limits: Limits, processing_class: Any = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.prompts, self.sampler, self.rewards, self.reference = prompts, sampler, rewards, reference
        if isinstance(reference, PreTrainedModel):
            disable_dropout(reference)
        self.rollout_size, self.sampling, self.pad_id = rollout_size, sampling, pad_id
        self.folder, self.limits, self.progress = folder, limits, progress
        self.rollout: Rollout | None = None
        self.kl_coef = args.kl_coef
        self.first_figures: dict[str, float] | None = None
        """Figures of the first rollout, which later ones are compared with."""
        self.n_scored = 0
        """Responses of this process's rollouts, over all ranks; those before a resume point are not among them."""
        self.reward_failures: list[Failure] = []
        """Why some of these have no reward."""
        self._episode_of_slot: list[int] = []
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        """(sum, count) tensors of each metric since the last logged step."""
        all_slots = range(args.num_ppo_epochs * rollout_size)
        super().__init__(
            model=model, args=args, train_dataset=all_slots, processing_class=processing_class,
            data_collator=lambda slots: {"slots": torch.tensor(slots)},
        )  # fmt: skip
        self.add_callback(_RolloutCallback(self))

    # Once a rollout: sample, score, estimate advantages.

    def roll_out(self, number: int) -> None:
        """Makes rollout `number`, unless a resume point has brought it, and checks it against the limits."""
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self._gather_rollout(number, self._score_share(number, self._sample_share(number)))
            failures = [episode.failure for episode in self.rollout.episodes if episode.failure is not None]
            resume_point = newest_resume_point(self.folder)
            stop_if_rewards_failed(self.limits, self.rollout_size, failures, number, resume_point)
            self.reward_failures += failures
            self.n_scored += self.rollout_size
            figures = self._estimate_advantages(self.rollout)
            self.first_figures = self.first_figures or figures
            self._log_rollout(figures)
            stop_if_limits_passed(self.limits, self.first_figures, figures, number, resume_point)
        self._episode_of_slot = self._order_episodes(self.rollout)

    def _sample_share(self, number: int) -> list[tuple[int, Episode, Prompt]]:
        """(place in the rollout, episode, prompt) of this rank's share."""
        assert isinstance(self.model, ActorCritic)
        self.sampler.update(self.model.policy, DistributedBackend(self.accelerator).gather_params)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        prompts = {place: self._prompt_at(number, place) for place in range(rank, self.rollout_size, ranks)}
        requests = []
        for place, prompt in prompts.items():
            seed = stable_seed(self.args.seed, "rollout", number, place)
            requests.append(Request(str(place), prompt["messages"], seed, self.sampling))
        count = part_counter(self.progress, len(requests), f"responses of rollout {number + 1}")
        completions = generate_all(self.sampler, requests, lambda: count(1))
        return [
            (place, Episode.of(prompt["id"], completion), prompt)
            for (place, prompt), completion in zip(prompts.items(), completions, strict=True)
        ]

    def _prompt_at(self, number: int, place: int) -> Prompt:
        """The prompt at a place of rollout `number`; every pass over the prompts has an order of its own."""
        prompt_pass, index = divmod(number * self.rollout_size + place, len(self.prompts))
        return self.prompts[_permutation(len(self.prompts), stable_seed(self.args.seed, "prompts", prompt_pass))[index]]

    def _score_share(self, number: int, share: Sequence[tuple[int, Episode, Prompt]]) -> list[tuple[int, Episode]]:
        """The share with rewards, log-probabilities of policy and reference, and values."""
        responses = [
            Response(prompt, episode.text, episode.prompt_ids, episode.token_ids, episode.finished)
            for _, episode, prompt in share
        ]
        count = part_counter(self.progress, len(share), f"rewards of rollout {number + 1}")
        for (_, episode, _), scores in zip(share, self.rewards.scores(responses, on_answer=count), strict=True):
            if isinstance(scores, Failure):
                episode.failure = scores
            else:
                episode.scores, episode.score = dict(scores), self.rewards.total(scores)
        # Every rank computes equally many batches of a fixed number of rows: ZeRO-3 gathers weights in each of them.
        by_length = sorted((episode for _, episode, _ in share), key=lambda episode: -episode.length)
        size = self.args.per_device_train_batch_size
        self.model_wrapped.eval()
        count = part_counter(self.progress, len(share), f"log-probabilities of rollout {number + 1}")
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(by_length), size):
                self._add_log_probs_and_values(by_length[start : start + size])
                count(len(by_length[start : start + size]))
        return [(place, episode) for place, episode, _ in share]

    def _add_log_probs_and_values(self, episodes: Sequence[Episode]) -> None:
        batch = pad_episodes(episodes, self.pad_id, self.args.device)
        output = self.model_wrapped(batch.input_ids, batch.attention_mask, batch.labels)
        log_probs, values = batch.split(output.log_probs), batch.split(output.values)
        ref_log_probs = log_probs if self.reference is None else batch.split(self._reference_log_probs(batch))
        for row, episode in enumerate(episodes):
            episode.log_probs, episode.values, episode.ref_log_probs = log_probs[row], values[row], ref_log_probs[row]

    def _reference_log_probs(self, batch: EpisodeBatch) -> Tensor:
        """(batch, seq − 1), in nats."""
        ids, mask, labels = batch.input_ids, batch.attention_mask, batch.labels
        if isinstance(self.reference, str):
            with self.accelerator.unwrap_model(self.model).policy.disable_adapter():
                return self.model_wrapped(ids, mask, labels, with_values=False).log_probs  # type: ignore[no-any-return]
        assert self.reference is not None
        with self.accelerator.autocast(), unpartitioned():
            output = self.reference(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return output.log_probs  # type: ignore[no-any-return]

    def _gather_rollout(self, number: int, share: list[tuple[int, Episode]]) -> Rollout:
        """The shares of all ranks, in the order of their places."""
        shares = [share]
        if self.accelerator.num_processes > 1:
            shares = [[] for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(shares, share)
        episodes = dict(place_and_episode for rank_share in shares for place_and_episode in rank_share)
        return Rollout(number, [episodes[place] for place in sorted(episodes)])

    def _estimate_advantages(self, rollout: Rollout) -> dict[str, float]:
        """Fills in advantages and adapts the KL's coefficient. Returns the rollout's figures."""
        args, learned = self.args, rollout.learned
        rollout.estimate_advantages(
            kl_coefficient=self.kl_coef, gamma=args.gamma, lam=args.lam, missing_end=args.missing_eos_penalty
        )
        kl = float(rollout.kl(args.kl_estimator))
        reward = fmean(episode.score for episode in learned if episode.score is not None)
        unfinished = fmean(not episode.finished for episode in learned)
        sources = dict.fromkeys(name for episode in learned for name in episode.scores)
        explained_variance = rollout.explained_variance()
        figures = {
            "reward": reward,
            **{f"reward/{name}": fmean(episode.scores[name] for episode in learned) for name in sources},
            "objective": reward - self.kl_coef * float(rollout.kl("k1")) - args.missing_eos_penalty * unfinished,
            "kl": kl,
            "kl/coefficient": self.kl_coef,
            "length": fmean(len(episode.token_ids) for episode in learned),
            "unfinished": unfinished,
            "repetition": fmean(repetition(episode.token_ids) for episode in learned),
            **({} if explained_variance is None else {"value/explained_variance": explained_variance}),
            "failed": float(len(rollout.episodes) - len(learned)),
        }
        if self.sampling.temperature == 1:  # the engine reports log-probabilities at temperature 1
            gaps = [(torch.tensor(episode.sampled_log_probs) - episode.log_probs).abs().mean() for episode in learned]
            figures["sampler_gap"] = float(torch.stack(gaps).mean())
        if args.kl_target is not None:
            error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * len(learned) / args.kl_horizon
        return figures

    def _log_rollout(self, figures: Mapping[str, float]) -> None:
        assert self.rollout is not None
        for name, value in figures.items():
            self._sums[name].append(torch.tensor([value, 1.0], dtype=torch.float64))
        if self.is_world_process_zero():
            number = self.rollout.number
            rows = [
                {
                    "rollout": number, "prompt_id": episode.prompt_id, "response": episode.text,
                    "finished": episode.finished, "score": episode.score, "scores": episode.scores,
                    "kl": float((episode.log_probs - episode.ref_log_probs).sum()),
                }
                for episode in self.rollout.episodes
            ]  # fmt: skip
            write_samples(self.folder, rows)

    # Once a step: clipped losses.

    def _order_episodes(self, rollout: Rollout) -> list[int]:
        """The episode in each slot. A step's episodes are sorted by length, so that its micro-batches pad little."""
        size = self._step_size
        order: list[int] = []
        for epoch in range(self.args.num_ppo_epochs):
            shuffled = _permutation(len(rollout.episodes), stable_seed(self.args.seed, "pass", rollout.number, epoch))
            for start in range(0, len(shuffled), size):
                order += sorted(shuffled[start : start + size], key=lambda index: -rollout.episodes[index].length)
        return order

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that learn from one rollout."""
        return len(self.train_dataset) // self._step_size

    @property
    def _step_size(self) -> int:
        """Episodes in an optimizer step, over all ranks."""
        args = self.args
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Learned tokens in all micro-batches of this step, over all ranks; every rank holds the whole rollout."""
        assert self.rollout is not None
        size, episodes = self._step_size, self.rollout.episodes
        start = int(batch_samples[0]["slots"][0]) // size * size
        n_tokens = sum(episodes[index].n_learned_tokens for index in self._episode_of_slot[start : start + size])
        return torch.tensor(max(n_tokens, 1), device=device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.rollout is not None
        args = self.args
        episodes = [self.rollout.episodes[self._episode_of_slot[slot]] for slot in inputs["slots"].tolist()]
        batch = pad_episodes(episodes, self.pad_id, args.device)
        output = model(batch.input_ids, batch.attention_mask, batch.labels)
        old_log_probs, old_values, advantages, returns = (
            batch.scatter([getattr(episode, name) for episode in episodes])
            for name in ("log_probs", "values", "advantages", "returns")
        )
        learned = torch.tensor([episode.score is not None for episode in episodes], device=args.device)
        mask = batch.response_mask & learned[:, None]
        policy = losses.clipped_policy(output.log_probs, old_log_probs, advantages, args.cliprange)
        value_clip = math.inf if args.cliprange_value is None else args.cliprange_value
        value = losses.clipped_value(output.values, old_values, returns, value_clip)
        per_token = (policy + args.vf_coef * value).masked_fill(~mask, 0.0)
        with torch.no_grad():
            ratio_change = (output.log_probs - old_log_probs).exp() - 1
            metrics = {
                "policy/loss": policy,
                "policy/clip_fraction": (ratio_change.abs() > args.cliprange).float(),
                "policy/approx_kl": losses.kl_estimate(old_log_probs, output.log_probs, "k3"),
                "policy/entropy": output.entropy,
                "value/loss": value,
                "value/clip_fraction": ((output.values - old_values).abs() > value_clip).float(),
            }
            self._record(metrics, mask)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(batch.attention_mask.sum(), "sum"))
        # `num_items_in_batch` counts the tokens of all ranks, and gradients are averaged over ranks.
        return per_token.sum() / num_items_in_batch * self.accelerator.num_processes

    def _record(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Adds (sum over tokens, number of tokens) of each metric over all ranks."""
        per_token = [*values.values(), torch.ones_like(mask)]
        own_sums = torch.stack([value[mask].double().sum() for value in per_token])
        *sums, n_tokens = self.accelerator.reduce(own_sums, "sum").cpu()
        for name, total in zip(values, sums, strict=True):
            self._sums[name].append(torch.stack([total, n_tokens]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means of what was recorded since the last logged step."""
        if "loss" in logs:
            for name, pairs in self._sums.items():
                total, count = torch.stack(pairs).sum(dim=0).tolist()
                logs[name] = total / max(count, 1.0)
            self._sums.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with the value head's weights in parameter groups of a higher learning rate."""
        exists = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        assert isinstance(self.model, ActorCritic)
        if exists or self.model.critic is not None:
            return optimizer
        value_ids = {id(parameter) for parameter in self.model.value_parameters}
        for group in list(optimizer.param_groups):
            if values := [parameter for parameter in group["params"] if id(parameter) in value_ids]:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in value_ids]
                learning_rate = group["lr"] * self.args.value_lr_multiple
                optimizer.add_param_group({**group, "params": values, "lr": learning_rate})
        return optimizer

    # Resume points.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        assert isinstance(self.model, ActorCritic)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.rollout is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.rollout.save(folder, {**(self.first_figures or {}), "kl_coef": self.kl_coef})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, ActorCritic)
        self.model.load(Path(resume_from_checkpoint))

    def train(self, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        """Trains; from a resume point, with the rollout that it belongs to."""
        if resume_from_checkpoint:
            self.rollout, numbers = Rollout.load(Path(resume_from_checkpoint))
            self.kl_coef = numbers.pop("kl_coef")
            self.first_figures = numbers
        if self.is_world_process_zero():
            last = -1 if self.rollout is None else self.rollout.number
            keep_rows(self.folder / SAMPLES, lambda row: row["rollout"] <= last)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)


class _RolloutCallback(TrainerCallback):  # type: ignore[misc]
    """Makes a rollout before each epoch."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.roll_out(state.global_step // self.trainer.steps_per_rollout)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> tuple[int, ...]:
    """A shuffle of 0 … n − 1 that depends on `seed` alone. Cached, since `_prompt_at` needs it once a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(n, generator=generator).tolist())
