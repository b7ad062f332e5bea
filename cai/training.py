"""What the training stages share: the trainer's config, tokenised rows, metrics on disk, resuming and saving.

A trainer's checkpoints lie in the stage's folder until its model does. Killed anywhere, a stage goes on from its newest
complete checkpoint, or from its start where there is none, and on one CPU process ends with the same weights, byte for
byte, and the same `metrics.jsonl` as an undisturbed run; where vLLM draws, but for its rounding in batches. Asked to
stop (`cai.stopping`), it writes a checkpoint after the step that it is in, and a line of metrics with it, which between
two steps that are logged (`logging_steps`) is one more.

Training keeps weights in float32 and computes in the profile's precision (autocast); under DeepSpeed weights are in the
profile's precision and the optimizer's copies in float32. Under ZeRO-3 a model is parted over the processes while it is
read, so that none of them holds all of it; one that starts from an adapter is whole in each until the adapter is
merged. Left out: loading weights in half precision, quantised bases, going on from DeepSpeed's checkpoints with another
number of processes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from cai import checkpoint, stopping
from cai.cpu_training import float32_attention
from cai.errors import BadInput, StageFailed, Terminated
from cai.files import read_json, remove, replacing, write_json
from cai.records import Preference, canonical_json, row_lines, stable_seed
from cai.stages import Context, LoRA, TrainingConfig
from cai.token_trees import dropouts, each_token_once

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from cai.chat import Chat
    from cai.checkpoint import Model

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
COMPLETE = "COMPLETE"
"""Written into a checkpoint's folder when all its other files are there: which processes wrote them."""
_NOT_METRICS = ("_runtime", "_per_second", "num_tokens")
"""Ends of logged names that differ from run to run, or that a resumed run counts anew."""


@dataclass(frozen=True)
class Pair:
    """One preference as token ids. The responses end with the end-of-turn token."""

    row: Preference
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer conversation."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def tokenised_pairs(rows: Iterable[Preference], chat: Chat, max_length: int) -> tuple[list[Pair], Counter[str]]:
    """Pairs that can be learned from, and how many were left out for which reason."""
    pairs: list[Pair] = []
    left_out: Counter[str] = Counter()
    limit = longest(chat, max_length)
    for row in rows:
        try:
            prompt_ids, chosen_ids = chat.example(row["prompt"], row["chosen"][-1]["content"])
            _, rejected_ids = chat.example(row["prompt"], row["rejected"][-1]["content"])
        except BadInput:  # a conversation that the model's template does not take
            left_out["refused_by_template"] += 1
            continue
        pair = Pair(row, prompt_ids, chosen_ids, rejected_ids)
        if chosen_ids == rejected_ids:
            left_out["identical"] += 1
        elif pair.length > limit:
            left_out["too_long"] += 1
        else:
            pairs.append(pair)
    return pairs, left_out


def longest(chat: Chat, max_length: int) -> int:
    """Tokens that an example may have: the stage's limit, or the model's where that is lower."""
    return min(max_length, chat.context_length or max_length)


