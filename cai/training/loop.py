"""Trains with resume points, metrics on disk and a clean stop on SIGTERM, and saves the model.

Resume points lie in the stage's folder until its model does. A stage that is killed anywhere continues from its newest
complete resume point, or from its start where there is none. On one CPU process it then ends with the same weights,
byte for byte, and the same `metrics.jsonl` as an undisturbed run; where vLLM samples the responses, vLLM's rounding,
which depends on its batches, is the exception. A stage that is asked to stop (`cai.storage.stopping`) writes a resume
point after the current step and logs that step, which adds a line of metrics between two that `logging_steps` asks for.
Besides those that the recipe's `save_steps` asks for, a resume point is written when the profile's
`resume_point_minutes` have passed since the last one, and `LEAST_INTERVAL` times as long as that one took to write:
after a step that is logged anyway, so that no result depends on the time.

Trained weights are float32, and the profile's precision is that of the arithmetic (autocast). Frozen weights, an
adapter's base or a reference, are in the profile's precision. Under DeepSpeed all weights are in the profile's
precision and the optimizer's copies in float32. Under ZeRO-3 a model is partitioned while it is loaded, so that no
process holds all of it; a model that starts from an adapter is whole in each process until the adapter is merged.

Left out: continuing from DeepSpeed's resume points with another number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from cai.attention.cpu_tuning import float32_attention, return_freed_memory
from cai.attention.token_budget import is_out_of_memory
from cai.attention.token_trees import compute_shared_tokens_once
from cai.contracts.context import Context
from cai.models import saving
from cai.storage import stopping
from cai.storage.files import read_json, remove_folder, write_json
from cai.storage.rows import canonical_json
from cai.storage.run_folder import MODEL, STAGE
from cai.storage.stage_folders import began
from cai.text.errors import OutOfMemory, StageFailed, Terminated
from cai.training.dropout import configured_dropout
from cai.training.memory import peak_bytes, reset_peak
from cai.training.metrics import METRICS, NON_METRIC_SUFFIXES, keep_rows, read_metrics
from cai.training.micro_batch import MemoryRecord
from cai.training.step_count import StepCount, record_resume_point, remove_step_count

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

    from cai.contracts.model import Model
    from cai.models.chat import Chat

RESUME_POINTS = "checkpoints"
"""Folder of a training stage's resume points, in the stage's own; transformers calls each `checkpoint-<step>`."""
_LARGE_ACTIVATIONS = 500_000_000
"""Bytes. Gaps are up to half of what activations take."""
COMPLETE = "COMPLETE"
"""Written into a resume point when all its other files are there: the processes that wrote it."""


def train_or_resume(trainer: Trainer, context: Context) -> dict[str, Any]:
    """Trains, from the newest complete resume point if there is one. Returns `training_figures`.

    Raises StageFailed where the loss stops being a number or these processes cannot continue from the resume point,
    Terminated where the stage is asked to stop before its end.
    """
    trainer.remove_callback(PrinterCallback)
    callback = StageCallback(context, trainer.accelerator)
    trainer.add_callback(callback)
    resume_point = newest_resume_point(context.folder)
    trainer.accelerator.wait_for_everyone()  # all processes have looked before one of them removes incomplete ones
    if resume_point is not None:
        _check_processes(resume_point, process_layout(trainer.accelerator), context)
        context.progress.note(f"resuming from {resume_point.name}")
    elif trainer.is_world_process_zero():
        remove_folder(context.folder / RESUME_POINTS)
    if _is_large(MemoryRecord.read(context.folder)):
        return_freed_memory(trainer.args.device)
    reset_peak(trainer.args.device)
    with cpu_kernels(trainer), out_of_memory_as_error(context.stage_id):
        trainer.train(resume_from_checkpoint=None if resume_point is None else str(resume_point))
    trainer.accelerator.wait_for_everyone()  # the first process has then written its last line
    _record_peak(trainer, context.folder)
    if callback.stopped:
        raise Terminated
    return training_figures(context.folder)


def training_figures(folder: Path) -> dict[str, Any]:
    """The number of steps, and the first and the last logged loss, of the stage in `folder`."""
    entries = [entry for entry in read_metrics(folder) if "loss" in entry]  # the last step is always logged
    return {"steps": entries[-1]["step"], "loss": {"first": entries[0]["loss"], "last": entries[-1]["loss"]}}


def _is_large(record: MemoryRecord | None) -> bool:
    """Whether the gaps that activations of changing sizes leave in memory would matter."""
    return record is not None and record.planned.get("activations", 0) > _LARGE_ACTIVATIONS


def _record_peak(trainer: Trainer, folder: Path) -> None:
    """Records the most memory that any process had while it trained."""
    peaks = trainer.accelerator.gather(torch.tensor([peak_bytes(trainer.args.device)], device=trainer.args.device))
    record = MemoryRecord.read(folder)
    if trainer.is_world_process_zero() and record is not None:
        replace(record, measured_peak=max(int(peaks.max()), record.measured_peak or 0)).write(folder)


@contextlib.contextmanager
def out_of_memory_as_error(stage_id: str) -> Iterator[None]:
    """Raises OutOfMemory where a device or machine refuses memory within the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"stage {stage_id!r} ran out of memory") from error


