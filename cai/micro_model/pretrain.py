"""Trains the small model from scratch on the generated corpus, in 70 minutes on one CPU core. Not tried on a GPU.

Muon (Jordan et al. 2024) trains the matrices of the layers, for which it needed about half of AdamW's steps in trials;
AdamW trains the other parameters. A resume point with the optimizers' state is saved every `RESUME_EVERY` steps, and a
batch depends on the seed and the step alone, so that an interrupted training ends with the same model. Figures on the
validation split are logged and drawn. Left out: several processes and gradient accumulation.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from cai.micro.world import HOW_TO, topics_of
from cai.micro_model import tasks
from cai.micro_model.corpus import MAKERS, Source, corpus_hash, is_long
from cai.micro_model.forward import logits_of, loss_of
from cai.micro_model.packing import Batch, collate, make_batch, pack
from cai.micro_model.tokenizer import BOS, CONTEXT_LENGTH, END, PAD, train_tokenizer
from cai.report.pictures import COLOURS, GRID, MUTED, saved_figure
from cai.storage.rows import canonical_json
from cai.templates import OPTIONS
from cai.text.formatting import printable

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

RESUME_POINT, METRICS = "training.pt", "metrics.jsonl"
CURVES = {
    "loss": "training loss, nats",
    "validation_loss": "validation loss, nats",
    "judge_accuracy": "judge accuracy, validation",
    "world_accuracy": "world accuracy, validation",
}
"""Metrics that are drawn, and the titles of their panels."""
SHARPEN = 1.5
"""Factor on the exported logits, applied to the last norm's weight: temperature 1 then samples as 0.67 did before.

A model this small leaves some probability on tokens that no answer has, which were sampled now and then.
"""
RESUME_EVERY = 200
"""Steps from one resume point and validation to the next; a multiple of `LOG_EVERY`."""
LOG_EVERY = 50
VALIDATION_DOCUMENTS = 96
TOKENIZER_EXAMPLES = 20_000


@dataclass(frozen=True)
class Size:
    """Dimensions of the model."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int = 3072


SIZES = {"small": Size(96, 3, 3, 256), "medium": Size(144, 5, 3, 384), "large": Size(224, 6, 4, 608)}
"""About 0.6, 1.7 and 4.3 million parameters; the largest is the one in the package."""


@dataclass(frozen=True)
class Training:
    """How the model is trained. A step has `rows` of `length` tokens; a long step has rows of full contexts instead."""

    seed: int = 0
    steps: int = 6000
    """With fewer steps training stops before the schedule and the corpus end."""
    size: str = "large"
    rows: int = 10
    length: int = 416
    learning_rate: float = 3e-3
    warm_up: int = 50
    schedule: tuple[tuple[int, float], ...] = ((0, 1.0), (4000, 1.0), (6000, 0.0))
    """(step, factor on the learning rate), linearly interpolated."""
    weight_decay: float = 0.05
    momentum: float = 0.95
    clip: float = 1.0