def reasons(left_out: Counter[str]) -> str:
    """What was left out, in words."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in sorted(left_out.items()) if n) or "nothing"


def arguments(config: TrainingConfig, context: Context, **more: Any) -> TrainingArguments:
    """The library's config: `train:` for what is learned, the profile for where, and what a stage needs for itself."""
    assert config.train_class is not None
    module, _, name = config.train_class.partition(":")
    profile = context.profile
    device = checkpoint.pick_device(profile.device)
    micro_batch, accumulation = profile.accumulation(config.batch_size)
    seed = seed_of(context)
    where = {
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": profile.gradient_checkpointing,
        "bf16": checkpoint.pick_dtype(profile.dtype, device) == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
    }
    own = {
        "output_dir": str(context.folder / CHECKPOINTS),
        "run_name": context.stage_id,
        "report_to": list(context.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would log the mean of earlier losses in place of a NaN
        "include_num_input_tokens_seen": "non_padding",
    }
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # the accelerate file's, which would count for more than `bf16`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if where["bf16"] else "no"
    args: TrainingArguments = getattr(importlib.import_module(module), name)(**{**config.train, **where, **own, **more})
    if args.n_gpu > 1:
        args._n_gpu = 1  # a process has one GPU; over all that it sees, Trainer would spread a batch with DataParallel
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # Without it ZeRO-3 trains to the end and then has no whole model to save, whatever the accelerate file says.
        zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return args


def loaded(load: Callable[..., PreTrainedModel], start: Model, context: Context) -> PreTrainedModel:
    """The starting model in float32, all of it trainable. A new head or adapter is drawn from the stage's seed.

    To be called after `arguments`, from which transformers knows whether ZeRO-3 parts the model.
    """
    set_seed(seed_of(context))
    with contextlib.nullcontext() if checkpoint.base_of(start) is None else checkpoint.whole():
        model = load(start, device=context.profile.device)
    return model.requires_grad_(True)  # a merged adapter leaves its base frozen


def seed_of(context: Context) -> int:
    """The seed of everything that a training stage draws; numpy takes 32 bits."""
    return stable_seed(context.seed, context.stage_id) % 2**31


def adapter(lora: LoRA | None, task: str, model: PreTrainedModel, trained_whole: Sequence[str] = ()) -> Any:
    """peft's config for a stage's `lora:` on `model`; None where all weights are trained.

    Raises BadInput where it would reach the language-model head: log-probabilities are taken from the head's own
    weight, and what an adapter adds to that, or to embeddings tied to it, would be neither used nor trained.
    """
    if lora is None:
        return None
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=list(trained_whole) or None,
        task_type=task,
    )
    head = model.get_output_embeddings()
    if head is not None and lora.target_modules != "all-linear":  # which leaves it out
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is head.weight and check_target_module_exists(config, name):
                raise BadInput(
                    f"`lora: {{target_modules: …}}` names {name!r}, the language-model head or tied to it, which takes "
                    f"no adapter; expected modules between embeddings and head, or `all-linear`"
                )
    return config


def without_dropout(model: nn.Module) -> None:
    """Switches off what a model and its adapter drop at random while they train.

    Reinforcement learning compares log-probabilities with those at the rollout: the same weights have to give the same
    ones. The model's config, which is saved with it, stays as it is.
    """
    for module in model.modules():
        for name in dropouts(module):
            setattr(module, name, 0.0)


def train(trainer: Trainer, context: Context) -> dict[str, Any]:
    """Trains, from the newest complete checkpoint if there is one. Returns the first and the last logged step's loss.

    Raises StageFailed where the loss stops being a number or the checkpoint is not one that these processes can go on
    from, Terminated where the stage is asked to stop before its end.
    """
    trainer.remove_callback(PrinterCallback)
    recorder = Recorder(context, trainer.accelerator)
    trainer.add_callback(recorder)
    resume = newest_checkpoint(context.folder)
    trainer.accelerator.wait_for_everyone()  # all have looked before one of them removes what is half-written
    if resume is not None:
        _check_processes(resume, written_by(trainer.accelerator), context)
        context.progress.note(f"resuming from {resume.name}")
    elif trainer.is_world_process_zero():
        remove(context.folder / CHECKPOINTS)
    with _sooner(trainer):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.accelerator.wait_for_everyone()  # the first process has then written its last line
    if recorder.stopped:
        raise Terminated
    logged = [entry["loss"] for entry in read_metrics(context.folder) if "loss" in entry]
    return {"steps": trainer.state.global_step, "loss": {"first": logged[0], "last": logged[-1]}}


def evaluate(trainer: Trainer) -> dict[str, float]:
    """The trainer's figures on what it does not learn from."""
    with _sooner(trainer):
        figures: dict[str, float] = trainer.evaluate()
    return figures


@contextlib.contextmanager
def _sooner(trainer: Trainer) -> Iterator[None]:
    """Within, its models compute in the ways that are faster on a CPU, if they are on one."""
    models = [trainer.model, *(getattr(trainer, name, None) for name in ("ref_model", "reference"))]
    with float32_attention(trainer.args.device), each_token_once(m for m in models if isinstance(m, nn.Module)):
        yield


