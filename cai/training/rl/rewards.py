"""What responses are worth: the sources of `rewards:` in a recipe, each a number a response, and their weighted sum.

A *reward model* scores the ids of prompt and response as they were sampled where its tokenizer and chat template are
the policy's: nothing is decoded and encoded again. A response that was cut off is scored without an end token. Where
the two models write conversations differently, where a stop string ended the response, and where the policy thinks
before it responds, the reward model scores the text in its own chat template.

A *judge* rates, which is direct RLAIF (Lee et al. 2023, arXiv 2309.00267, section 2.2.2): a rating is the expectation
over the scale's numbers as the next token, for each principle that applies to the prompt and has a weight; the score is
their weighted mean, between 1 and the end of the scale. The paper maps it to [-1, 1], which changes advantages by a
factor only; `weight` is that factor here. If the rating by one principle fails, the response fails: principles differ
in how strict they are, so the mean over the others would be on another scale. A prompt without an applicable principle
cannot be rated; `reason_unscorable` says so before the policy responds to it.

A *function* is the user's own Python. A value that is missing, infinite or no number is a failure with a reason, never
a score.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from cai.constitution import Principle, applicable_principles
from cai.contracts.context import Context
from cai.contracts.engine import Completion, Engine
from cai.contracts.training_config import ReinforcementConfig, Reward
from cai.feedback.methods import Rating, RatingRequest, rate_responses
from cai.feedback.votes import MIN_OPTION_PROBABILITY
from cai.models.chat import Chat
from cai.models.reward_model import RewardModel
from cai.storage.rows import Failure, Prompt, is_held_out
from cai.text.errors import BadInput
from cai.training.rl.reward_functions import RewardFunction, call_function, load_function


@dataclass(frozen=True)
class Response:
    """One response to one prompt. `token_ids` are as sampled, the end token included where it `finished`.

    Both lists of ids are empty where only the text is known.
    """

    prompt: Prompt
    text: str
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: bool = True

    @classmethod
    def of(cls, prompt: Prompt, completion: Completion) -> Self:
        """The response that a completion of this prompt is."""
        is_finished = completion.finish_reason == "stop"
        return cls(prompt, completion.text, completion.prompt_ids, completion.token_ids, is_finished)


class Rewards:
    """All sources of reward of one stage; `policy` is the chat of the responses' token ids, None where they have none.

    A context manager: models are loaded on first use and freed at its end.
    """

    def __init__(self, rewards: Sequence[Reward], context: Context, policy: Chat | None = None) -> None:
        self.names: tuple[str, ...] = tuple(reward.log_name for reward in rewards)
        self._weights = {reward.log_name: reward.weight for reward in rewards}
        self._stack = contextlib.ExitStack()
        self._sources = {reward.log_name: self._source(reward, context, policy) for reward in rewards}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._sources = {}

    def scores(
        self, responses: Sequence[Response], retries: int = 1, on_answer: Callable[[float], None] | None = None
    ) -> list[dict[str, float] | Failure]:
        """Each response's scores by source, or a failure with the prompt's id; failed ratings are retried.

        `on_answer` is called as scores and ratings come in, with the share of a response's work that each of them is.
        """

        def report(share: float) -> None:
            if on_answer:
                on_answer(share / len(self._sources))

        by_source = {name: source.scores(responses, retries, report) for name, source in self._sources.items()}
        results: list[dict[str, float] | Failure] = []
        for number, response in enumerate(responses):
            scores: dict[str, float] = {}
            failed: Failure | None = None
            for name, source_scores in by_source.items():
                score = source_scores[number]
                if isinstance(score, Failure):
                    failed = failed or replace(score, id=response.prompt["id"], reason=f"{name}: {score.reason}")
                else:
                    scores[name] = score
            results.append(failed or scores)
        return results

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum of one response's scores."""
        return sum(self._weights[name] * score for name, score in scores.items())

    def reason_unscorable(self, prompt: Prompt) -> str | None:
        """Why no response to this prompt can be scored, or None where responses can be."""
        reasons = (source.reason_unscorable(prompt) for source in self._sources.values())
        return next((reason for reason in reasons if reason), None)

    def _source(self, reward: Reward, context: Context, policy: Chat | None) -> _Source:
        if reward.model is not None:
            return _RewardModelSource(reward.model, context, policy)
        if reward.judge is not None:
            return _JudgeSource(reward, context, self._stack)
        return _FunctionSource(reward.function or "", context)


def select_usable_prompts(
    prompts: Sequence[Prompt], config: ReinforcementConfig, chat: Chat, rewards: Rewards
) -> tuple[list[Prompt], Counter[str]]:
    """The prompts, not held out, whose responses fit and can be scored, and how many were left out by reason."""
    kept: list[Prompt] = []
    left_out: Counter[str] = Counter()
    limit = chat.token_limit(config.max_length)
    for prompt in prompts:
        if is_held_out(prompt):
            left_out["held_out"] += 1
        elif rewards.reason_unscorable(prompt):
            left_out["without_reward"] += 1
        else:
            try:
                fits = len(chat.prompt_ids(prompt["messages"])) + config.max_new_tokens <= limit
            except BadInput:  # the model's template refuses the conversation
                left_out["refused_by_template"] += 1
                continue
            if fits:
                kept.append(prompt)
            else:
                left_out["too_long"] += 1
    return kept, left_out


