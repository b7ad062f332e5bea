"""When reinforcement learning must stop: failures that a falling loss and a rising reward do not show.

A policy that over-optimises its reward gets a rising reward while its responses grow, repeat themselves or do not end
(Gao et al. 2023, arXiv 2210.10760, describe the effect; these signs are what a person would look for). Each rollout is
compared with the first one before anything is learned from it, and some of its responses are written to a file. A
rollout is also refused where too many of its responses have no reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cai.contracts.training_config import Limits
from cai.storage.rows import Failure, row_lines
from cai.text.errors import StageFailed
from cai.text.left_out import MAX_REASONS, failure_reasons

SAMPLES = "samples.jsonl"
"""Some responses of each rollout, with their scores."""
SAMPLES_PER_ROLLOUT = 8


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of a response's runs of `n` tokens that have occurred in it before; 0 where it is shorter."""
    runs = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def stop_if_rewards_failed(
    limits: Limits, n_responses: int, failures: Sequence[Failure], rollout: int, resume_point: Path | None
) -> None:
    """Raises StageFailed where too many responses of rollout number `rollout` have no reward, or all of them.

    `failures` are those of the responses that have none. A policy that learns from the others alone learns from
    whatever the rewards happen to be able to score.
    """
    if len(failures) > limits.failed * n_responses or len(failures) == n_responses:
        counted = ", ".join(f"{reason.n:,} {reason.reason}" for reason in failure_reasons(failures)[:MAX_REASONS])
        _stop(
            rollout,
            f"{len(failures):,} of {n_responses:,} responses have no reward, above `limits: {{failed: "
            f"{limits.failed:g}}}`: {counted}",
            resume_point,
        )


def reason_to_stop(limits: Limits, first: Mapping[str, float], current: Mapping[str, float]) -> str | None:
    """What is wrong with the figures of a rollout compared with those of the first one; None where nothing is.

    Figures: `reward`, `kl` (nats a response), `length` (tokens), `unfinished` and `repetition` (shares).
    """
    for name, value in current.items():
        if not math.isfinite(value):
            return f"`{name}` is {value}"
    if current["kl"] > limits.kl:
        return f"the KL to the reference is {current['kl']:.1f} nats a response, above `limits: {{kl: {limits.kl:g}}}`"
    if current["reward"] <= first["reward"]:
        return None
    signs = []
    if current["length"] > limits.length * first["length"]:
        signs.append(f"responses have {current['length']:.0f} tokens, {first['length']:.0f} at first")
    for name, description in (("unfinished", "are cut off"), ("repetition", "of their token runs are repeated")):
        if current[name] > first[name] + getattr(limits, name):
            signs.append(f"{current[name]:.0%} {description}, {first[name]:.0%} at first")
    if not signs:
        return None
    return (
        f"the reward rose from {first['reward']:.2f} to {current['reward']:.2f} while {'; '.join(signs)}: "
        "signs that the reward is exploited (`limits:` says how far they may go)"
    )


def stop_if_limits_passed(
    limits: Limits, first: Mapping[str, float], current: Mapping[str, float], rollout: int, resume_point: Path | None
) -> None:
    """Raises StageFailed where nothing must be learned from rollout number `rollout`, counted from 0."""
    if reason := reason_to_stop(limits, first, current):
        _stop(rollout, reason, resume_point)


def _stop(rollout: int, reason: str, resume_point: Path | None) -> NoReturn:
    none_yet = "there is no resume point yet (`save_steps` under `train:`)"
    kept = f"{resume_point} is from before" if resume_point else none_yet
    raise StageFailed(f"stopped before rollout {rollout + 1} was learned from: {reason}; {kept}")


def write_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends the first rows of a rollout to `samples.jsonl`."""
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(row_lines(rows[:SAMPLES_PER_ROLLOUT]))