def save(
    trainer: Trainer, context: Context, chat: Chat, name: str | None, facts: Mapping[str, object], part: str = ""
) -> None:
    """Writes `<stage folder>/model` and removes the checkpoints. `name` is the starting model's in the recipe.

    `part` is the submodule of the trainer's model that is saved; absent = all of it.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_deepspeed_enabled else None
    if state is not None and part:
        state = {key.removeprefix(f"{part}."): each for key, each in state.items() if key.startswith(f"{part}.")}
    if trainer.is_world_process_zero():
        facts = {"stage": context.stage_id, "steps": trainer.state.global_step, **facts}
        if context.constitution is not None:
            facts = {**facts, "constitution": context.constitution.name}
        checkpoint.save_checkpoint(
            context.folder / "model",
            trainer.model.get_submodule(part),
            chat.tokenizer,
            context.model(name),
            facts,
            state_dict=state,
        )
        remove(context.folder / CHECKPOINTS)
    trainer.accelerator.wait_for_everyone()


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes `metrics.jsonl`, drives the progress display, marks checkpoints as complete and stops where asked to."""

    def __init__(self, context: Context, accelerator: Accelerator) -> None:
        self.context = context
        self.accelerator = accelerator
        self.stopped = False
        self.path = context.folder / METRICS
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tokens = state.num_input_tokens_seen
        if state.is_world_process_zero:
            keep_rows(self.path, lambda entry: entry["step"] <= state.global_step)
            self.context.progress.start(total=state.max_steps, unit="steps", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = int(state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self.context.progress.advance(1, tokens=seen - self.tokens)
        self.tokens = seen
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than `logging_steps` has a loss too
        elif self._asked_to_stop():
            self.stopped = control.should_save = control.should_training_stop = True
        self._before_checkpoint(state, control)

    def _asked_to_stop(self) -> bool:
        """The first process looks and tells the others, so that all stop after the same step."""
        found = self.accelerator.is_main_process and stopping.requested(self.context.folder)
        if self.accelerator.num_processes == 1:
            return found
        told = torch.tensor(found, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.broadcast(told, src=0)
        return bool(told)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before_checkpoint(state, control)

    def _before_checkpoint(self, state: Any, control: Any) -> None:
        """No checkpoint after the last step: the model is saved next, and Trainer, resuming, takes one step too many.
        And none with sums that are yet to be logged: Trainer forgets them."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        elif control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        entry = {key: value for key, value in (logs or {}).items() if not key.endswith(_NOT_METRICS)}
        if "train_loss" in entry:
            return  # the library's summary of this process's part of the run
        for key in ("loss", "grad_norm"):
            if not math.isfinite(entry.get(key, 0.0)):
                raise StageFailed(
                    f"stage {self.context.stage_id!r}: `{key}` is {entry[key]} at step {state.global_step}; "
                    f"lower `learning_rate` under `train:` or use a profile with dtype float32"
                )
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(canonical_json({"step": state.global_step, **entry}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.accelerator.wait_for_everyone()  # each process has then written its part
        if state.is_world_process_zero:
            write_json(
                Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, written_by(self.accelerator)
            )
            if self.stopped:
                self.context.progress.note(f"stopped at step {state.global_step}; a checkpoint has what was learned")


def written_by(accelerator: Accelerator) -> dict[str, Any]:
    """Who writes a checkpoint: how many processes, and which stage of ZeRO parts the optimizer's state over them."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return {"processes": accelerator.num_processes, "zero": 0 if plugin is None else plugin.zero_stage}


def _check_processes(resume: Path, now: Mapping[str, Any], context: Context) -> None:
    """Refuses a checkpoint that is parted otherwise than these processes would part it."""
    before = read_json(resume / COMPLETE)
    if before == now or (before["zero"] == now["zero"] == 0):
        return

    def words(by: Mapping[str, Any]) -> str:
        how = f"under DeepSpeed ZeRO-{by['zero']}" if by["zero"] else "without DeepSpeed"
        return f"{by['processes']} process{'es' * (by['processes'] != 1)} {how}"

    raise StageFailed(
        f"stage {context.stage_id!r} stands at {resume.name}, which was written by {words(before)} and cannot be gone "
        f"on from by {words(now)}: use a profile with as many as before, or start the stage again with "
        f"`--from {context.stage_id}`"
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint a stage goes on from; half-written ones do not count."""
    found = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One object a logging step."""
    return _whole_rows(folder / METRICS)


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Takes those lines out of a file that a resumed run writes again. Without the file, an empty one is made."""
    rows = [row for row in _whole_rows(path) if keep(row)]
    with replacing(path) as file:
        file.write("".join(row_lines(rows)).encode())


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line, but for a line that a kill cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows in memory, as the trainers take them."""
    return Dataset.from_list(list(rows))


@contextlib.contextmanager
def quiet(context: Context) -> Iterator[None]:
    """The libraries show errors only: progress and what a user can act on is told by the stage itself."""
    import datasets
    import transformers

    environment = {"TQDM_DISABLE": "1", "TENSORBOARD_LOGGING_DIR": str(context.folder / "tensorboard")}
    before = {name: os.environ.get(name) for name in environment}
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    os.environ.update(environment)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for module in ("trl", "transformers", "accelerate", "peft", "torch", "datasets"):
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
