"""TRL's RLOO trainer, changed only where it must be.

REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): of n responses to a prompt, each is
worth its reward, less the policy's divergence from the reference, less the mean of the other n - 1. TRL's loss treats
the whole response as one action and clips its probability ratio.

What differs from TRL: an inference copy of the policy samples (`cai.training.rl.policy_sampler`) and its token ids are
learned from as they are; rewards are `cai.training.rl.rewards`, and a response without one takes no part in its
prompt's baseline; the reference is the one that the stage passes, or the policy without its adapter; forward passes
group rows of similar length, which saves padding; every response has its own seed; and `cai.training.rl.early_stopping`
compares each rollout with the first logged step. A resume point holds what is still to be learned from the last
rollout. tests/training/test_trainers.py checks TRL's private names that are used here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import RLOOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from cai.attention.cpu_lm_head import add_cpu_lm_head
from cai.contracts.engine import Request, Sampling
from cai.contracts.training_config import Limits
from cai.storage.rows import Failure, Prompt, stable_seed
from cai.text.errors import StageFailed
from cai.text.progress import Progress, part_counter
from cai.training.dropout import disable_dropout
from cai.training.loop import newest_resume_point
from cai.training.metrics import keep_rows
from cai.training.rl.early_stopping import (
    SAMPLES,
    repetition,
    stop_if_limits_passed,
    stop_if_rewards_failed,
    write_samples,
)
from cai.training.rl.policy_sampler import Sampler, generate_all
from cai.training.rl.rewards import Response, Rewards
from cai.training.trainers import PromptSteps, SamplerEpochCallback, StageTrainerMixin, language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLLOUTS = "rollouts-{}.safetensors"
"""In a resume point, one file a rank: what the next steps learn from."""
METRIC_NAMES = {
    "completions/mean_length": "length",
    "completions/max_length": "length/max",
    "completions/clipped_ratio": "unfinished",
    "clip_ratio/region_mean": "clip_fraction",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/equal",
}
"""TRL's names of metrics to this package's."""
KEPT_METRICS = ("reward", "kl", "entropy", "repetition", "failed", "aux_loss")
"""Metrics that keep TRL's name; all others are not logged."""
LIMITED_METRICS = ("reward", "kl", "length", "unfinished", "repetition")
"""Figures that `cai.training.rl.early_stopping` compares."""


