"""What a training stage takes in one process, by part, and the largest micro-batch that fits.

The same figures decide before a model is loaded, and fill the sheet that `cai plan` prints (`cai.run.memory_sheet`). A
profile's `micro_batch` is the most that is tried. Where its longest rows do not fit, a smaller one is taken, and where
one row does not fit either, activations are recomputed (gradient checkpointing). The global batch, and so what is
learned, stays the same.

Sizes in bytes. DeepSpeed's are those of its documentation: with n processes, ZeRO-1 leaves a process 1/n of the
optimizer's state, ZeRO-2 also of the gradients, ZeRO-3 also of the weights (Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from cai.contracts.machine import free_memory, peak_memory, reset_peak_memory
from cai.contracts.model import SERVED
from cai.contracts.profile import Profile, divisors_up_to
from cai.contracts.references import ModelReference, references
from cai.contracts.training_config import TrainingConfig
from cai.models.footprint import Head, kv_bytes_of, kv_tokens, model_bytes, nf4_bytes, reference_bytes
from cai.training.activations import StepFootprint, StepSetting, step_footprint
from cai.training.micro_batch import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Part = Literal[
    "libraries", "weights", "gradients", "optimizer", "activations", "buckets", "reference", "reward models", "judge",
    "sampler", "KV cache", "forward pass",
]  # fmt: skip
"""What memory is taken by."""
_SAMPLING_ONLY: tuple[Part, ...] = ("sampler", "KV cache")
_LEARNING_ONLY: tuple[Part, ...] = ("gradients", "activations", "buckets")

LIBRARIES_ON_CPU = 650_000_000
"""Python, torch, transformers, TRL, DeepSpeed and their buffers in one process (measured: 500 MB imported, 650 MB after
the first step)."""
LIBRARIES_ON_GPU = 1_200_000_000
"""CUDA's context, cuBLAS's and NCCL's buffers on one GPU. An estimate: no GPU has confirmed it yet."""
OPTIMIZER_BYTES = {"sgd": 0.0, "adafactor": 0.1, "lion_32bit": 4.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0,
                   "adamw_bnb_8bit": 2.0, "paged_adamw_32bit": 8.0}  # fmt: skip
"""Bytes of an optimizer's state a trained parameter, where they are not the 8 of AdamW in float32."""
_ZERO_BUCKET = 500_000_000
"""Elements that DeepSpeed 0.19 reduces, or gathers, at once by default (`reduce_bucket_size`)."""
_ZERO3_LIVE = 1_000_000_000
"""Parameters that ZeRO-3 holds gathered at once by default (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by part: on its device, and where DeepSpeed offloads, in the machine's memory."""

    device: Mapping[Part, int]
    host: Mapping[Part, int] = field(default_factory=dict)
    while_loading: int = 0
    """Bytes on the device while a model is whole there that is then partitioned."""

    @property
    def peak(self) -> int:
        """The most that is on the device at once: while the model loads, while it learns, or while a policy samples."""
        learning = sum(n_bytes for part, n_bytes in self.device.items() if part not in _SAMPLING_ONLY)
        sampling = sum(n_bytes for part, n_bytes in self.device.items() if part not in _LEARNING_ONLY)
        return max(learning, sampling, self.while_loading)