@contextlib.contextmanager
def cpu_kernels(trainer: Trainer) -> Iterator[None]:
    """On a CPU, the trainer's models compute with the faster kernels of `cai.attention` within the block."""
    models = [trainer.model, *(getattr(trainer, name, None) for name in ("ref_model", "reference"))]
    modules = (model for model in models if isinstance(model, nn.Module))
    with float32_attention(trainer.args.device), compute_shared_tokens_once(modules):
        yield


def save_trained_model(
    trainer: Trainer, context: Context, chat: Chat, start: Model, facts: Mapping[str, object], submodule: str = ""
) -> None:
    """Writes `<stage folder>/model`: the `submodule` of that name, or all. Removes the resume points.

    The folder `model` is complete where it exists, also after a kill at any time.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_deepspeed_enabled else None
    if state is not None and submodule:
        prefix = f"{submodule}."
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if trainer.is_world_process_zero():
        facts = {"stage": context.stage_id, "steps": trainer.state.global_step, **facts}
        if context.constitution is not None:
            facts = {**facts, "constitution": context.constitution.name}
        model = trainer.model.get_submodule(submodule)
        incomplete, complete = context.folder / "model.incomplete", context.folder / MODEL
        remove_folder(incomplete)
        with configured_dropout(trainer.model):
            saving.save_model(incomplete, model, chat.tokenizer, start, facts, state_dict=state)
        remove_folder(complete)
        incomplete.rename(complete)
        remove_folder(context.folder / RESUME_POINTS)
        remove_step_count(context.folder)
    trainer.accelerator.wait_for_everyone()


def _stage_start(folder: Path) -> float:
    """When the stage in `folder` was started or continued, on the clock of `time.monotonic`."""
    age = time.time() - began(folder) if (folder / STAGE).exists() else 0.0
    return time.monotonic() - max(0.0, age)


LEAST_INTERVAL = 20
"""Time between resume points as a multiple of what writing one takes: at most about 5 % of training is spent on it."""
CONTINUE, SAVE, STOP = range(3)
"""What all processes do after a step: go on, write a resume point and go on, or write one and stop."""


class StageCallback(TrainerCallback):  # type: ignore[misc]
    """Writes `metrics.jsonl`, advances the progress display, has resume points written and marks them complete, stops
    where asked to."""

    def __init__(self, context: Context, accelerator: Accelerator) -> None:
        self.context, self.accelerator = context, accelerator
        self.metrics_path = context.folder / METRICS
        self.stopped, self.n_tokens_reported = False, 0
        self.last_save = _stage_start(context.folder)
        """When the last resume point was written, or the stage was started: a kill costs its loading too."""
        self.writing_began = time.monotonic()
        """When the last step, its log or an evaluation was complete, after which a resume point may be written."""
        self.writing_seconds = 0.0
        """What the last resume point took to write."""
        self.n_micro_batches = self.n_evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n_tokens_reported = state.num_input_tokens_seen
        if state.is_world_process_zero:
            keep_rows(self.metrics_path, lambda entry: entry["step"] <= state.global_step)
            StepCount(state.max_steps, state.global_step, state.global_step).write(self.context.folder)
            self.context.progress.start(total=state.max_steps, unit="steps", finished=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n_micro_batches = self.n_evaluated = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n_micro_batches += 1
        if state.is_world_process_zero:
            unit = f"micro-batches of step {state.global_step + 1}"
            self.context.progress.report_part(self.n_micro_batches, args.gradient_accumulation_steps, unit)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self.n_evaluated += 1
        if state.is_world_process_zero:
            self.context.progress.report_part(self.n_evaluated, len(eval_dataloader), "held-out batches")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n_evaluated = 0
        self.writing_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.writing_began = time.monotonic()
        n_tokens = int(state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self.context.progress.advance(1, tokens=n_tokens - self.n_tokens_reported)
        self.n_tokens_reported = n_tokens
        if state.global_step >= state.max_steps:
            control.should_log = True  # a run shorter than `logging_steps` has a loss too
        elif action := self._action(is_logged=control.should_log):
            control.should_save = True
            self.stopped = control.should_training_stop = action == STOP
        self._adjust_saving(state, control)

    def _action(self, is_logged: bool) -> int:
        """CONTINUE, SAVE or STOP: the first process decides and broadcasts, so that all do the same after this step."""
        action = CONTINUE
        if self.accelerator.is_main_process:
            if stopping.requested(self.context.folder):
                action = STOP
            elif is_logged and time.monotonic() - self.last_save >= self._least_interval():
                action = SAVE
        if self.accelerator.num_processes == 1:
            return action
        agreed = torch.tensor(action, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.broadcast(agreed, src=0)
        return int(agreed)

    def _least_interval(self) -> float:
        """Seconds from one resume point to the next that is written for the time alone."""
        seconds = 60 * self.context.profile.resume_point_minutes
        return max(seconds, LEAST_INTERVAL * self.writing_seconds) if seconds else 0.0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._adjust_saving(state, control)

    def _adjust_saving(self, state: Any, control: Any) -> None:
        """Writes no resume point after the last step, and logs before every other one."""
        if state.global_step >= state.max_steps:  # where Trainer (transformers 5.23) would take one step too many
            control.should_save = False
        elif control.should_save:  # a resume point does not hold sums that have not been logged yet
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        entry = {key: value for key, value in (logs or {}).items() if not key.endswith(NON_METRIC_SUFFIXES)}
        if "train_loss" in entry:
            return  # Trainer's summary of this process's part of the run
        self.writing_began = time.monotonic()
        for key in ("loss", "grad_norm"):
            if not math.isfinite(entry.get(key, 0.0)):
                raise StageFailed(
                    f"stage {self.context.stage_id!r}: `{key}` is {entry[key]} at step {state.global_step}; "
                    f"lower `learning_rate` under `train:` or use a profile with dtype float32"
                )
        if state.is_world_process_zero:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(canonical_json({"step": state.global_step, **entry}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.accelerator.wait_for_everyone()  # each process has then written its part
        self.last_save = time.monotonic()
        self.writing_seconds = self.last_save - self.writing_began
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, process_layout(self.accelerator))
            record_resume_point(self.context.folder, state.global_step)
            if self.stopped:
                self.context.progress.note(f"stopped at step {state.global_step}; a resume point has what was learned")


def process_layout(accelerator: Accelerator) -> dict[str, Any]:
    """The number of processes, and the stage of ZeRO that partitions the optimizer's state over them."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return {"processes": accelerator.num_processes, "zero": 0 if plugin is None else plugin.zero_stage}


def _check_processes(resume_point: Path, layout: Mapping[str, Any], context: Context) -> None:
    """Raises StageFailed where the resume point is partitioned differently from how these processes partition."""
    saved_layout = read_json(resume_point / COMPLETE)
    if saved_layout == layout or (saved_layout["zero"] == layout["zero"] == 0):
        return

    def in_words(layout: Mapping[str, Any]) -> str:
        deepspeed = f"under DeepSpeed ZeRO-{layout['zero']}" if layout["zero"] else "without DeepSpeed"
        return f"{layout['processes']} process{'es' * (layout['processes'] != 1)} {deepspeed}"

    raise StageFailed(
        f"stage {context.stage_id!r} stands at {resume_point.name}, which was written by {in_words(saved_layout)} and "
        f"cannot be continued by {in_words(layout)}: use a profile with as many as before, or start the stage again "
        f"with `--from {context.stage_id}`"
    )


def newest_resume_point(folder: Path) -> Path | None:
    """The resume point that the stage in `folder` continues from; incomplete ones do not count."""
    complete = [path.parent for path in (folder / RESUME_POINTS).glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