class LeaveOneOutTrainer(StageTrainerMixin, RLOOTrainer):  # type: ignore[misc]
    """Rows: `prompt`, the id of one of `prompts`. The reference is `reference`, or the policy without its adapter."""

    def __init__(
        self, *, prompts: Mapping[str, Prompt], rewards: Rewards, sampler: Sampler,
        reference: PreTrainedModel | None, end_ids: Sequence[int], folder: Path, limits: Limits, args: Any,
        progress: Progress | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.prompts, self.rewards, self.sampler = prompts, rewards, sampler
        self.folder, self.limits, self.progress = folder, limits, progress
        self.n_scored = 0
        """Responses of this process's rollouts, over all ranks; those before a resume point are not among them."""
        self.reward_failures: list[Failure] = []
        """Why some of these have no reward."""
        beta = args.beta
        args.beta = 0.0  # else TRL 1.16 loads a reference by the model's name, without the adapters merged into it
        reward_funcs = [_named_placeholder(name) for name in rewards.names]
        super().__init__(reward_funcs=reward_funcs, args=args, **options)
        args.beta = self.beta = beta
        self.eos_token_ids = sorted(end_ids)
        for model in (self.model, reference):
            if model is not None:
                disable_dropout(model)
        add_cpu_lm_head(language_model(self, self.model), entropy=True, temperature=self.temperature)
        if beta and reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            add_cpu_lm_head(reference, temperature=self.temperature)
            if self.is_deepspeed_enabled:
                self.ref_model = prepare_deepspeed(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSteps:
        args = self.args
        prompts_per_step = args.generation_batch_size // self.num_generations
        passes = self.num_iterations * args.steps_per_generation
        sampler = PromptSteps(len(self.train_dataset), prompts_per_step, self.num_generations, passes, args.data_seed)
        self.add_callback(SamplerEpochCallback(sampler))
        return sampler

    def _generate(self, prompts: list[str]) -> tuple[list[list[int]], list[list[int]], list[Response]]:
        """(prompt ids, sampled ids, responses) of this rank's part of the step; `prompts` are ids of prompts."""
        self.sampler.update(self.accelerator.unwrap_model(self.model), self._dist.gather_params)
        sampling = Sampling(self.max_completion_length, self.temperature)
        first = self.accelerator.process_index * len(prompts)
        requests = []
        for number, prompt_id in enumerate(prompts, first):
            seed = stable_seed(self.args.seed, self.state.global_step, prompt_id, number % self.num_generations)
            requests.append(Request(str(number), self.prompts[prompt_id]["messages"], seed, sampling))
        count = part_counter(self.progress, len(requests), f"responses of rollout {self._rollout + 1}")
        completions = generate_all(self.sampler, requests, lambda: count(1))
        responses = [
            Response.of(self.prompts[prompt_id], completion)
            for prompt_id, completion in zip(prompts, completions, strict=True)
        ]
        self._record_lengths(responses)
        prompt_ids = [response.prompt_ids for response in responses]
        return prompt_ids, [response.token_ids for response in responses], responses

    def _record_lengths(self, responses: Sequence[Response]) -> None:
        """Adds tokens seen, lengths, and shares of unfinished responses and repeated runs, over all ranks."""
        counts = [
            [len(response.prompt_ids), len(ids := response.token_ids), not response.finished, repetition(ids)]
            for response in responses
        ]
        gathered = self.accelerator.gather(torch.tensor(counts, device=self.accelerator.device))
        prompt, response, unfinished, repeated = gathered.T
        self.state.num_input_tokens_seen += int(prompt.sum() + response.sum())
        metrics = self._metrics["train"]
        metrics["completions/mean_length"].append(float(response.mean()))
        metrics["completions/max_length"].append(float(response.max()))
        metrics["completions/clipped_ratio"].append(float(unfinished.mean()))
        metrics["repetition"].append(float(repeated.mean()))

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Sequence[Response], completion_ids_list: Any
    ) -> Tensor:
        """The score of every response by every source, over all ranks, (responses, sources); NaN where one failed."""
        count = part_counter(self.progress, len(completions), f"rewards of rollout {self._rollout + 1}")
        results = self.rewards.scores(completions, on_answer=count)
        no_scores = dict.fromkeys(self.rewards.names, float("nan"))
        rows = [no_scores if isinstance(result, Failure) else result for result in results]
        if self.is_world_process_zero():
            samples = [
                {
                    "rollout": self._rollout, "prompt_id": response.prompt["id"], "response": response.text,
                    "finished": response.finished,
                    "score": None if isinstance(result, Failure) else self.rewards.total(result),
                    "scores": {} if isinstance(result, Failure) else result,
                }
                for response, result in zip(completions, results, strict=True)
            ]  # fmt: skip
            write_samples(self.folder, samples)
        table = torch.tensor([[row[name] for name in self.rewards.names] for row in rows])
        gathered: Tensor = self.accelerator.gather(table.to(self.accelerator.device))
        failures = gather_object([result for result in results if isinstance(result, Failure)])
        resume_point = newest_resume_point(self.folder)
        stop_if_rewards_failed(self.limits, len(gathered), failures, self._rollout, resume_point)
        self.reward_failures += failures
        self.n_scored += len(gathered)
        self._metrics["train"]["failed"].append(float(len(failures)))
        return gathered

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """TRL's, on `batch_size` rows of similar length at a time, without columns that are padding in all of them."""
        width = input_ids.shape[1]
        batch_size = min(batch_size or len(input_ids), len(input_ids))
        order = attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        parts: list[Tensor] = []
        entropies: Tensor | None = None
        aux_loss: Tensor | None = None
        for rows in torch.split(order, batch_size):
            used = attention_mask[rows].any(dim=0).nonzero()
            first, end = int(used[0]), int(used[-1]) + 1
            keep = logits_to_keep - (width - end)
            log_probs, part_entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, input_ids[rows, first:end], attention_mask[rows, first:end], keep, None, **options
            )
            parts.append(torch.nn.functional.pad(log_probs, (0, width - end)))
            if part_entropies is not None:
                entropies = torch.nn.functional.pad(part_entropies, (0, width - end))
        assert len(parts) == 1 or (entropies is None and aux_loss is None), "TRL wants these of one micro-batch only"
        original_order = order.argsort()
        entropies = None if entropies is None else entropies[original_order]
        return torch.cat(parts)[original_order], entropies, aux_loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """The part of the rollout that this step learns from; a new rollout where the last one is used up."""
        passes = self.args.steps_per_generation * self.num_iterations
        if self._step % passes == 0 or self._buffered_inputs is None:
            rollouts = self._generate_and_score_completions(generation_batch)
            self._check_limits()
            parts = split_by_length(rollouts, self.args.steps_per_generation)
            self._buffered_inputs: list[dict[str, Tensor]] | None = parts
        assert self._buffered_inputs is not None
        part: dict[str, Tensor] = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return part

    @property
    def _rollout(self) -> int:
        """The number of the rollout that this step learns from, counted from 0."""
        return int(self.state.global_step // self.num_iterations)

    def _check_limits(self) -> None:
        """Raises StageFailed where the newest responses must not be learned from."""
        metrics = self._metrics["train"]
        latest = {METRIC_NAMES.get(name, name): values[-1] for name, values in metrics.items() if values}
        current = {name: value for name, value in latest.items() if name in LIMITED_METRICS}
        current["kl"] = current["kl"] * current["length"] if self.beta else 0.0
        history = self.state.log_history
        first = history[0] if history else current
        stop_if_limits_passed(self.limits, first, current, self._rollout, newest_resume_point(self.folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._step % (self.args.steps_per_generation * self.num_iterations) and self._buffered_inputs is not None:
            parts = enumerate(self._buffered_inputs)
            tensors = {f"{n}.{name}": tensor.contiguous().cpu() for n, part in parts for name, tensor in part.items()}
            save_file(tensors, self._rollouts(f"{self.args.output_dir}/checkpoint-{self.state.global_step}"))

    def train(self, resume_from_checkpoint: str | None = None, **options: Any) -> Any:
        """Trains. Samples that a killed run wrote after the resume point are written again."""
        if self.is_world_process_zero():
            step = int(resume_from_checkpoint.rpartition("-")[2]) if resume_from_checkpoint else 0
            keep_rows(self.folder / SAMPLES, lambda row: row["rollout"] * self.num_iterations < step)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer calls this when it has restored everything else of a resume point: the rollout is restored here."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        n_saved, n_processes = len(list(Path(checkpoint).glob(ROLLOUTS.format("*")))), self.accelerator.num_processes
        if n_saved not in {0, n_processes}:
            raise StageFailed(
                f"{Path(checkpoint).name} lies between two passes over responses that {n_saved} processes share, and "
                f"cannot be continued by {n_processes}: use a profile with as many as before, or start the stage again "
                f"with `--from`"
            )
        if (path := self._rollouts(checkpoint)).is_file():
            parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, tensor in load_file(path, device=str(self.accelerator.device)).items():
                number, _, key = name.partition(".")
                parts[int(number)][key] = tensor
            # The profile may have changed the micro-batch, and with it the number of parts, since they were written.
            rollouts = join_parts([parts[number] for number in sorted(parts)], self._tokenizer.pad_token_id)
            self._buffered_inputs = split_by_length(rollouts, self.args.steps_per_generation)

    def _rollouts(self, checkpoint: str) -> Path:
        return Path(checkpoint) / ROLLOUTS.format(self.accelerator.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        kept = {*METRIC_NAMES, *KEPT_METRICS}
        named = {METRIC_NAMES.get(name, name): values for name, values in metrics.items() if name in kept}
        named |= {f"reward/{name}": metrics[f"rewards/{name}/mean"] for name in self.rewards.names
                  if f"rewards/{name}/mean" in metrics}  # fmt: skip
        if "kl" in named:  # TRL logs the KL of a token, this package that of a response
            named["kl"] = [kl * length for kl, length in zip(named["kl"], named["length"], strict=True)]
        metrics.clear()
        metrics.update(named)
        super().log(logs, start_time)


def split_by_length(rollouts: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """A rollout in `count` parts of equally many rows, sorted by length, each padded to its own longest row.

    prompt_ids, prompt_mask: (rows, prompt), padded on the left; completion_ids, completion_mask: (rows, response),
    padded on the right; everything else: (rows,).
    """
    lengths = rollouts["prompt_mask"].sum(dim=1) + rollouts["completion_mask"].sum(dim=1)
    parts = []
    for rows in lengths.argsort(descending=True, stable=True).chunk(count):
        part = {name: tensor[rows] for name, tensor in rollouts.items()}
        prompt = int(part["prompt_mask"].sum(dim=1).max())
        response = max(1, int(part["completion_mask"].sum(dim=1).max()))
        for name in ("prompt_ids", "prompt_mask"):
            part[name] = part[name][:, part[name].shape[1] - prompt :]
        for name in ("completion_ids", "completion_mask"):
            part[name] = part[name][:, :response]
        parts.append(part)
    return parts


def join_parts(parts: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """The rollout that `split_by_length` split into these parts, its rows sorted by length."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
            width = max(tensor.shape[1] for tensor in tensors)
            value = pad_id if name.endswith("_ids") else 0
            for n, tensor in enumerate(tensors):
                missing = width - tensor.shape[1]
                side = (missing, 0) if name.startswith("prompt") else (0, missing)
                tensors[n] = torch.nn.functional.pad(tensor, side, value=value)
        joined[name] = torch.cat(tensors)
    return joined


def _named_placeholder(name: str) -> Any:
    """A stand-in for a source of reward in TRL's list, which takes only its name; see `_calculate_rewards`."""

    def source(**_: Any) -> list[float]:
        raise AssertionError("`_calculate_rewards` computes rewards")

    source.__name__ = name
    return source
