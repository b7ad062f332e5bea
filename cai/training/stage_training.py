"""What every training stage does around its trainer: load and configure, train or resume, save.

A stage opens `stage_training`, makes its rows and its trainer from what that offers, and calls `train` and `save`. The
recipe's `train:` says what is learned, the profile where; per-device batch, accumulation and precision follow here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import set_seed
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from cai.attention.patched_attention import TRIAL_ERRORS
from cai.contracts.context import Context
from cai.contracts.model import Model
from cai.contracts.references import ModelReference, references
from cai.contracts.training_config import ReinforcementConfig, TrainingConfig
from cai.models import loading, reference
from cai.models.autocast_weights import convert_as_autocast
from cai.models.chat import Chat
from cai.models.footprint import HELD_BACK, read_config
from cai.storage.run_folder import MODEL
from cai.text.errors import BadInput, StageFailed, first_line
from cai.text.left_out import LeftOut
from cai.training import loop
from cai.training.memory import Memory, TrainedStage, available_memory, choose_micro_batch, n_vllm
from cai.training.micro_batch import MemoryRecord, MicroBatch

LEFT_OUT_ON_PURPOSE = ("held_out", "superseded")
"""Reasons for which a recipe keeps rows from being learned."""
LEFT_OUT_WORDS = {
    "empty": ("empty",),
    "identical": ("with two equal responses",),
    "refused_by_template": ("refused by the model's chat template", "name another `chat_template:`"),
    "revision_failed": ("whose revision failed",),
    "not_revised": ("that no revision changed", "more `rounds:` or another `model:` of the stage that revises"),
    "without_reward": ("without a principle that applies", "let a principle of the rewards apply to their tags"),
}
"""How a reason is called, and what to change."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments


