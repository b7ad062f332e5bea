"""What each stage of a recipe takes, against what a machine has: memory of a process by part, and disk.

Computed from the models' `config.json` alone (`cai.models.footprint`, `cai.training.memory`), so that it can be asked
for a model and a machine that are elsewhere. Training stages are computed with rows of `max_length` tokens: shorter
rows take less. 1 GB = 10⁹ bytes.

Left out: memory of servers, prompts and records, which are small beside a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cai.attention.cpu_tuning import tokens_per_pass
from cai.contracts import machine as this_machine
from cai.contracts.profile import Profile
from cai.contracts.references import ModelReference, references
from cai.contracts.stage_config import FeedbackConfig, StageConfig
from cai.contracts.training_config import ReinforcementConfig, TrainingConfig
from cai.models.footprint import (
    HELD_BACK,
    kv_bytes_of,
    kv_tokens,
    model_bytes,
    pass_bytes_of,
    read_config,
)
from cai.models.loading import pick_dtype
from cai.models.reference import ADAPTER, find_config, read_json_object
from cai.text.errors import BadInput
from cai.text.tables import table
from cai.training.memory import (
    LIBRARIES_ON_CPU,
    LIBRARIES_ON_GPU,
    Memory,
    Part,
    TrainedStage,
    choose_micro_batch,
    n_vllm,
)
from cai.training.micro_batch import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cai.run.recipe import Recipe

GB = 10**9
LIBRARIES_BESIDE_GPU = 3 * GB
"""The machine's memory that a process on a GPU takes: Python, torch and CUDA's libraries. An estimate."""


@dataclass(frozen=True)
class Machine:
    """What one machine has, in bytes."""

    gpus: tuple[int, ...]
    """Memory of each GPU that is used; empty where stages run on the CPU."""
    memory: int | None
    """None = unknown."""
    disk: int | None
    """Free where runs are written; None = unknown."""


@dataclass(frozen=True)
class StageSheet:
    """What one stage takes in each process, and whether a machine has it."""

    stage: str
    kind: str
    processes: int
    """On one machine."""
    memory: Memory
    limit: int
    """Bytes that a process may take on its device."""
    host: int
    """Bytes of the machine's memory that all its processes take; on a CPU the same as on the device."""
    disk: int
    """Bytes that the stage leaves."""
    disk_while_running: int
    micro_batch: MicroBatch | None = None
    """Of a training stage."""
    remedy: str | None = None
    """Why the stage does not fit, and what to change; None where it does."""


def describe_machine(
    profile: Profile, runs: Path, gpus: int | None, gpu_memory: float | None, host_memory: float | None
) -> Machine:
    """The machine that stages would run on: this one, or what the options say, in GB.

    Raises BadInput where the profile computes on GPUs and neither this machine nor an option tells their memory.
    """
    is_elsewhere = gpu_memory is not None or host_memory is not None
    memory = None if is_elsewhere else this_machine.total_memory()
    if host_memory is not None:
        memory = int(host_memory * GB)
    disk = None if is_elsewhere else this_machine.free_disk(runs)
    if not (profile.uses_gpu or gpus or gpu_memory):
        return Machine((), memory, disk)
    found_here = this_machine.gpu_memory()
    if gpu_memory is None and not found_here:
        raise BadInput(
            f"profile {profile.name!r} computes on GPUs, and this machine has none: say how much memory one has, as in "
            f"--gpu-memory 80"
        )
    gpu_bytes = min(found_here) if gpu_memory is None else int(gpu_memory * GB)
    n_gpus = gpus or (len(found_here) if gpu_memory is None else profile.processes_here)
    return Machine((gpu_bytes,) * n_gpus, memory, disk)


def memory_sheet(
    recipe: Recipe,
    profile: Profile,
    machine: Machine,
    *,
    stages: Sequence[StageConfig],
    config_file: Path | None = None,
) -> list[StageSheet]:
    """What each of the `stages` takes. `config_file` is the `config.json` of models that are not on this machine."""
    maker = _SheetMaker(recipe, profile, machine, config_file)
    sheets = [sheet for config in stages if (sheet := maker.sheet(config)) is not None]
    if config_file is not None and not maker.described_by_file:
        raise BadInput(f"--model-config {config_file}: every model of these stages is on this machine")
    return sheets


