"""TRL's RLOO trainer, changed only where it must be.

REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740): of n responses to a prompt, each is
worth its reward, less the policy's divergence from the reference, less the mean of the other n - 1. TRL's loss takes
the whole response as one action and clips its probability's ratio.

What is different here: a copy of the policy draws (`cai.training.rl.policy_sampler`) and its token ids are learned from
as they are; rewards are `cai.training.rl.rewards`, and a response that has none takes no part in its prompt's baseline;
the reference is the one that the stage gives, or the policy without its adapter; rows of similar length are read
together, without the padding that the longest of all would cost; every response's randomness is its own; and
`cai.training.rl.early_stopping` looks at each rollout, held against the first step that was logged. What is still to be
learned from the last rollouts lies in the checkpoint, so that a resumed run goes on with them. TRL's private names used
here are held by tests/test_trainers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import RLOOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from cai.attention.cpu_kernels import add_lm_head
from cai.contracts.engine import Completion, Request, Sampling
from cai.contracts.training_config import Limits
from cai.storage.rows import Failure, Prompt, stable_seed
from cai.text.errors import StageFailed
from cai.training.arguments import without_dropout
from cai.training.loop import newest_checkpoint
from cai.training.metrics import keep_rows
from cai.training.rl.early_stopping import SAMPLES, check, repetition, write_samples
from cai.training.rl.policy_sampler import Sampler
from cai.training.rl.rewards import Response, Rewards
from cai.training.rl.usable_prompts import PromptSteps
from cai.training.trainers import Epochs, Quiet, language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLLOUTS = "rollouts-{}.safetensors"
"""In a checkpoint, for each rank: what the next steps learn from."""
NAMES = {
    "completions/mean_length": "length",
    "completions/max_length": "length/max",
    "completions/clipped_ratio": "unfinished",
    "clip_ratio/region_mean": "clip_fraction",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/equal",
}
"""TRL's names of what is logged to this package's; others stay, or are not logged."""
KEPT = ("reward", "kl", "entropy", "repetition", "failed", "aux_loss")
WATCHED = ("reward", "kl", "length", "unfinished", "repetition")
"""What `cai.training.rl.early_stopping` looks at."""


class LeaveOneOutTrainer(Quiet, RLOOTrainer):  # type: ignore[misc]
    """Rows: `prompt`, the id of one of `prompts`. The reference is `reference`, or the policy without its adapter."""

    def __init__(
        self, *, prompts: Mapping[str, Prompt], rewards: Rewards, sampler: Sampler,
        reference: PreTrainedModel | None, end_ids: Sequence[int], folder: Path, limits: Limits, args: Any, **more: Any,
    ) -> None:  # fmt: skip
        self.prompts, self.rewards, self.sampler = prompts, rewards, sampler
        self.folder, self.limits = folder, limits
        beta = args.beta
        args.beta = 0.0  # else TRL loads a reference by the model's name, which says nothing about merged adapters
        functions = [_named(name) for name in rewards.names]
        super().__init__(reward_funcs=functions, args=args, **more)
        args.beta = self.beta = beta
        self.eos_token_ids = sorted(end_ids)
        without_dropout(self.model)
        add_lm_head(language_model(self, self.model), entropy=True, temperature=self.temperature)
        if beta and reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            add_lm_head(reference, temperature=self.temperature)
            if self.is_deepspeed_enabled:
                self.ref_model = prepare_deepspeed(reference, self.accelerator)
            else:
                self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> PromptSteps:
        args = self.args
        at_once = args.generation_batch_size // self.num_generations
        passes = self.num_iterations * args.steps_per_generation
        sampler = PromptSteps(len(self.train_dataset), at_once, self.num_generations, passes, args.data_seed)
        self.add_callback(Epochs(sampler))
        return sampler

    def _generate(self, prompts: list[str]) -> tuple[list[list[int]], list[list[int]], list[Response]]:
        """(prompt ids, drawn ids, responses) of this rank's part of the step, by prompts' ids."""
        self.sampler.update(self.accelerator.unwrap_model(self.model), self._dist.gather_params)
        sampling = Sampling(self.max_completion_length, self.temperature)
        first = self.accelerator.process_index * len(prompts)
        requests = []
        for number, id in enumerate(prompts, first):
            seed = stable_seed(self.args.seed, self.state.global_step, id, number % self.num_generations)
            requests.append(Request(str(number), self.prompts[id]["messages"], seed, sampling))
        drawn = self._drawn(requests)
        responses = [
            Response(self.prompts[id], each.text, each.prompt_ids, each.token_ids, each.finish_reason == "stop")
            for id, each in zip(prompts, drawn, strict=True)
        ]
        self._count(responses)
        return [each.prompt_ids for each in drawn], [each.token_ids for each in drawn], responses

    def _drawn(self, requests: Sequence[Request]) -> list[Completion]:
        """A response to each request, in their order."""
        found = {each.id: each for each in self.sampler.draw(requests)}
        drawn = []
        for request in requests:
            completion = found[request.id]
            if isinstance(completion, Failure):
                raise StageFailed(f"a response could not be drawn: {completion.reason}")
            drawn.append(completion)
        self.sampler.release()
        return drawn

    def _count(self, responses: Sequence[Response]) -> None:
        """Tokens seen, lengths and what repeats itself, over all ranks."""
        counts = torch.tensor(
            [
                [len(each.prompt_ids), len(each.token_ids), not each.finished, repetition(each.token_ids)]
                for each in responses
            ],
            device=self.accelerator.device,
        )
        prompt, response, unfinished, repeated = self.accelerator.gather(counts).T
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
        scores = self.rewards.scores(completions)
        nothing = dict.fromkeys(self.rewards.names, float("nan"))
        rows = [nothing if isinstance(each, Failure) else each for each in scores]
        if self.is_world_process_zero():
            shown = [
                {
                    "rollout": self._rollout,
                    "prompt_id": each.prompt["id"],
                    "response": each.text,
                    "finished": each.finished,
                    "score": None if isinstance(given, Failure) else self.rewards.total(given),
                    "scores": {} if isinstance(given, Failure) else given,
                }
                for each, given in zip(completions, scores, strict=True)
            ]
            write_samples(self.folder, shown)
        table = torch.tensor([[row[name] for name in self.rewards.names] for row in rows])
        gathered: Tensor = self.accelerator.gather(table.to(self.accelerator.device))
        self._metrics["train"]["failed"].append(float(gathered.isnan().all(dim=1).sum()))
        return gathered

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """TRL's, on a few rows of similar length at a time, without the columns that are padding in all of them."""
        width = input_ids.shape[1]
        if batch_size is None or batch_size >= len(input_ids):
            batch_size = len(input_ids)
        order = attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        parts: list[Tensor] = []
        others: tuple[Tensor | None, Tensor | None] = (None, None)
        for rows in torch.split(order, batch_size):
            used = attention_mask[rows].any(dim=0).nonzero()
            first, end = int(used[0]), int(used[-1]) + 1
            keep = logits_to_keep - (width - end)
            log_probs, *rest = super()._get_per_token_logps_and_entropies(
                model, input_ids[rows, first:end], attention_mask[rows, first:end], keep, None, **more
            )
            parts.append(torch.nn.functional.pad(log_probs, (0, width - end)))
            others = (_padded(rest[0], width - end), rest[1])
        assert len(parts) == 1 or others == (None, None), "TRL asks for these of one micro-batch"
        back = order.argsort()
        entropies = None if others[0] is None else others[0][back]
        return torch.cat(parts)[back], entropies, others[1]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """The part of the rollouts that this step learns from; new rollouts where the last ones are used up."""
        passes = self.args.steps_per_generation * self.num_iterations
        if self._step % passes == 0 or self._buffered_inputs is None:
            rollouts = self._generate_and_score_completions(generation_batch)
            self._look()
            self._buffered_inputs: list[dict[str, Tensor]] | None = in_parts(rollouts, self.args.steps_per_generation)
        assert self._buffered_inputs is not None
        part: dict[str, Tensor] = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return part

    @property
    def _rollout(self) -> int:
        """The number of the one that this step learns from, from 0."""
        return int(self.state.global_step // self.num_iterations)

    def _look(self) -> None:
        """Raises StageFailed where the figures of the responses drawn last forbid to learn from them."""
        metrics = self._metrics["train"]
        logged = {name: NAMES.get(name, name) for name in metrics}
        now = {logged[name]: metrics[name][-1] for name in metrics if logged[name] in WATCHED}
        now["kl"] = now["kl"] * now["length"] if self.beta else 0.0
        history = self.state.log_history
        check(self.limits, history[0] if history else now, now, self._rollout, newest_checkpoint(self.folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._step % (self.args.steps_per_generation * self.num_iterations) and self._buffered_inputs is not None:
            tensors = {
                f"{number}.{name}": tensor.contiguous().cpu()
                for number, part in enumerate(self._buffered_inputs)
                for name, tensor in part.items()
            }
            save_file(tensors, self._rollouts(f"{self.args.output_dir}/checkpoint-{self.state.global_step}"))

    def train(self, resume_from_checkpoint: str | None = None, **more: Any) -> Any:
        """Trains. Samples that a killed run wrote after the checkpoint are written again."""
        if self.is_world_process_zero():
            done = int(resume_from_checkpoint.rpartition("-")[2]) if resume_from_checkpoint else 0
            keep_rows(self.folder / SAMPLES, lambda row: row["rollout"] * self.num_iterations < done)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once training stands where the checkpoint was written."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        before, now = len(list(Path(checkpoint).glob(ROLLOUTS.format("*")))), self.accelerator.num_processes
        if before not in {0, now}:
            raise StageFailed(
                f"{Path(checkpoint).name} lies between two passes over responses that {before} processes share, and "
                f"cannot be gone on from by {now}: use a profile with as many as before, or start the stage again with "
                f"`--from`"
            )
        if (path := self._rollouts(checkpoint)).is_file():
            parts: list[dict[str, Tensor]] = [{} for _ in range(self.args.steps_per_generation)]
            for name, tensor in load_file(path, device=str(self.accelerator.device)).items():
                number, _, key = name.partition(".")
                parts[int(number)][key] = tensor
            self._buffered_inputs = parts

    def _rollouts(self, checkpoint: str) -> Path:
        return Path(checkpoint) / ROLLOUTS.format(self.accelerator.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        named = {NAMES.get(name, name): values for name, values in metrics.items() if name in {*NAMES, *KEPT}}
        named |= {f"reward/{name}": metrics[f"rewards/{name}/mean"] for name in self.rewards.names
                  if f"rewards/{name}/mean" in metrics}  # fmt: skip
        if "kl" in named:  # TRL's is a token's; this package tells a response's
            named["kl"] = [kl * length for kl, length in zip(named["kl"], named["length"], strict=True)]
        metrics.clear()
        metrics.update(named)
        super().log(logs, start_time)


def in_parts(rollouts: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Rollouts, padded to one width, as `count` parts of as many rows, of similar length each and less padding.

    prompt_ids, prompt_mask: (rows, prompt), padded in front; completion_ids, completion_mask: (rows, response), padded
    behind; everything else: (rows,).
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


def _padded(values: Tensor | None, columns: int) -> Tensor | None:
    return None if values is None else torch.nn.functional.pad(values, (0, columns))


def _named(name: str) -> Any:
    """What stands for a source of reward in TRL's list: its name. `_calculate_rewards` asks the sources themselves."""

    def source(**_: Any) -> list[float]:
        raise AssertionError("rewards are calculated elsewhere")

    source.__name__ = name
    return source