@dataclass(frozen=True)
class StageTraining:
    """One training stage: its config, its context, the model that it starts from and that model's conversations."""

    config: TrainingConfig
    context: Context
    start: Model
    chat: Chat

    @property
    def seed(self) -> int:
        """The seed of all random numbers of the stage, below 2³¹: numpy takes 32 bits."""
        return self.context.seed_for() % 2**31

    def arguments(self, longest: int, **overrides: Any) -> TrainingArguments:
        """The stage's `train_class`: `train:` for what is learned, the profile for where, `overrides` for the stage.

        `longest` is the longest row in tokens, from which follows how many of them fit into memory at once. To be
        called before `load_language_model` and `load_classifier`, since it tells transformers whether ZeRO-3 is on.
        Raises BadInput where the profile's processes do not divide the batch size.
        """
        profile = self.context.profile
        as_asked = MicroBatch(profile.accumulation(self.config.batch_size)[0], profile.gradient_checkpointing)
        args = self._arguments(as_asked, overrides)  # connects the processes, which then agree on the micro-batch
        batch = self._micro_batch(as_asked, longest)
        return args if batch == as_asked else self._arguments(batch, overrides)

    def _arguments(self, batch: MicroBatch, overrides: Mapping[str, Any]) -> TrainingArguments:
        assert self.config.train_class is not None
        module, _, name = self.config.train_class.partition(":")
        profile = self.context.profile
        device = loading.pick_device(profile.device)
        from_profile = {
            "per_device_train_batch_size": batch.size,
            "per_device_eval_batch_size": batch.size,
            "gradient_accumulation_steps": self.config.batch_size // profile.processes // batch.size,
            "gradient_checkpointing": batch.checkpointing,
            "bf16": loading.pick_dtype(profile.dtype, device) == torch.bfloat16,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type != "cpu",
        }
        from_stage = {
            "output_dir": str(self.context.folder / loop.RESUME_POINTS),
            "run_name": self.context.stage_id,
            "report_to": list(self.context.report_to) or "none",
            "seed": self.seed,
            "data_seed": self.seed,
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,  # it would log the mean of earlier losses in place of a NaN
            "include_num_input_tokens_seen": "non_padding",
        }
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # the accelerate file's value takes precedence over `bf16`
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if from_profile["bf16"] else "no"
        config_class = getattr(importlib.import_module(module), name)
        fields = {**self.config.train, **from_profile, **from_stage, **overrides}
        try:
            args: TrainingArguments = config_class(**fields)
        except ValueError as error:  # values that do not go together, which `cai.training.train_fields` cannot tell
            raise BadInput(f"stage {self.config.id!r}: `train:` is refused by {name}: {first_line(error)}") from error
        if args.n_gpu > 1:
            args._n_gpu = 1  # else Trainer (transformers 5.23) uses DataParallel over all GPUs that it sees
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            # Without it DeepSpeed 0.19 trains under ZeRO-3 to the end and then has no gathered model to save.
            zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        return args

    def _micro_batch(self, as_asked: MicroBatch, longest: int) -> MicroBatch:
        """The micro-batch that fits in every process, up to the profile's.

        It is recorded in the stage's folder. A stage that continues keeps it, because rounding depends on it, and one
        that has run out of memory goes on below it.
        """
        available = self._available()
        if not torch.distributed.is_initialized():
            return self._decide_micro_batch(as_asked, longest, available)
        of_all = [0] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, available)
        is_first = torch.distributed.get_rank() == 0
        decision = [self._decide_micro_batch(as_asked, longest, min(of_all)) if is_first else as_asked]
        torch.distributed.broadcast_object_list(decision)
        return decision[0]

    def _decide_micro_batch(self, as_asked: MicroBatch, longest: int, available: int) -> MicroBatch:
        share = self.config.batch_size // self.context.profile.processes
        record = MemoryRecord.read(self.context.folder)
        if record is not None and (record.profile_micro_batch, record.share) == (as_asked, share):
            return record.micro_batch
        planned: Memory | None = None
        try:
            with loading.unpartitioned():
                stage = self._sized(longest, available)
                batch = choose_micro_batch(stage, as_asked)
                planned = stage.memory(batch)
        except TRIAL_ERRORS as error:
            unknown = f"what this model takes in memory could not be computed ({first_line(error)})"
            self.context.progress.note(f"{unknown}: micro-batch as the profile says")
            batch = as_asked
        if planned is not None and self._samples_with_vllm and planned.peak > available:
            raise BadInput(
                f"stage {self.config.id!r}: what learns takes {planned.peak / 1e9:.1f} GB of each GPU, and "
                f"{available / 1e9:.1f} GB are left beside vLLM: lower `vllm: {{gpu_memory_utilization: …}}` in the "
                f"profile, or sample with `engine: local`"
            )
        if batch != as_asked:
            checkpointing = " and gradient checkpointing" if batch.checkpointing and not as_asked.checkpointing else ""
            chosen = f"a micro-batch of {batch.size}{checkpointing}, where the profile allows {as_asked.size}"
            self.context.progress.note(f"{chosen}: the most that fits with rows of {longest:,} tokens")
        parts = {} if planned is None else {str(part): n_bytes for part, n_bytes in planned.device.items()}
        peak = None if planned is None else planned.peak
        MemoryRecord(as_asked, share, batch, longest, parts, peak).write(self.context.folder)
        return batch

    @property
    def _samples_with_vllm(self) -> bool:
        on_gpu = loading.pick_device(self.context.profile.device).type == "cuda"
        return on_gpu and isinstance(self.config, ReinforcementConfig) and self.context.profile.engine == "vllm"

    def _available(self) -> int:
        """Bytes that what learns in this process may take on its device."""
        profile = self.context.profile
        device = loading.pick_device(profile.device)
        available = available_memory(device, profile.processes_here)
        if self._samples_with_vllm:  # it starts later, and keeps its share
            total = torch.cuda.get_device_properties(device).total_memory
            available -= int(total * profile.vllm.gpu_memory_utilization) * n_vllm(self.config)
        return int(available * (1 - HELD_BACK))

    def _sized(self, longest: int, available: int) -> TrainedStage:
        """The stage with the sizes of its models."""
        profile = self.context.profile
        device = loading.pick_device(profile.device)
        names = {self.config.model or "", *(name for _, _, name in references(self.config, ModelReference))}
        models = {name: self.context.model(name) for name in names}
        configs = {
            name: read_config(reference.read_model_json(model, "config.json"), model.name)
            for name, model in models.items()
            if not model.served
        }
        compute = loading.pick_dtype(profile.dtype, device)
        from_adapter = reference.base_of(self.start) is not None
        return TrainedStage(
            self.config, configs, profile, device.type == "cpu", compute, longest, available, from_adapter
        )

    def load_language_model(self) -> PreTrainedModel:
        """The starting model to train: in float32 and trainable, or for `lora:` frozen and in the profile's dtype.

        With `lora: {base: nf4}` its matrices have 4 bits a weight.
        """
        return self._load(loading.load_causal_lm, self.start, is_trained=self.config.lora is None)

    def load_classifier(self, model: Model | None = None) -> PreTrainedModel:
        """As `load_language_model`, with one score; a new head has the stage's seed. `model` is trained in full."""
        is_trained = model is not None or self.config.lora is None
        return self._load(loading.load_sequence_classifier, model or self.start, is_trained=is_trained)

    def load_reference(self, *, whole: bool = False) -> PreTrainedModel:
        """The starting model, frozen: equal to the model that is trained in full, before its first step.

        Without DeepSpeed it computes under autocast alone, and takes about half the memory of the trained one
        (`cai.models.autocast_weights`). Under ZeRO-3 it is partitioned, unless it is to be `whole` in each process.
        """
        profile = self.context.profile
        if self._uses_deepspeed:
            with loading.unpartitioned() if whole else contextlib.nullcontext():
                return self._load(loading.load_causal_lm, self.start, is_trained=False).requires_grad_(False)
        frozen = self._load(loading.load_causal_lm, self.start, is_trained=True).requires_grad_(False)
        convert_as_autocast(frozen, loading.pick_dtype(profile.dtype, frozen.device))
        return frozen

    @property
    def is_saved(self) -> bool:
        """Whether the stage's model is trained and saved."""
        return (self.context.folder / MODEL).is_dir()

    def load_saved_classifier(self) -> PreTrainedModel:
        """The stage's saved model as later stages use it, whole in each process, an adapter merged; float32 where all
        weights were trained in it."""
        clear_device_cache(garbage_collection=True)  # of the trainer
        model = replace(self.start, path=str((self.context.folder / MODEL).resolve()))
        profile = self.context.profile
        is_float32 = self.config.lora is None and not self._uses_deepspeed
        with loading.unpartitioned():  # and not quantised, as no later stage quantises it either
            return loading.load_sequence_classifier(model, "float32" if is_float32 else profile.dtype, profile.device)

    def figures(self) -> dict[str, Any]:
        """The number of steps and the first and the last loss."""
        return loop.training_figures(self.context.folder)

    @property
    def _uses_deepspeed(self) -> bool:
        """As accelerate decides it, which knows only once a model is prepared."""
        return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in {"true", "1"}

    def _load(self, load: Callable[..., PreTrainedModel], start: Model, *, is_trained: bool) -> PreTrainedModel:
        set_seed(self.seed)
        profile = self.context.profile
        if not is_deepspeed_zero3_enabled():
            dtype = "float32" if is_trained else profile.dtype
            nf4 = self.config.quantises_base and not is_trained
            model = load(start, dtype, profile.device, nf4=nf4)
            return model if nf4 else model.requires_grad_(is_trained)
        if self.config.quantises_base:  # also where the plan could not tell that ZeRO-3 would be on
            wish = f"stage {self.config.id!r}: found `lora: {{base: nf4}}`"
            raise BadInput(f"{wish}, but ZeRO-3 cannot partition such weights: leave `base` out")
        if reference.base_of(start) is None:  # DeepSpeed's own config says what partitioned weights are kept in
            return load(start, "float32", profile.device).requires_grad_(True)
        with loading.unpartitioned():  # an adapter's base must be whole for the merge
            model = load(start, profile.dtype, profile.device)
        self._partition(model)
        return model.requires_grad_(True)

    def _partition(self, model: PreTrainedModel) -> None:
        """Under ZeRO-3, partitions a whole model as transformers does while it loads one.

        DeepSpeed (0.19) would do so when training begins, in another precision than that of models loaded partitioned,
        and takes no module with both, such as a policy with a critic.
        """
        import deepspeed

        profile = self.context.profile
        loading.cast_weights(model, loading.pick_dtype(profile.dtype, loading.pick_device(profile.device)))
        deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())

    def adapter(self, task: str, model: PreTrainedModel, trained_modules: Sequence[str] = ()) -> Any:
        """peft's config for the stage's `lora:` on `model`, None where all weights are trained.

        `trained_modules` are trained and saved whole beside the adapter. Raises BadInput where the adapter would reach
        the language-model head: log-probabilities are computed from the head's own weight, so what an adapter adds to
        it, or to embeddings tied to it, would be neither used nor trained.
        """
        lora = self.config.lora
        if lora is None:
            return None
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules,
            modules_to_save=list(trained_modules) or None, task_type=task,
        )  # fmt: skip
        head = model.get_output_embeddings()
        if head is not None and lora.target_modules != "all-linear":  # `all-linear` leaves the head out
            for name, module in model.named_modules():
                if getattr(module, "weight", None) is head.weight and check_target_module_exists(config, name):
                    expected = "expected modules between embeddings and head, or `all-linear`"
                    head_name = f"`lora: {{target_modules: …}}` names {name!r}, the language-model head or tied to it"
                    raise BadInput(f"{head_name}, which takes no adapter; {expected}")
        return config

    def report_left_out(
        self, unit: str, n_input: int, left_out: Mapping[str, int], cut_off: LeftOut | None = None
    ) -> None:
        """Tells the user where more than a tenth of what could be learned from was left out, by reason.

        `left_out` may count what is kept out on purpose, which is no part of it.
        """
        limit = self.chat.token_limit(self.config.max_length)
        is_own_limit = limit == self.config.max_length
        remedy = "raise `max_length`" if is_own_limit else "train a model with a longer context"
        too_long = LeftOut(left_out.get("too_long", 0), f"with more than {limit} tokens", remedy)
        others = [LeftOut(left_out.get(name, 0), *in_words) for name, in_words in LEFT_OUT_WORDS.items()]
        on_purpose = sum(left_out.get(name, 0) for name in LEFT_OUT_ON_PURPOSE)
        self.context.report_left_out(n_input - on_purpose, unit, [too_long, *others, *([cut_off] if cut_off else [])])

    def require(self, rows: Sequence[object], missing: str, left_out: Counter[str]) -> None:
        """Raises StageFailed where there are no rows, with what was left out and why."""
        if not rows:
            raise StageFailed(f"stage {self.config.id!r}: {missing}; left out: {describe_left_out(left_out)}")

    def train(self, trainer: Trainer) -> dict[str, Any]:
        """Trains or resumes; returns the number of steps and the first and the last loss."""
        return loop.train_or_resume(trainer, self.context)

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The trainer's figures on its evaluation rows."""
        with loop.cpu_kernels(trainer), loop.out_of_memory_as_error(self.config.id):
            return trainer.evaluate()  # type: ignore[no-any-return]

    def save(self, trainer: Trainer, submodule: str = "", **facts: object) -> None:
        """Writes the model, its card and `cai.json` with `facts`, and removes the resume points."""
        facts = {"kind": self.config.kind, **facts}
        loop.save_trained_model(trainer, self.context, self.chat, self.start, facts, submodule)