@dataclass(frozen=True)
class _SheetMaker:
    recipe: Recipe
    profile: Profile
    machine: Machine
    config_file: Path | None
    described_by_file: set[str] = field(default_factory=set)
    """Models whose config is that of `config_file`."""

    def sheet(self, config: StageConfig) -> StageSheet | None:
        """The stage's sheet; None for one that computes without a model here."""
        if isinstance(config, TrainingConfig):
            return self._trained(config)
        if isinstance(config, FeedbackConfig):
            return self._asked(config)
        return None

    @property
    def _on_cpu(self) -> bool:
        return not self.machine.gpus

    @property
    def _compute(self) -> torch.dtype:
        if self._on_cpu:
            return pick_dtype(self.profile.dtype, torch.device("cpu"))
        return torch.float32 if self.profile.dtype == "float32" else torch.bfloat16

    def _limit(self, processes: int) -> int:
        """Bytes that one of `processes` on a machine may take on its device."""
        if self.machine.gpus:
            return self.machine.gpus[0]
        return (this_machine.total_memory() if self.machine.memory is None else self.machine.memory) // processes

    def _trained(self, config: TrainingConfig) -> StageSheet:
        profile, processes = self.profile, self.profile.processes_here
        limit = self._limit(processes)
        configs = self._configs(name for _, _, name in references(config, ModelReference))
        start = configs[config.model or ""]
        vllm_bytes = self._vllm_bytes(config, start, limit)
        budget = int((limit - vllm_bytes) * (1 - HELD_BACK))
        length = min(config.max_length, getattr(start.get_text_config(), "max_position_embeddings", config.max_length))
        stage = TrainedStage(
            config, configs, profile, self._on_cpu, self._compute, length, budget, self._is_adapter(config.model or "")
        )
        profile_micro_batch = MicroBatch(profile.accumulation(config.batch_size)[0], profile.gradient_checkpointing)
        batch = choose_micro_batch(stage, profile_micro_batch)
        memory = stage.memory(batch)
        on_disk, resume_point_bytes = stage.saved_bytes()
        n_resume_points = int(config.train.get("save_total_limit") or 2) + 1  # a new one is written before one goes
        while_running = on_disk + n_resume_points * resume_point_bytes
        remedy = None if memory.peak <= budget else _training_remedy(config, profile, memory, budget, vllm_bytes, limit)
        host = self._host(memory, processes)
        if vllm_bytes and self.machine.gpus:  # weights on their way to vLLM: a copy, and a file in shared memory
            host += 2 * model_bytes(start, "language", self._compute)
        sheet = StageSheet(
            config.id, config.kind, processes, memory, limit, host, on_disk, while_running, batch, remedy
        )
        return self._checked(sheet)

    def _vllm_bytes(self, config: TrainingConfig, start: PreTrainedConfig, limit: int) -> int:
        """What vLLM takes of each device beside a stage that samples with it."""
        vllm = self.profile.vllm
        if self.profile.engine != "vllm" or not isinstance(config, ReinforcementConfig):
            return 0
        if self._on_cpu:
            return n_vllm(config) * (vllm.cpu_cache_gib * 2**30 + model_bytes(start, "language", self._compute))
        return n_vllm(config) * int(limit * vllm.gpu_memory_utilization)

    def _asked(self, config: FeedbackConfig) -> StageSheet | None:
        """The sheet of a stage that asks models; None where all of them answer at a server.

        Reward models are always in the stage's own process.
        """
        targets = {name: target for _, target, name in references(config, ModelReference)}
        reward_models = [name for name, target in targets.items() if target.gives == ("reward",)]
        answering = self._configs(name for name in targets if name not in reward_models)
        scoring = self._configs(reward_models)
        if self.profile.engine == "vllm" and answering:
            return self._asked_vllm(config, answering)
        if self.profile.engine != "local":
            answering = {}
        if not answering and not scoring:
            return None
        processes = self.profile.processes_here
        limit = self._limit(processes)
        parts = self._engine_parts(answering, scoring, limit)
        memory = Memory(parts)
        by_tokens = parts.get("KV cache", 0) + parts["forward pass"]  # less where memory says so
        needed = memory.peak - by_tokens + min(by_tokens, limit // 20)
        budget = int(limit * (1 - HELD_BACK))
        remedy = None if needed <= budget else _engine_remedy(needed, budget, self._on_cpu)
        host = self._host(memory, processes)
        return self._checked(StageSheet(config.id, config.kind, processes, memory, limit, host, 0, 0, None, remedy))

    def _engine_parts(
        self, answering: Mapping[str, PreTrainedConfig], scoring: Mapping[str, PreTrainedConfig], limit: int
    ) -> dict[Part, int]:
        """The largest of the models that answer, which are open one at a time, and all that score."""
        compute, profile = self._compute, self.profile
        n_tokens = tokens_per_pass(profile.token_budget, torch.device("cpu" if self._on_cpu else "cuda"))
        parts: dict[Part, int] = {
            "libraries": LIBRARIES_ON_CPU if self._on_cpu else LIBRARIES_ON_GPU,
            "reward models": sum(model_bytes(config, "score", compute) for config in scoring.values()),
            "forward pass": max(pass_bytes_of(c, compute, n_tokens) for c in (*answering.values(), *scoring.values())),
        }
        if answering:
            largest = max(answering.values(), key=lambda config: model_bytes(config, "language", compute))
            parts["weights"] = model_bytes(largest, "language", compute)
            kv_bytes = kv_bytes_of(largest, compute)
            free = limit - sum(parts.values())
            parts["KV cache"] = kv_bytes * kv_tokens(profile, kv_bytes, free, self._on_cpu)
        return {part: n_bytes for part, n_bytes in parts.items() if n_bytes}

    def _asked_vllm(self, config: FeedbackConfig, configs: Mapping[str, PreTrainedConfig]) -> StageSheet:
        """vLLM takes its share of each GPU that it splits the model over."""
        vllm, limit = self.profile.vllm, self._limit(1)
        weights = max(model_bytes(config, "language", self._compute) for config in configs.values())
        parts: dict[Part, int] = {"libraries": LIBRARIES_ON_GPU, "weights": weights // vllm.tensor_parallel}
        share = int(limit * vllm.gpu_memory_utilization)
        if self._on_cpu:
            share = sum(parts.values()) + vllm.cpu_cache_gib * 2**30
        memory = Memory({**parts, "KV cache": max(0, share - sum(parts.values()))})
        needed = sum(parts.values()) + limit // 20
        remedy = None if needed <= min(share, limit) else _engine_remedy(needed, min(share, limit), self._on_cpu)
        n_gpus = vllm.tensor_parallel * vllm.data_parallel
        host = memory.peak if self._on_cpu else n_gpus * LIBRARIES_BESIDE_GPU
        return self._checked(StageSheet(config.id, config.kind, n_gpus, memory, limit, host, 0, 0, None, remedy))

    def _checked(self, sheet: StageSheet) -> StageSheet:
        """The sheet with a remedy where the machine has too few GPUs, too little memory or disk."""
        gpus, memory, disk = self.machine.gpus, self.machine.memory, self.machine.disk
        remedy = sheet.remedy
        if gpus and sheet.processes > len(gpus):
            remedy = (
                f"takes {sheet.processes} GPUs, of which there are {len(gpus)}: use a profile with as many processes"
            )
        elif remedy is None and memory is not None and sheet.host > memory:
            remedy = f"takes {sheet.host / GB:.0f} GB of the machine's memory, which has {memory / GB:.0f} GB"
        elif remedy is None and disk is not None and sheet.disk_while_running > disk:
            needed = f"takes {sheet.disk_while_running / GB:.0f} GB of disk, of which {disk / GB:.0f} GB are free"
            remedy = (
                f"{needed}: `--runs` names another disk, `train: {{save_total_limit: 1}}` keeps fewer resume points"
            )
        return replace(sheet, remedy=remedy)

    def _host(self, memory: Memory, processes: int) -> int:
        device_or_libraries = memory.peak if self._on_cpu else LIBRARIES_BESIDE_GPU
        return processes * (device_or_libraries + sum(memory.host.values()))

    def _configs(self, names: Iterable[str]) -> dict[str, PreTrainedConfig]:
        """Configs of models, and of what stages train, by name; models at a server are left out."""
        configs = {name: self._config_of(name) for name in names}
        return {name: config for name, config in configs.items() if config is not None}

    def _config_of(self, name: str) -> PreTrainedConfig | None:
        """Raises BadInput for a model that is not on this machine where no `config.json` was given for it."""
        if (stage := self.recipe.stages.get(name)) is not None:
            starts = (start for _, target, start in references(stage, ModelReference) if target.trained)
            return self._config_of(next(starts))
        model = self.recipe.models[name]
        if model.served:
            return None
        fields: dict[str, Any] | None = find_config(model, offline=self.profile.offline)
        if fields is None and self.config_file is not None:
            self.described_by_file.add(model.path)
            if len(self.described_by_file) > 1:
                several = " and ".join(sorted(self.described_by_file))
                raise BadInput(
                    f"--model-config {self.config_file}: expected one model that is not here, found {several}"
                )
            fields = read_json_object(self.config_file)
        if not fields:
            raise BadInput(
                f"model {name!r} is not on this machine: give its config.json with --model-config, or let it be looked "
                f"up with --online"
            )
        return read_config(fields, name)

    def _is_adapter(self, name: str) -> bool:
        """Whether a stage's model, or a folder, is an adapter."""
        trained_by = self.recipe.stages.get(name)
        if isinstance(trained_by, TrainingConfig):
            return trained_by.lora is not None
        model = self.recipe.models.get(name)
        return model is not None and (Path(model.path) / ADAPTER).is_file()


def _training_remedy(
    config: TrainingConfig, profile: Profile, memory: Memory, budget: int, vllm_bytes: int, limit: int
) -> str:
    """Why a training stage does not fit, and the change that saves most."""
    largest = max(memory.device, key=lambda part: memory.device[part])
    needed = f"takes {memory.peak / GB:.1f} GB a process, where {budget / GB:.1f} GB can be used"
    if vllm_bytes:
        share = math.floor(100 * (1 - memory.peak / (limit * (1 - HELD_BACK)))) / 100
        if share >= 0.05:
            return f"{needed} beside vLLM: set `vllm: {{gpu_memory_utilization: {share:g}}}` or less in the profile"
        return f"{needed} beside vLLM: sample with `engine: local`, or use GPUs with more memory"
    needed += f", most of it {largest}"
    if config.lora is None and largest in {"weights", "gradients", "optimizer", "reference", "buckets"}:
        zero = "" if profile.sharding.stage == 3 else ", or use a profile with ZeRO-3 such as 8gpu-zero3"
        return f"{needed}: train an adapter with `lora: {{}}`{zero}, or take a smaller model"
    if largest == "activations":
        return f"{needed}: lower `max_length` (now {config.max_length}), or use more memory a process"
    if largest in {"reward models", "judge", "sampler", "reference"}:
        return f"{needed}: use a smaller reward model, a judge at a server (`served:NAME`), or GPUs with more memory"
    return f"{needed}: use GPUs with more memory, a profile with ZeRO-3, or a smaller model"


def _engine_remedy(needed: int, budget: int, on_cpu: bool) -> str:
    takes = f"takes {needed / GB:.1f} GB at least, where {budget / GB:.1f} GB a process can be used"
    if on_cpu:
        return f"{takes}: use fewer processes, a machine with more memory, or a smaller model"
    return f"{takes}: split the model with `engine: vllm` and `tensor_parallel`, as in 8gpu-vllm-tp, or ask a server"


def sheet_lines(sheets: Sequence[StageSheet], machine: Machine) -> list[str]:
    """The sheet as a table, and a line for every stage that does not fit."""
    device = "GPU" if machine.gpus else "process"
    rows = [
        [
            sheet.stage,
            sheet.kind,
            str(sheet.processes),
            "" if sheet.micro_batch is None else _batch_text(sheet.micro_batch),
            f"{sheet.memory.peak / GB:.1f}",
            f"{sheet.limit / GB:.1f}",
            ", ".join(_part_texts(sheet.memory)),
            f"{sheet.disk_while_running / GB:.1f}" if sheet.disk_while_running else "",
            "fits" if sheet.remedy is None else "DOES NOT FIT",
        ]
        for sheet in sheets
    ]
    header = ["stage", "kind", "processes", "micro-batch", f"GB a {device}", "of", "most of it", "GB of disk", ""]
    lines = table(header, rows)
    kept = sum(sheet.disk for sheet in sheets)
    most = max((sheet.disk_while_running - sheet.disk for sheet in sheets), default=0)
    free = "" if machine.disk is None else f", {machine.disk / GB:.1f} GB are free"
    lines += ["", f"disk: {kept / GB:.1f} GB of models, {most / GB:.1f} GB more while one trains{free}"]
    host = max((sheet.host for sheet in sheets), default=0)
    of = "" if machine.memory is None else f" of {machine.memory / GB:.1f} GB"
    lines.append(f"memory of the machine: {host / GB:.1f} GB{of}")
    return lines + [f"{sheet.stage} {sheet.remedy}" for sheet in sheets if sheet.remedy is not None]


def sheet_json(sheets: Sequence[StageSheet]) -> list[dict[str, object]]:
    """The sheet for a program, sizes in bytes."""
    return [
        {
            "stage": sheet.stage,
            "kind": sheet.kind,
            "processes": sheet.processes,
            "peak": sheet.memory.peak,
            "limit": sheet.limit,
            "device": dict(sheet.memory.device),
            "host": sheet.host,
            "disk": sheet.disk,
            "disk_while_running": sheet.disk_while_running,
            "micro_batch": sheet.micro_batch and sheet.micro_batch.size,
            "gradient_checkpointing": sheet.micro_batch and sheet.micro_batch.checkpointing,
            "fits": sheet.remedy is None,
            "remedy": sheet.remedy,
        }
        for sheet in sheets
    ]


def _batch_text(batch: MicroBatch) -> str:
    return f"{batch.size}, checkpointing" if batch.checkpointing else str(batch.size)


def _part_texts(memory: Memory) -> Iterator[str]:
    """The three largest parts with their gigabytes."""
    for part, n_bytes in sorted(memory.device.items(), key=lambda item: -item[1])[:3]:
        yield f"{part} {n_bytes / GB:.1f}"
