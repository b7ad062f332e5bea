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
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from cai.attention.cpu_kernels import float32_attention
from cai.attention.token_trees import each_token_once
from cai.contracts.context import Context
from cai.storage import stopping
from cai.storage.files import read_json, remove, write_json
from cai.storage.rows import canonical_json
from cai.text.errors import StageFailed, Terminated

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer

    from cai.models.chat import Chat

from cai.models import saving
from cai.training.arguments import CHECKPOINTS
from cai.training.metrics import _NOT_METRICS, METRICS, keep_rows, read_metrics

COMPLETE = "COMPLETE"
"""Written into a checkpoint's folder when all its other files are there: which processes wrote them."""


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
        saving.save_checkpoint(
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
