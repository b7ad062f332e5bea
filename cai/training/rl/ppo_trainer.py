"""Proximal policy optimisation on transformers' Trainer: rollouts, and clipped updates from them.

Schulman et al. 2017 (arXiv 1707.06347) as it is used on language models by Ouyang et al. 2022 (arXiv 2203.02155): the
score stands at a response's last token, every token pays for its KL to the reference, advantages are estimated by GAE
and whitened over the whole rollout, and policy and value function are clipped.

One epoch of the Trainer is one rollout: its data are slots, (passes x episodes) of them, and which episode stands in a
slot is drawn from seed, rollout and pass. So checkpoints, resuming, schedules, logging, DeepSpeed and callbacks are the
Trainer's own, and a run that is killed anywhere goes on, on one CPU process, with the numbers of an undisturbed one,
where vLLM draws up to how that rounds. A step's loss is the mean over its learned tokens, however micro-batches and
ranks split them.

Left out: actions other than tokens, rollouts that run ahead of the learner, several responses a prompt in one rollout
(`rloo` is for that).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl.distributed import DistributedBackend

from cai.attention.cpu_kernels import give_back_freed_memory
from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.training_config import Limits
from cai.maths import losses
from cai.storage.rows import Failure, Prompt, stable_seed
from cai.text.errors import StageFailed
from cai.training.loop import newest_checkpoint
from cai.training.metrics import keep_rows
from cai.training.rl.actor_critic import ActorCritic
from cai.training.rl.early_stopping import SAMPLES, check, repetition, write_samples
from cai.training.rl.policy_sampler import Sampler
from cai.training.rl.ppo_config import PPOConfig
from cai.training.rl.rewards import Response
from cai.training.rl.rollouts import Episode, Rollout, Sequences, sequences


class Scores(Protocol):
    """What responses are worth: `cai.training.rl.rewards.Rewards`, or anything that answers alike."""

    def scores(self, responses: Sequence[Response]) -> list[dict[str, float] | Failure]: ...

    def total(self, scores: Mapping[str, float]) -> float: ...


class _Slots(Dataset[int]):
    """The places of one rollout's passes."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class PPOTrainer(Trainer):  # type: ignore[misc]
    """`prompts` are drawn without replacement until all have been, then anew.

    `reference` is a frozen model that scores like `ActorCritic`'s (`add_scoring`), the string "adapter off", or None
    for no KL at all. Responses are drawn by `sampler` and valued by `rewards`; both run on every rank, on its share.
    """

    loss_is_scaled_for_ga = True
    """Tells Trainer that a loss has been divided by all of the step's tokens."""

    def __init__(
        self,
        model: ActorCritic,
        args: PPOConfig,
        *,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        rewards: Scores,
        reference: PreTrainedModel | str | None,
        rollout_size: int,
        sampling: Sampling,
        pad_id: int,
        folder: Path,
        limits: Limits,
        processing_class: Any = None,
    ) -> None:
        self.prompts, self.sampler, self.rewards, self.reference = prompts, sampler, rewards, reference
        self.rollout_size, self.sampling, self.pad_id = rollout_size, sampling, pad_id
        self.folder, self.limits = folder, limits
        self.rollout: Rollout | None = None
        self.kl_coef = args.kl_coef
        self.first: dict[str, float] | None = None
        """Figures of the first rollout."""
        self._order: list[int] = []
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Slots(args.num_ppo_epochs * rollout_size),
            data_collator=lambda slots: {"slots": torch.tensor(slots)},
            processing_class=processing_class,
        )
        self.add_callback(_RollOut(self))

    # What happens once a rollout.

    def roll_out(self, number: int) -> None:
        """Draws and values the responses of a rollout; one that a checkpoint brought along is taken as it is."""
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self._gathered(number, self._scored(self._drawn(number)))
            figures = self._learnable(self.rollout)
            self.first = self.first or figures
            self._log_rollout(figures)
            check(self.limits, self.first, figures, number, newest_checkpoint(self.folder))
        self._order = self._slots_of(self.rollout)

    def _drawn(self, number: int) -> list[tuple[int, Episode, Prompt]]:
        """(place in the rollout, episode, prompt) of this rank's share."""
        assert isinstance(self.model, ActorCritic)
        gather = DistributedBackend(self.accelerator).gather_params
        self.sampler.update(self.model.policy, gather)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = [(place, self._prompt(number, place)) for place in range(rank, self.rollout_size, ranks)]
        requests = [
            Request(
                str(place), prompt["messages"], stable_seed(self.args.seed, "rollout", number, place), self.sampling
            )
            for place, prompt in share
        ]
        found: dict[str, Completion] = {}
        for result in self.sampler.draw(requests):
            if isinstance(result, Failure):
                raise StageFailed(f"a response could not be drawn: {result.reason}")
            found[result.id] = result
        self.sampler.release()
        drawn = []
        for place, prompt in share:
            each = found[str(place)]
            episode = Episode(
                prompt["id"], each.prompt_ids, each.token_ids, each.text, each.finish_reason == "stop", each.log_probs
            )
            drawn.append((place, episode, prompt))
        return drawn

    def _prompt(self, number: int, place: int) -> Prompt:
        """The prompt at a place of a rollout: all prompts are gone through in an order of their own each time."""
        again, index = divmod(number * self.rollout_size + place, len(self.prompts))
        return self.prompts[_permutation(len(self.prompts), stable_seed(self.args.seed, "prompts", again))[index]]

    def _scored(self, drawn: Sequence[tuple[int, Episode, Prompt]]) -> list[tuple[int, Episode]]:
        """The share with rewards, and with what policy, value function and reference say of it."""
        responses = [
            Response(prompt, each.text, each.prompt_ids, each.token_ids, each.finished) for _, each, prompt in drawn
        ]
        for (_, episode, _), result in zip(drawn, self.rewards.scores(responses), strict=True):
            if not isinstance(result, Failure):
                episode.scores, episode.score = dict(result), self.rewards.total(result)
        # Batches of a fixed number of rows, as many on each rank: under ZeRO-3 every forward pass is a common one.
        order = sorted((episode for _, episode, _ in drawn), key=lambda each: -each.length)
        size = self.args.per_device_train_batch_size
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(order), size):
                self._score(order[start : start + size])
        return [(place, episode) for place, episode, _ in drawn]

    def _score(self, episodes: Sequence[Episode]) -> None:
        batch = sequences(episodes, self.pad_id, self.args.device)
        now = self.model_wrapped(batch.input_ids, batch.attention_mask, batch.labels)
        rows = {"log_probs": batch.rows(now.log_probs), "values": batch.rows(now.values)}
        rows["ref_log_probs"] = rows["log_probs"] if self.reference is None else batch.rows(self._reference_of(batch))
        for name, values in rows.items():
            for episode, each in zip(episodes, values, strict=True):
                setattr(episode, name, each)

    def _reference_of(self, batch: Sequences) -> Tensor:
        """The reference's log-probabilities, (batch, seq − 1)."""
        if isinstance(self.reference, str):
            policy = self.accelerator.unwrap_model(self.model).policy
            with policy.disable_adapter():
                return self.model_wrapped(  # type: ignore[no-any-return]
                    batch.input_ids, batch.attention_mask, batch.labels, valued=False
                ).log_probs
        assert self.reference is not None
        with self.accelerator.autocast():
            return self.reference(  # type: ignore[no-any-return]
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, fused_lm_head=True
            ).log_probs

    def _gathered(self, number: int, share: list[tuple[int, Episode]]) -> Rollout:
        """The shares of all ranks, in the order of their places."""
        shares = [share]
        if self.accelerator.num_processes > 1:
            shares = [[] for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(shares, share)
        placed = sorted((each for some in shares for each in some), key=lambda each: each[0])
        return Rollout(number, [episode for _, episode in placed])

    def _learnable(self, rollout: Rollout) -> dict[str, float]:
        """Fills in advantages and adapts the KL's coefficient. The rollout's figures.

        Raises StageFailed where not one reward came about.
        """
        args, learned = self.args, rollout.learned
        if not learned:
            raise StageFailed(f"no reward came about for any of the {len(rollout.episodes)} responses of a rollout")
        rollout.estimate_advantages(
            kl_coefficient=self.kl_coef,
            estimator=args.kl_estimator,
            gamma=args.gamma,
            lam=args.lam,
            missing_end=args.missing_eos_penalty,
        )
        kl = float(rollout.kl(args.kl_estimator))
        reward = fmean(each.score for each in learned if each.score is not None)
        unfinished = fmean(not each.finished for each in learned)
        names = dict.fromkeys(name for each in learned for name in each.scores)
        explained = rollout.explained_variance()
        gaps: list[Tensor] = []
        if self.sampling.temperature == 1:  # the engine gives those of the undivided logits
            gaps = [(torch.tensor(each.sampled_log_probs) - each.log_probs).abs().mean() for each in learned]
        figures = {
            "reward": reward,
            **{f"reward/{name}": fmean(each.scores[name] for each in learned) for name in names},
            "objective": reward - self.kl_coef * kl - args.missing_eos_penalty * unfinished,
            "kl": kl,
            "kl/coefficient": self.kl_coef,
            "length": fmean(len(each.token_ids) for each in learned),
            "unfinished": unfinished,
            "repetition": fmean(repetition(each.token_ids) for each in learned),
            **({} if explained is None else {"value/explained_variance": explained}),
            "failed": float(len(rollout.episodes) - len(learned)),
            **({"sampler_gap": float(torch.stack(gaps).mean())} if gaps else {}),
        }
        if args.kl_target is not None:
            error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * len(learned) / args.kl_horizon
        return figures

    def _log_rollout(self, figures: Mapping[str, float]) -> None:
        assert self.rollout is not None
        for name, value in figures.items():
            self._sums[name].append(torch.tensor([value, 1.0], dtype=torch.float64))
        if self.is_world_process_zero():
            rows = [
                {
                    "rollout": self.rollout.number,
                    "prompt_id": each.prompt_id,
                    "response": each.text,
                    "finished": each.finished,
                    "score": each.score,
                    "scores": each.scores,
                    "kl": float((each.log_probs - each.ref_log_probs).sum()),
                }
                for each in self.rollout.episodes
            ]
            write_samples(self.folder, rows)

    # What happens once a step.

    def _slots_of(self, rollout: Rollout) -> list[int]:
        """Which episode stands in each slot. A step's are sorted by length, so that its micro-batches pad little."""
        size = self._step_size
        slots: list[int] = []
        for again in range(self.args.num_ppo_epochs):
            order = _permutation(len(rollout.episodes), stable_seed(self.args.seed, "pass", rollout.number, again))
            for start in range(0, len(order), size):
                slots += sorted(order[start : start + size], key=lambda index: -rollout.episodes[index].length)
        return slots

    @property
    def steps_a_rollout(self) -> int:
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
        """Learned tokens in all micro-batches of this step, over all ranks: every rank knows them."""
        assert self.rollout is not None
        size, episodes = self._step_size, self.rollout.episodes
        start = int(batch_samples[0]["slots"][0]) // size * size
        tokens = sum(episodes[index].n_learned for index in self._order[start : start + size])
        return torch.tensor(max(tokens, 1), device=device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.rollout is not None
        args = self.args
        episodes = [self.rollout.episodes[self._order[slot]] for slot in inputs["slots"].tolist()]
        batch = sequences(episodes, self.pad_id, args.device)
        now = model(batch.input_ids, batch.attention_mask, batch.labels)
        old_log_probs, old_values, advantages, returns = (
            batch.spread([getattr(each, name) for each in episodes])
            for name in ("log_probs", "values", "advantages", "returns")
        )
        learned = torch.tensor([each.score is not None for each in episodes], device=args.device)
        mask = batch.mask & learned[:, None]
        policy = losses.clipped_policy(now.log_probs, old_log_probs, advantages, args.cliprange)
        value_clip = math.inf if args.cliprange_value is None else args.cliprange_value
        value = losses.clipped_value(now.values, old_values, returns, value_clip)
        per_token = (policy + args.vf_coef * value).masked_fill(~mask, 0.0)
        with torch.no_grad():
            moved = (now.log_probs - old_log_probs).exp() - 1
            self._record(
                {
                    "policy/loss": policy,
                    "policy/clip_fraction": (moved.abs() > args.cliprange).float(),
                    "policy/approx_kl": losses.kl_estimate(old_log_probs, now.log_probs, "k3"),
                    "policy/entropy": now.entropy,
                    "value/loss": value,
                    "value/clip_fraction": ((now.values - old_values).abs() > value_clip).float(),
                },
                mask,
            )
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(batch.attention_mask.sum(), "sum"))
        # Gradients are averaged over the ranks; the tokens are all of them.
        return per_token.sum() / num_items_in_batch * self.accelerator.num_processes

    def _record(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Adds (sum, tokens) of each value over all ranks."""
        counted = [*values.values(), torch.ones_like(mask)]
        *sums, tokens = self.accelerator.reduce(
            torch.stack([each[mask].double().sum() for each in counted]), "sum"
        ).cpu()
        for name, each in zip(values, sums, strict=True):
            self._sums[name].append(torch.stack([each, tokens]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means of what was recorded since the last logged step."""
        if "loss" in logs:
            for name, pairs in self._sums.items():
                total, count = torch.stack(pairs).sum(dim=0).tolist()
                logs[name] = total / max(count, 1.0)
            self._sums.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with the value function's own weights in groups of a higher learning rate."""
        known = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        assert isinstance(self.model, ActorCritic)
        if known or self.model.critic is not None:
            return optimizer
        own = {id(each) for each in self.model.value_parameters}
        for group in list(optimizer.param_groups):
            if values := [each for each in group["params"] if id(each) in own]:
                group["params"] = [each for each in group["params"] if id(each) not in own]
                rate = group["lr"] * self.args.value_lr_multiple
                optimizer.add_param_group({**group, "params": values, "lr": rate})
        return optimizer

    # Checkpoints.

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
            self.rollout.save(folder, {**(self.first or {}), "kl_coef": self.kl_coef})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, ActorCritic)
        self.model.load(Path(resume_from_checkpoint))

    def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        """Trains; from a checkpoint, with the rollout that it was in the middle of."""
        if self.args.device.type == "cpu":
            give_back_freed_memory()
        if resume_from_checkpoint:
            self.rollout, numbers = Rollout.load(Path(resume_from_checkpoint))
            self.kl_coef = numbers.pop("kl_coef")
            self.first = numbers
        if self.is_world_process_zero():
            last = -1 if self.rollout is None else self.rollout.number
            keep_rows(self.folder / SAMPLES, lambda row: row["rollout"] <= last)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)


class _RollOut(TrainerCallback):  # type: ignore[misc]
    """Rolls out before each epoch."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.roll_out(state.global_step // self.trainer.steps_a_rollout)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int) -> tuple[int, ...]:
    """A shuffle of 0 … n − 1 that depends on `seed` alone. Asked for once a prompt, so the latest ones are kept."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(n, generator=generator).tolist())