@dataclass(frozen=True)
class TrainedStage:
    """A training stage with the configs of the models that it names, on a profile."""

    config: TrainingConfig
    model_configs: Mapping[str, PreTrainedConfig]
    """By the names that the stage's config has for its models."""
    profile: Profile
    on_cpu: bool
    compute: torch.dtype
    """Precision of products."""
    length: int
    """Tokens of the longest row."""
    available: int
    """Bytes that one process may take on its device, some held back for what is not counted."""
    from_adapter: bool = False
    """Whether the starting model is an adapter, which is merged on each device before ZeRO-3 partitions it."""

    def memory(self, batch: MicroBatch) -> Memory:
        """What one process takes with that micro-batch."""
        step, critic = self._steps(batch)
        device: dict[Part, int] = {"activations": step.activation_bytes}
        device["libraries"] = LIBRARIES_ON_CPU if self.on_cpu else LIBRARIES_ON_GPU
        device |= self._state(step.n_trained, step.n_frozen)
        if self.config.quantises_base:
            device["weights"] += (
                nf4_bytes(self._start, self._head, self.compute) - step.n_frozen * self.compute.itemsize
            )
        if critic is not None:
            for part, n_bytes in self._state(critic.n_trained, 0).items():
                device[part] += n_bytes
            device["activations"] += critic.activation_bytes
        device |= self._frozen_models()
        self._add_kv_cache(device)
        sharding, n_processes = self.profile.sharding, self.profile.processes
        host: dict[Part, int] = {}
        if sharding.offloads_optimizer:  # DeepSpeed keeps gradients in float32 beside it
            host["optimizer"] = device.pop("optimizer") + 4 * step.n_trained // n_processes
        if sharding.offloads_weights:
            host["weights"] = device.pop("weights")
        whole = (step.n_trained + step.n_frozen) * self.compute.itemsize + device["libraries"]
        while_loading = whole if self.from_adapter and sharding.stage == 3 else 0
        return Memory({part: n for part, n in device.items() if n}, host, while_loading)

    def saved_bytes(self) -> tuple[int, int]:
        """(bytes of the saved model, bytes of a resume point)."""
        step, critic = self._steps(MicroBatch(1, True))
        n_trained = step.n_trained + (0 if critic is None else critic.n_trained)
        weights = 4 if not self.profile.sharding.stage else self.compute.itemsize
        model = 4 * step.n_trained if self.config.lora is not None else weights * (step.n_trained + step.n_frozen)
        state = self._optimizer_bytes + (4 if self.profile.sharding.stage else 0)
        return model, model + weights * (n_trained - step.n_trained) + int(state * n_trained)

    def _steps(self, batch: MicroBatch) -> tuple[StepFootprint, StepFootprint | None]:
        """The footprints of the model that is trained, and of a critic that is trained beside it."""
        share = self.config.batch_size // self.profile.processes
        setting = StepSetting(
            self._head, self._weights, self.compute, batch.checkpointing, self.on_cpu, self.config.lora,
            accumulates=share > batch.size or self.profile.sharding.stage > 0,
        )  # fmt: skip
        rows = batch.size * self.config.sequences_per_example
        step = step_footprint(self._start, setting, rows, self.length)
        critics = self._others("critic")
        if not critics:
            return step, None
        return step, step_footprint(critics[0], replace(setting, head="score", lora=None), rows, self.length)

    def _state(self, n_trained: int, n_frozen: int) -> dict[Part, int]:
        """Weights, gradients and the optimizer's state of one trained model."""
        n, sharding, itemsize = self.profile.processes, self.profile.sharding, self._weights.itemsize
        if not sharding.stage:
            return {
                "weights": 4 * n_trained + n_frozen * self.compute.itemsize,
                "gradients": 4 * n_trained,
                "optimizer": int(self._optimizer_bytes * n_trained),
                "buckets": 4 * n_trained if n > 1 else 0,  # DistributedDataParallel copies gradients into buckets
            }
        n_all = n_trained + n_frozen
        bucket = min(_ZERO_BUCKET, n_trained) * itemsize
        gathered = min(_ZERO3_LIVE, n_all) * itemsize if sharding.stage == 3 else 0
        return {
            "weights": n_all * itemsize // (n if sharding.stage == 3 else 1),
            "gradients": n_trained * itemsize // (n if sharding.stage >= 2 else 1),
            "optimizer": int((self._optimizer_bytes + 4) * n_trained) // n,  # beside its state, weights in float32
            "buckets": 2 * bucket + gathered,
        }

    def _frozen_models(self) -> dict[Part, int]:
        """Copies of the starting model, and models that give rewards."""
        frozen: dict[Part, int] = {}
        sharding = self.profile.sharding
        for copy in self.config.copies_of_start():
            if copy == "sampler":
                if self.profile.engine != "vllm":  # which holds its copy in a share of its own
                    frozen["sampler"] = model_bytes(self._start, "language", self.compute)
            elif not sharding.stage:
                frozen["reference"] = reference_bytes(self._start, self.compute)
            else:
                n_bytes = model_bytes(self._start, "language", self.compute)
                is_partitioned = sharding.stage == 3 and copy == "reference"
                frozen["reference"] = n_bytes // self.profile.processes if is_partitioned else n_bytes
        rewards = (model_bytes(config, "score", self.compute) for config in self._others("reward models"))
        judges = (model_bytes(config, "language", self.compute) for config in self._local_judges)
        frozen |= {"reward models": sum(rewards), "judge": sum(judges)}
        return frozen

    def _add_kv_cache(self, device: dict[Part, int]) -> None:
        """Adds what the engines in this process hold for tokens, in what the other parts leave."""
        held = sum(n_bytes for part, n_bytes in device.items() if part not in _LEARNING_ONLY)
        judges = [kv_bytes_of(config, self.compute) for config in self._local_judges]
        sampler = [kv_bytes_of(self._start, self.compute)] if "sampler" in device else []
        if kv_bytes := sum(judges) + sum(sampler):
            n_tokens = kv_tokens(self.profile, kv_bytes, self.available - held, self.on_cpu)
            n_sampled = math.ceil(self.config.responses_at_once / self.profile.processes) * self.length
            device["KV cache"] = sum(judges) * n_tokens + sum(sampler) * min(n_tokens, n_sampled)

    @property
    def _head(self) -> Head:
        return "score" if self.config.gives == "reward" else "language"

    @property
    def _weights(self) -> torch.dtype:
        """Precision of trained weights."""
        return self.compute if self.profile.sharding.stage else torch.float32

    @property
    def _optimizer_bytes(self) -> float:
        """Bytes of the optimizer's state a trained parameter."""
        return OPTIMIZER_BYTES.get(str(self.config.train.get("optim", "")), 8.0)

    @property
    def _start(self) -> PreTrainedConfig:
        return self.model_configs[self.config.model or ""]

    @property
    def _local_judges(self) -> list[PreTrainedConfig]:
        """Configs of judges that answer with the engine `local`."""
        return self._others("judge") if self.profile.engine == "local" else []

    def _others(self, role: Literal["critic", "reward models", "judge"]) -> list[PreTrainedConfig]:
        """Configs of the models that have this role; one at a server takes no memory here."""
        names = [name for _, target, name in references(self.config, ModelReference) if _role(target) == role]
        return [self.model_configs[name] for name in dict.fromkeys(names) if name in self.model_configs]