@contextlib.contextmanager
def stage_training(config: TrainingConfig, context: Context) -> Iterator[StageTraining]:
    """The stage's starting model and chat; the libraries report errors only within the block."""
    start = context.model(config.model)
    with silence_libraries(context.folder):
        yield StageTraining(config, context, start, Chat.load(start))


def describe_left_out(left_out: Counter[str]) -> str:
    """Counts of rows that were left out by reason, in words."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in sorted(left_out.items()) if n) or "nothing"


@contextlib.contextmanager
def silence_libraries(folder: Path) -> Iterator[None]:
    """Within the block libraries report errors only. TensorBoard's files, if they are asked for, go into `folder`."""
    import datasets

    environment = {"TQDM_DISABLE": "1", "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")}
    previous_environment = {name: os.environ.get(name) for name in environment}
    levels = {logger: logger.level for logger in map(logging.getLogger, ("trl", "accelerate", "peft"))}
    datasets_shows_bars = not datasets.are_progress_bars_disabled()
    os.environ.update(environment)
    for logger in levels:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with loading.silence_transformers(), warnings.catch_warnings():
            for module in ("trl", "transformers", "accelerate", "peft", "torch", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        if datasets_shows_bars:
            datasets.enable_progress_bars()
        for logger, level in levels.items():
            logger.setLevel(level)
        for name, value in previous_environment.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
