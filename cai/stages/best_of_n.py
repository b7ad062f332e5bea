"""Keeps the best of several responses to each prompt, by the same rewards that reinforcement learning uses.

Best-of-n (Stiennon et al. 2020, arXiv 2009.01325): n responses are sampled, and the one with the highest reward is
kept; `sft` on these makes a policy. It is the simplest way to raise a reward and the yardstick for the others, because
its distance from the sampling policy is known without measuring: KL <= log n - (n - 1) / n nats a response (an upper
bound, long taken for the value itself: Beirami et al. 2024, arXiv 2401.01879).

Responses that were cut off or are empty would teach the policy to stop in mid-sentence or to say nothing; they are
counted and never chosen. A response without a reward is listed among the failures and not chosen either; a prompt fails
when none of its responses has a reward. Of equal rewards the earlier response is kept.

Left out: choosing by votes between pairs, several responses to a prompt, temperatures between best and average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cai.contracts.context import Context
from cai.contracts.references import OneOrMore, OutputKind, TextsRef
from cai.contracts.stage_config import FeedbackConfig
from cai.contracts.training_config import RewardedConfig
from cai.engines.portion_size import REQUEST_TOKENS, Work, limit_portions, mean_tokens
from cai.feedback.votes import is_empty
from cai.storage.journal import RECORDS, Result
from cai.storage.rows import Failure, Sample, ScoredSample, read_rows, stable_id
from cai.text.errors import StageFailed
from cai.text.left_out import LeftOut, failure_reasons

if TYPE_CHECKING:
    from cai.training.rl.rewards import Rewards


class Config(RewardedConfig, FeedbackConfig):
    gives: ClassVar[OutputKind] = "texts"

    kind: Literal["best-of-n"] = "best-of-n"
    from_: OneOrMore[TextsRef] = Field(alias="from", min_length=1, description="Stages with the responses.")

    def most_responses(self, inputs: Sequence[int]) -> int:
        return 1


def run(config: Config, context: Context) -> dict[str, Any]:
    """Writes one ScoredSample for each prompt: the response with the highest reward."""
    from cai.training.rl.rewards import Rewards

    responses: list[Sample] = context.rows(config.from_)
    by_prompt, left_out = candidates(responses)
    with Rewards(config.rewards, context) as rewards:
        items = [
            {"id": stable_id(context.stage_id, prompt_id), "rows": rows}
            for prompt_id, rows in by_prompt.items()
            if not rewards.reason_unscorable(_prompt(rows[0]))
        ]
        if not items:
            raise StageFailed(
                f"stage {config.id!r}: found no prompt whose responses can be scored among {len(responses)} responses; "
                f"{left_out['cut_off']} are cut off and {left_out['empty']} empty"
            )
        limit = limit_portions(config, context, len(items), *work_of_prompt(config, context, items))
        for portion in context.journal.portions(items, size=config.journal_batch, unit="prompts", limit=limit):
            results = choose(portion.items, rewards, config.attempts(portion), context.journal.report_answer)
            context.journal.append(portion, results)
    _, failed = context.journal.finish()
    report_left_out(context, by_prompt, items, left_out, failed)
    chosen: list[ScoredSample] = read_rows(context.folder / RECORDS)
    if not chosen:
        raise StageFailed(f"none of {len(items)} prompts has a response with a reward; {failed[0].reason}")
    counts = {
        "prompts": len(items),
        "without_principle": len(by_prompt) - len(items),
        "responses": sum(len(item["rows"]) for item in items),
        "left_out": left_out,
        "failed": len(failed),
        "failed_prompts": len(items) - len(chosen),
    }
    return {"best_of_n": {context.stage_id: counts | measure(chosen)}}


def work_of_prompt(config: Config, context: Context, items: Sequence[Mapping[str, Any]]) -> list[Work]:
    """What each model of the rewards does for an average prompt; a judge reads a response once for all principles."""
    rows = [row for item in items for row in item["rows"]]
    n_shown = mean_tokens([(row["prompt"], (row["response"],)) for row in rows])
    n_principles = len(context.constitution.principles) if context.constitution else 0
    n_rows = len(rows) / len(items)
    by_model = [Work(context.model(reward.model), read=n_rows * n_shown) for reward in config.rewards if reward.model]
    n_read = n_rows * (n_shown + n_principles * REQUEST_TOKENS)
    return by_model + [Work(context.model(reward.judge), read=n_read) for reward in config.rewards if reward.judge]


def report_left_out(
    context: Context, by_prompt: Mapping[str, list[Sample]], items: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, int], failed: Sequence[Failure],
) -> None:  # fmt: skip
    """Tells the user where many responses were not among those that the best was chosen from."""
    n_usable, n_scored = (sum(map(len, rows)) for rows in (by_prompt.values(), [item["rows"] for item in items]))
    n_responses_of_prompt = {item["id"]: len(item["rows"]) for item in items}  # a prompt that fails fails them all
    failures = [failure for failure in failed for _ in range(n_responses_of_prompt.get(failure.id, 1))]
    cut_off = context.cut_off_reason(left_out["cut_off"], {stage: context.rows(stage) for stage in context.inputs})
    others = [
        LeftOut(left_out["empty"], "empty"),
        LeftOut(n_usable - n_scored, "without a principle that applies", "let a principle apply to their tags"),
    ]
    context.report_left_out(
        n_usable + sum(left_out.values()), "responses", [cut_off, *others, *failure_reasons(failures)]
    )


def candidates(responses: Sequence[Sample]) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """The responses to each prompt that may be chosen, and counts of the others by reason: cut_off, empty."""
    by_prompt: dict[str, list[Sample]] = {}
    left_out: Counter[str] = Counter()
    for row in responses:
        if is_empty(row["response"]):
            left_out["empty"] += 1
        elif row["finish_reason"] == "length":
            left_out["cut_off"] += 1
        else:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    return by_prompt, {reason: left_out[reason] for reason in ("cut_off", "empty")}


def choose(
    items: Sequence[dict[str, Any]], rewards: Rewards, retries: int, on_answer: Callable[[float], None]
) -> list[Result]:
    """The best response to each prompt, and the failures: responses without a reward, prompts without any reward.

    `on_answer` is called as scores come in, with the share of a prompt's work that each of them is.
    """
    from cai.training.rl.rewards import Response

    rows = [row for item in items for row in item["rows"]]
    responses = [Response(_prompt(row), row["response"]) for row in rows]
    prompts_per_response = len(items) / len(rows)
    scores_in_order = iter(rewards.scores(responses, retries, lambda share: on_answer(share * prompts_per_response)))
    results = []
    for item in items:
        scored: list[tuple[float, dict[str, float], Sample]] = []
        failed: list[Failure] = []
        for row in item["rows"]:
            scores = next(scores_in_order)
            if isinstance(scores, Failure):
                failed.append(scores.at(f"prompt {row['prompt_id']}", row["id"]))
            else:
                scored.append((rewards.total(scores), scores, row))
        if not scored:
            failure = failed[0].at("no response has a reward; first", item["id"])
            results.append(Result(failures=[failure]))
            continue
        reward, scores, row = max(scored, key=lambda candidate: candidate[0])
        mean = fmean(total for total, _, _ in scored)
        best: ScoredSample = {**row, "reward": reward, "rewards": scores, "mean_reward": mean, "of": len(scored)}  # type: ignore[typeddict-item]
        results.append(Result(best, failed))
    return results


def measure(chosen: Sequence[ScoredSample]) -> dict[str, Any]:
    """Mean reward of the chosen responses and of all, and the bound on the KL, in nats a response."""
    return {
        "chosen": len(chosen),
        "mean_of": fmean(row["of"] for row in chosen),
        "best_reward": fmean(row["reward"] for row in chosen),
        "mean_reward": fmean(row["mean_reward"] for row in chosen),
        "kl_bound": fmean(kl_bound(row["of"]) for row in chosen),
    }


def kl_bound(n: int) -> float:
    """Upper bound on the KL of best-of-n from the policy that n responses are sampled from, in nats a response.

    n does not count responses that were left out before; leaving them out adds a divergence that this does not bound.
    """
    return math.log(n) - (n - 1) / n


def _prompt(row: Sample) -> Any:
    return {"id": row["prompt_id"], "messages": row["prompt"], "tags": row["tags"], "source": ""}