def _role(target: ModelReference) -> Literal["start", "critic", "reward models", "judge"]:
    if target.trained:
        return "start"
    if target.gives == ("reward",):
        return "reward models"
    return "judge" if target.self_is else "critic"


def n_vllm(config: TrainingConfig) -> int:
    """How many vLLMs a stage that samples with vLLM starts beside a training process: its own, and one a judge."""
    judges = {name for _, target, name in references(config, ModelReference) if _role(target) == "judge"}
    return 1 + sum(not name.startswith(SERVED) for name in judges)


def available_memory(device: torch.device, processes: int) -> int:
    """Bytes that this process, one of `processes` on this machine, may take on its device: what it has, and its share
    of what is free."""
    if device.type == "cpu":
        return free_memory() // processes + int(psutil.Process().memory_info().rss)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) + LIBRARIES_ON_GPU)


def reset_peak(device: torch.device) -> None:
    """Begins a new measurement of `peak_bytes`."""
    if device.type == "cpu":
        reset_peak_memory()
    else:
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process had on its device since `reset_peak`; 0 where the system does not tell."""
    if device.type == "cpu":
        return peak_memory() or 0
    return torch.cuda.max_memory_allocated(device) + LIBRARIES_ON_GPU


def choose_micro_batch(stage: TrainedStage, largest: MicroBatch) -> MicroBatch:
    """The largest micro-batch, up to `largest`, with which one process takes no more than is available to it.

    Activations are recomputed where not even one example fits otherwise. Where nothing fits, the smallest.
    """
    share = stage.config.batch_size // stage.profile.processes
    for checkpointing in dict.fromkeys((largest.checkpointing, True)):
        for size in divisors_up_to(largest.size, share):
            if stage.memory(MicroBatch(size, checkpointing)).peak <= stage.available:
                return MicroBatch(size, checkpointing)
    return MicroBatch(1, True)