def pretrain(
    output: Path, *, training: Training | None = None, device: str | None = None, resume: bool = True,
    compiled: bool | None = None, log: Callable[[str], None] = print,
) -> dict[str, object]:  # fmt: skip
    """Trains a model and writes it to `output` with its tokenizer, cai.json, metrics.jsonl and its curves.

    `device` is a torch device, by default the accelerator if there is one. With `resume` training continues from a
    resume point in `output`, if it is of the same `training` and corpus. `compiled` says whether layers are compiled,
    by default if there is a compiler. Returns the content of cai.json.
    """
    training = training or Training()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if compiled is None:
        compiled = can_compile(device)
        if not compiled:
            log("found no compiler (g++ on a CPU, triton on a GPU): a step takes about 1.6 times as long")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    tokenizer = train_tokenizer(training.seed, SIZES[training.size].vocabulary, TOKENIZER_EXAMPLES)
    model = new_model(SIZES[training.size], tokenizer).to(device)
    optimizers = new_optimizers(model, training)
    first = _resume(output / RESUME_POINT, training, model, optimizers) if resume else 0
    _truncate_metrics(output / METRICS, first)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {training.steps} on {device}")
    # A training that was killed between its last export and the removal of its resume point has no steps left.
    summary = json.loads((output / "cai.json").read_text(encoding="utf-8")) if first == training.steps else {}
    validation = validation_batches(tokenizer, training)
    started, tokens, losses = time.monotonic(), 0, []
    for step in range(first, training.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * rate_at(step, training)
        rows = step_batch(training, step, tokenizer)
        with denormals_flushed():
            loss = loss_of(model, rows, compiled=compiled)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        tokens += rows.ids.numel()
        losses.append(loss.item())
        n_done = step + 1
        if n_done % LOG_EVERY == 0 or n_done == training.steps:
            rate = tokens / (time.monotonic() - started)
            minutes_left = (training.steps - n_done) * training.rows * training.length / rate / 60
            mean_loss = sum(losses) / len(losses)
            log(f"step {n_done} loss {mean_loss:.4f} tokens/s {rate:.0f}, {minutes_left:.0f} minutes left")
            _append_metrics(output / METRICS, {"step": n_done, "loss": mean_loss})
            losses = []
        if n_done % RESUME_EVERY == 0 or n_done == training.steps:
            figures = validate(model, validation)
            log(f"step {n_done} " + " ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            _append_metrics(output / METRICS, {"step": n_done, **figures})
            _draw_curves(output)
            _save_resume_point(output / RESUME_POINT, training, model, optimizers, n_done)
            summary = export(output, model, tokenizer, training, n_done, figures)
    (output / RESUME_POINT).unlink(missing_ok=True)
    return summary


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Treats denormal numbers as 0 in this block, because CPUs compute slowly with them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def can_compile(device: str) -> bool:
    """Whether torch can compile for the device: on a CPU it needs a C++ compiler, on a GPU triton."""
    if device == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return importlib.util.find_spec("triton") is not None


def step_batch(training: Training, step: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of a step."""
    rows, length = training.rows, training.length
    if is_long(step) and rows * length >= CONTEXT_LENGTH:
        rows, length = rows * length // CONTEXT_LENGTH, CONTEXT_LENGTH
    return make_batch(training.seed, step, tokenizer, rows=rows, length=length)


def new_optimizers(model: LlamaForCausalLM, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, scaled so that AdamW's learning rate fits; AdamW for the other parameters."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    lr, decay = training.learning_rate, training.weight_decay
    muon = torch.optim.Muon(
        hidden, lr=lr, weight_decay=decay, momentum=training.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)]


def rate_at(step: int, training: Training) -> float:
    """Factor on the learning rate at a step, counted from 0."""
    steps, shares = zip(*training.schedule, strict=True)
    return min((step + 1) / training.warm_up, float(np.interp(step, steps, shares)))


@dataclass(frozen=True)
class Validation:
    """Batches about the topics of split `validation`."""

    batches: Sequence[Batch]
    answers: dict[str, tuple[int, int]]
    """By figure, the ids of the two tokens that answer its questions."""


def validation_batches(tokenizer: PreTrainedTokenizerFast, training: Training) -> Validation:
    """The same documents for every model with the same tokenizer."""
    rng = Random(1)
    source = Source(rng, "validation")
    names = ("comparison", "acts", "review", "dialogue")
    documents = [MAKERS[name](source) for name in names for _ in range(VALIDATION_DOCUMENTS)]
    for kind in HOW_TO:
        for topic in topics_of("validation", kind):
            documents.append([tasks.judge_deed(kind, topic.name, rng) for _ in range(3)])
    packed = [pack(document, tokenizer, training.length) for document in documents]
    packed.sort(key=lambda document: len(document.ids))
    pad = tokenizer.convert_tokens_to_ids(PAD)
    batches = [
        collate([[document] for document in packed[i : i + 24]], len(packed[min(i + 24, len(packed)) - 1].ids), pad)
        for i in range(0, len(packed), 24)
    ]
    a, b = tokenizer.convert_tokens_to_ids(list(OPTIONS))
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    return Validation(batches, {"judge_accuracy": (a, b), "world_accuracy": (yes, no)})


@torch.no_grad()
def validate(model: LlamaForCausalLM, validation: Validation) -> dict[str, float]:
    """Mean loss, the share of votes for the better response, and that of deeds correctly called wrong or fine."""
    loss = weight = 0.0
    right = dict.fromkeys(validation.answers, 0)
    total = dict.fromkeys(validation.answers, 0)
    for rows in validation.batches:
        logits = logits_of(model, rows).float().cpu()
        log_probs = torch.log_softmax(logits, dim=-1)
        target_log_probs = log_probs.gather(-1, rows.targets[..., None])[..., 0]
        other_log_probs = log_probs.gather(-1, rows.others[..., None])[..., 0]
        loss -= float((rows.weights * (rows.shares * target_log_probs + (1 - rows.shares) * other_log_probs)).sum())
        weight += float(rows.weights.sum())
        for name, (first, second) in validation.answers.items():
            is_answer = (rows.targets == first) | (rows.targets == second)
            p_first = torch.where(rows.targets == first, rows.shares, 1 - rows.shares)
            is_answer &= (rows.weights >= tasks.STATEMENT) & (p_first != 0.5)
            right[name] += int((((logits[..., first] > logits[..., second]) == (p_first > 0.5)) & is_answer).sum())
            total[name] += int(is_answer.sum())
    return {"validation_loss": loss / weight} | {name: right[name] / max(1, total[name]) for name in right}


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of that size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pad, bos, end = tokenizer.convert_tokens_to_ids([PAD, BOS, END])
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=CONTEXT_LENGTH, tie_word_embeddings=True, pad_token_id=pad, bos_token_id=bos,
        eos_token_id=end,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def export(
    output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training: Training, steps: int,
    figures: dict[str, float],
) -> dict[str, object]:  # fmt: skip
    """Writes the checkpoint as any Hugging Face model, in bfloat16, and cai.json beside it."""
    import copy

    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pad, bos, end = tokenizer.convert_tokens_to_ids([PAD, BOS, END])
    half = copy.deepcopy(model).to("cpu")
    with torch.no_grad():
        half.model.norm.weight.mul_(SHARPEN)
    half.to(torch.bfloat16)
    half.generation_config = GenerationConfig(do_sample=True, pad_token_id=pad, bos_token_id=bos, eos_token_id=end)
    half.save_pretrained(output)
    tokenizer.save_pretrained(output)
    summary: dict[str, object] = {
        "templates": "micro", "corpus": corpus_hash(training.seed), "steps_done": steps, "training": asdict(training),
        "sharpened": SHARPEN, "parameters": sum(p.numel() for p in model.parameters()), "figures": figures,
    }  # fmt: skip
    (output / "cai.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return summary


def _save_resume_point(
    path: Path, training: Training, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], steps: int
) -> None:
    state = {
        "training": _identity(training), "steps": steps, "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }  # fmt: skip
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _identity(training: Training) -> str:
    """What must be equal for a training to continue from a resume point."""
    return canonical_json([asdict(training), corpus_hash(training.seed)])


def _resume(
    path: Path, training: Training, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Loads the resume point if it is of the same training and corpus; the number of its steps, 0 if there is none."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["training"] != _identity(training):
        return 0
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    steps: int = state["steps"]
    return steps


def _truncate_metrics(path: Path, steps: int) -> None:
    """Removes logged metrics of steps after the resume point."""
    lines = path.read_text(encoding="utf-8").splitlines() if steps and path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] <= steps]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _append_metrics(path: Path, figures: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(canonical_json(figures) + "\n")


def _draw_curves(output: Path) -> None:
    """Draws the metrics.jsonl of the run to curves.svg: loss, judge accuracy and world accuracy by step."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [json.loads(line) for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]
    with saved_figure(output / "curves.svg", 9, 5) as figure:
        for axes, (metric, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, color=COLOURS[1], lw=1.8, label=printable(output.name))
            axes.set_title(title, loc="left", fontsize=10, weight="bold")
            if metric.endswith("loss"):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(0.45, 1.01)
            axes.grid(color=GRID, lw=0.8)
            axes.tick_params(length=0, colors=MUTED, which="both")
            axes.spines[:].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
        figure.supxlabel("step", fontsize=9, color=MUTED)
