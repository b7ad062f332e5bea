"""When reinforcement learning must stop: what a falling loss and a rising reward do not show.

A proxy that is optimised too far is known by its reward going up while responses grow, repeat themselves or do not end
(Gao et al. 2023, arXiv 2210.10760, for what happens; the signs are those that a person looks for). Each rollout is held
against the first one, before anything is learned from it, and some of its responses are written down for that person.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai.contracts.training_config import Limits
from cai.storage.rows import row_lines
from cai.text.errors import StageFailed

SAMPLES = "samples.jsonl"
"""Some responses of each rollout, with their scores."""
SHOWN = 8
"""Responses of a rollout that are written there."""


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of a response's runs of `n` tokens that have occurred in it before; 0 where it is shorter."""
    runs = [tuple(token_ids[at : at + n]) for at in range(len(token_ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def reason_to_stop(limits: Limits, first: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """What is wrong with the figures of a rollout, given those of the first one; None where nothing is.

    Figures: `reward`, `kl` (nats a response), `length` (tokens), `unfinished` and `repetition` (shares).
    """
    for name, value in now.items():
        if not math.isfinite(value):
            return f"`{name}` is {value}"
    if now["kl"] > limits.kl:
        return f"the KL to the reference is {now['kl']:.1f} nats a response, above `limits: {{kl: {limits.kl:g}}}`"
    if now["reward"] <= first["reward"]:
        return None
    signs = []
    if now["length"] > limits.length * first["length"]:
        signs.append(f"responses have {now['length']:.0f} tokens, {first['length']:.0f} at first")
    for name, words in (("unfinished", "are cut off"), ("repetition", "of what they say repeats itself")):
        if now[name] > first[name] + getattr(limits, name):
            signs.append(f"{now[name]:.0%} {words}, {first[name]:.0%} at first")
    if not signs:
        return None
    return (
        f"the reward rose from {first['reward']:.2f} to {now['reward']:.2f} while {'; '.join(signs)}: "
        "signs that the reward is exploited (`limits:` says how far they may go)"
    )


def check(
    limits: Limits, first: Mapping[str, float], now: Mapping[str, float], number: int, checkpoint: Path | None
) -> None:
    """Raises StageFailed where rollout `number`, from 0, must not be learned from. `checkpoint` is the last one."""
    if reason := reason_to_stop(limits, first, now):
        none = "there is no checkpoint yet (`save_steps` under `train:`)"
        kept = f"{checkpoint} is from before" if checkpoint else none
        raise StageFailed(f"stopped before rollout {number + 1} was learned from: {reason}; {kept}")


def write_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the first of a rollout's rows to those of earlier ones."""
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(row_lines(rows[:SHOWN]))
