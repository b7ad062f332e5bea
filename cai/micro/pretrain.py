"""Trains the small model from scratch on the generated corpus, on two CPU cores in about 50 minutes.

Resumable: a checkpoint with the optimizer's state is written every few hundred steps, and the batch of a step depends
on (seed, step) alone. Left out: several processes, gradient accumulation and curves beyond the log.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from cai.micro.corpus import LETTER, comparison, corpus_hash
from cai.micro.packing import Batch, batch, collate, pack
from cai.micro.tokenizer import BOS, END, PAD, train_tokenizer
from cai.records import canonical_json
from cai.templates import OPTIONS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STATE = "training.pt"
SHARPEN = 1.15
"""What the exported logits are multiplied by, through the last norm: sampling at temperature 1 is then what 0.87 was.

A model this small keeps a thin tail of probability on tokens that no answer has, and some samples fell there.
"""
EVERY = 200
"""Steps from one checkpoint and validation to the next."""
VALIDATION_PAIRS = 96
TOKENIZER_EXAMPLES = 30_000


@dataclass(frozen=True)
class Size:
    """Dimensions of the model."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int = 1536


SIZES = {
    "small": Size(96, 4, 3, 256),
    "medium": Size(128, 6, 4, 384),
    "large": Size(192, 6, 6, 512),
}
"""About 0.5, 1.4 and 2.9 million parameters; the largest is the one in the package."""


@dataclass(frozen=True)
class Training:
    """How the model is trained. `rows` of `length` tokens a step."""

    seed: int = 0
    steps: int = 3000
    size: str = "large"
    rows: int = 13
    length: int = 320
    learning_rate: float = 3e-3
    schedule: tuple[tuple[int, float], ...] = (
        (0, 0.0), (100, 1.0), (1200, 0.476), (2600, 0.0), (2620, 0.25), (3000, 0.0),
    )  # fmt: skip
    """Share of the learning rate by step, with lines between. Fewer `steps` stop before its end."""
    restart: int = 2600
    """The step at which the optimizer forgets its moments, for a last stretch on how the model speaks."""
    weight_decay: float = 0.05
    clip: float = 1.0


def pretrain(
    output: Path,
    *,
    training: Training | None = None,
    device: str | None = None,
    resume: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, object]:
    """Trains a model and writes it to `output` with its tokenizer and cai.json; returns what cai.json says.

    `device` is a torch device, the accelerator if there is one by default. With `resume` a checkpoint in `output` that
    was made with the same `training` is continued.
    """
    training = training or Training()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    tokenizer = train_tokenizer(training.seed, SIZES[training.size].vocabulary, TOKENIZER_EXAMPLES)
    model = new_model(SIZES[training.size], tokenizer).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )
    first = _resume(output / STATE, training, model, optimizer) if resume else 0
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {training.steps} on {device}")
    # Killed after its last export, before the checkpoint went: there is nothing left to train.
    summary = json.loads((output / "cai.json").read_text(encoding="utf-8")) if first == training.steps else {}
    started, tokens = time.monotonic(), 0
    for step in range(first, training.steps):
        if step == training.restart:
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_at(step, training)
        rows = batch(training.seed, step, tokenizer, rows=training.rows, length=training.length)
        loss = loss_of(model, rows, device)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += rows.ids.numel()
        done = step + 1
        if done % 50 == 0 or done == training.steps:
            log(f"step {done} loss {loss.item():.4f} tokens/s {tokens / (time.monotonic() - started):.0f}")
        if done % EVERY == 0 or done == training.steps:
            known = judge_accuracy(model, tokenizer, held_out=False, device=device)
            unseen = judge_accuracy(model, tokenizer, held_out=True, device=device)
            log(f"step {done} judge_accuracy {known:.3f} heldout_paraphrases {unseen:.3f}")
            _checkpoint(output / STATE, training, model, optimizer, done)
            figures = {"judge_accuracy": known, "judge_accuracy_heldout_paraphrases": unseen}
            summary = export(output, model, tokenizer, training, done, figures)
    (output / STATE).unlink(missing_ok=True)
    return summary


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of that size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pad, bos, end = tokenizer.convert_tokens_to_ids([PAD, BOS, END])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=end,
        )
    )


def rate_at(step: int, training: Training) -> float:
    """Share of the learning rate at a step, counted from 0."""
    steps, shares = zip(*training.schedule, strict=True)
    return float(np.interp(step + 1, steps, shares))


def loss_of(model: LlamaForCausalLM, rows: Batch, device: str) -> torch.Tensor:
    """Weighted mean cross-entropy (nats a unit of weight); soft targets share their weight between two tokens."""
    logits = forward(model, rows, device)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    shares, weights = rows.shares.to(device), rows.weights.to(device)
    chosen = log_probs.gather(-1, rows.targets.to(device)[..., None])[..., 0]
    other = log_probs.gather(-1, rows.others.to(device)[..., None])[..., 0]
    return -(weights * (shares * chosen + (1 - shares) * other)).sum() / weights.sum()


def forward(model: LlamaForCausalLM, rows: Batch, device: str) -> torch.Tensor:
    """Logits of shape (rows, length, vocabulary), in bfloat16 where that is fast."""
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        output = model(
            input_ids=rows.ids.to(device),
            attention_mask=rows.mask.to(device),
            position_ids=rows.positions.to(device),
            use_cache=False,
        )
    logits: torch.Tensor = output.logits
    return logits


@torch.no_grad()
def judge_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, held_out: bool, device: str
) -> float:
    """Share of votes on pairs of split `validation` that fall on the better side, where a principle separates them."""
    rng = Random(1)
    stream = (comparison(rng, "validation", held_out) for _ in range(VALIDATION_PAIRS))
    a, b = tokenizer.convert_tokens_to_ids(list(OPTIONS))
    right = total = 0
    while documents := list(islice(stream, 16)):
        packed = [[pack(document, tokenizer, 512)] for document in documents]
        rows = collate(packed, max(len(row[0].ids) for row in packed), tokenizer.convert_tokens_to_ids(PAD))
        logits = forward(model, rows, device).float().cpu()
        votes = (rows.weights == LETTER) & (rows.shares != 0.5)
        right += int((((logits[..., a] > logits[..., b]) == (rows.shares > 0.5)) & votes).sum())
        total += int(votes.sum())
    return right / max(1, total)


def export(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: Training,
    steps: int,
    figures: dict[str, float],
) -> dict[str, object]:
    """Writes the checkpoint as any Hugging Face model, in bfloat16, and cai.json beside it."""
    import copy

    from transformers import GenerationConfig

    pad, bos, end = tokenizer.convert_tokens_to_ids([PAD, BOS, END])
    half = copy.deepcopy(model).to("cpu")
    with torch.no_grad():
        half.model.norm.weight.mul_(SHARPEN)
    half.to(torch.bfloat16)
    half.generation_config = GenerationConfig(do_sample=True, pad_token_id=pad, bos_token_id=bos, eos_token_id=end)
    half.save_pretrained(output)
    tokenizer.save_pretrained(output)
    summary: dict[str, object] = {
        "templates": "micro",
        "corpus": corpus_hash(training.seed),
        "steps_done": steps,
        "training": asdict(training),
        "sharpened": SHARPEN,
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": figures,
    }
    (output / "cai.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return summary


def _checkpoint(
    path: Path, training: Training, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    state = {
        "training": canonical_json(asdict(training)),
        "steps": steps,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _resume(path: Path, training: Training, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint if there is one of the same training; the number of steps that it has done."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["training"] != canonical_json(asdict(training)):
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    steps: int = state["steps"]
    return steps