class _RewardModelSource:
    def __init__(self, name: str, context: Context, policy: Chat | None) -> None:
        self.name, self.context, self.policy = name, context, policy

    @functools.cached_property
    def model(self) -> RewardModel:
        return RewardModel.load(self.context.model(self.name), self.context.profile)

    @functools.cached_property
    def shares_ids(self) -> bool:
        """Whether the policy's token ids are those that this model's own chat gives for the same text."""
        return self.policy is not None and not self.policy.thinks and self.policy.same_ids(self.model.chat)

    def reason_unscorable(self, prompt: Prompt) -> str | None:
        return None

    def scores(
        self, responses: Sequence[Response], retries: int, report: Callable[[float], None]
    ) -> list[float | Failure]:
        conversations = [self._ids(response) for response in responses]
        to_score = [ids for ids in conversations if not isinstance(ids, Failure)]
        scores = iter(self.model.scores(to_score, lambda: report(1.0)))
        return [ids if isinstance(ids, Failure) else next(scores) for ids in conversations]

    def _ids(self, response: Response) -> list[int] | Failure:
        """Token ids of prompt and response for this model, or why it cannot score them."""
        chat, prompt_id = self.model.chat, response.prompt["id"]
        sampled = response.token_ids
        if sampled and self.shares_ids and (not response.finished or sampled[-1] in chat.end_ids):
            # Any end token, pad included, becomes the end of turn: reward models have learned to score at that one.
            ids = response.prompt_ids + ([*sampled[:-1], chat.end_of_turn] if response.finished else sampled)
        else:
            try:
                prompt_ids, response_ids = chat.example(response.prompt["messages"], response.text)
            except BadInput as error:
                return Failure.of_error(prompt_id, error)
            if not response.finished and chat.end_of_turn in response_ids:
                response_ids = response_ids[: len(response_ids) - 1 - response_ids[::-1].index(chat.end_of_turn)]
            ids = prompt_ids + response_ids
        if chat.context_length is not None and len(ids) > chat.context_length:
            lengths = f"prompt and response have {len(ids)} tokens, but {self.name!r} takes {chat.context_length}"
            return Failure(prompt_id, lengths, "too_long")
        return ids


class _JudgeSource:
    def __init__(self, reward: Reward, context: Context, stack: contextlib.ExitStack) -> None:
        assert context.constitution is not None, "the recipe was checked for one"
        selected = context.constitution.select(reward.principles)
        self.principles = [principle for principle in selected if principle.weight > 0]
        self.reward, self.context, self.stack = reward, context, stack

    @functools.cached_property
    def engine(self) -> Engine:
        return self.stack.enter_context(self.context.engine(self.reward.judge))

    def applicable(self, prompt: Prompt) -> list[Principle]:
        return applicable_principles(self.principles, prompt["tags"])

    def reason_unscorable(self, prompt: Prompt) -> str | None:
        return None if self.applicable(prompt) else "no principle applies to the prompt"

    def scores(
        self, responses: Sequence[Response], retries: int, report: Callable[[float], None]
    ) -> list[float | Failure]:
        cases = {
            f"{number}/{principle.id}": RatingRequest(response.prompt["messages"], response.text, principle)
            for number, response in enumerate(responses)
            for principle in self.applicable(response.prompt)
        }
        templates = self.context.templates(self.reward.judge)
        n_principles = [len(self.applicable(response.prompt)) for response in responses]
        ratings = rate_responses(
            self.engine,
            templates,
            cases,
            self.reward.scale,
            MIN_OPTION_PROBABILITY,
            retries,
            lambda choice: report(1 / n_principles[int(choice.id.partition("/")[0])]),
        )
        return [self._mean(number, response, ratings) for number, response in enumerate(responses)]

    def _mean(self, number: int, response: Response, ratings: Mapping[str, Rating | Failure]) -> float | Failure:
        """Weighted mean of the ratings by the principles that apply."""
        principles = self.applicable(response.prompt)
        if not principles:
            return Failure(response.prompt["id"], "no principle applies to the prompt")
        scores = []
        for principle in principles:
            rating = ratings[f"{number}/{principle.id}"]
            if isinstance(rating, Failure):
                return replace(rating, id=response.prompt["id"], reason=f"{principle.id!r}: {rating.reason}")
            scores.append(rating.score)
        return float(np.average(scores, weights=[principle.weight for principle in principles]))


class _FunctionSource:
    def __init__(self, written: str, context: Context) -> None:
        self.written, self.folder = written, context.home

    @functools.cached_property
    def function(self) -> RewardFunction:
        return load_function(self.written, self.folder)

    def reason_unscorable(self, prompt: Prompt) -> str | None:
        return None

    def scores(
        self, responses: Sequence[Response], retries: int, report: Callable[[float], None]
    ) -> list[float | Failure]:
        if not responses:
            return []
        prompts = [list(response.prompt["messages"]) for response in responses]
        texts = [response.text for response in responses]
        scores = call_function(self.function, self.written, self.folder, prompts, texts)
        report(float(len(responses)))
        return [
            Failure(response.prompt["id"], score) if isinstance(score, str) else score
            for response, score in zip(responses, scores, strict=True)
        ]


_Source = _RewardModelSource | _JudgeSource | _FunctionSource
