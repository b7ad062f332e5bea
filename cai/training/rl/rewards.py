"""What responses are worth: the sources of `rewards:` in a recipe, each a number a response, and their weighted sum.

A *reward model* reads the ids of prompt and response as they were drawn, where its tokenizer and chat template are the
policy's: nothing is decoded and encoded again. A response that was cut off has no end token, and is read without one.
Where the two write conversations differently, where a stop string ended the response, and where the policy thinks
before it responds, the reward model reads the text, as its own chat template puts it.

A *judge* rates, which is direct RLAIF (Lee et al. 2023, arXiv 2309.00267, section 2.2.2): the expectation over the
scale's numbers as the next token, by each principle that applies to the prompt and has a weight; their weighted mean is
the score, between 1 and the scale's end. The paper maps that to [-1, 1], which changes advantages by a factor alone:
here `weight` is that factor. A rating by one principle that fails, fails the response: the mean over the others would
be on another scale, as principles differ in how strict they are. A prompt that no principle is for cannot be rated;
`reason_against` says so before anybody responds to it.

A *function* is the user's own Python. A number that is missing, infinite or not one is a failure with a reason, never a
score.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from cai.constitution import Principle
from cai.contracts.context import Context
from cai.contracts.engine import Engine
from cai.contracts.training_config import Reward
from cai.feedback.methods import Rated, Rating, rate
from cai.feedback.votes import MIN_OPTION_PROBABILITY
from cai.models.chat import Chat
from cai.models.reward_model import RewardModel
from cai.storage.rows import Failure, Prompt
from cai.text.errors import BadInput
from cai.training.rl.reward_functions import RewardFunction, call_function, load_function


@dataclass(frozen=True)
class Response:
    """One response to one prompt. `token_ids` are as drawn, the end token included where it `finished`.

    Both lists of ids are empty where only the text is known.
    """

    prompt: Prompt
    text: str
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: bool = True


class Source(Protocol):
    """One source of reward."""

    def scores(self, responses: Sequence[Response], retries: int) -> list[float | Failure]: ...

    def reason_against(self, prompt: Prompt) -> str | None: ...


class Rewards:
    """All sources of reward of one stage; `policy` is the chat whose ids responses hold, None where they hold none.

    A context manager: models are loaded on first use, and are let go of at its end.
    """

    def __init__(self, rewards: Sequence[Reward], context: Context, policy: Chat | None = None) -> None:
        self.names: tuple[str, ...] = tuple(each.called for each in rewards)
        self._weights = {each.called: each.weight for each in rewards}
        self._stack = contextlib.ExitStack()
        self._sources = {each.called: self._source(each, context, policy) for each in rewards}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._sources = {}

    def scores(self, responses: Sequence[Response], retries: int = 1) -> list[dict[str, float] | Failure]:
        """The score of each response by every source's name; a failure, by the prompt's id, where one source failed.

        A rating that failed is asked for `retries` times more."""
        by_source = {name: source.scores(responses, retries) for name, source in self._sources.items()}
        found: list[dict[str, float] | Failure] = []
        for number, response in enumerate(responses):
            scores: dict[str, float] = {}
            failed: Failure | None = None
            for name, given in by_source.items():
                score = given[number]
                if isinstance(score, Failure):
                    failed = failed or Failure(response.prompt["id"], f"{name}: {score.reason}")
                else:
                    scores[name] = score
            found.append(failed or scores)
        return found

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum of one response's scores."""
        return sum(self._weights[name] * score for name, score in scores.items())

    def reason_against(self, prompt: Prompt) -> str | None:
        """Why no response to this prompt can be scored, or None: such prompts are left out, and counted."""
        reasons = (source.reason_against(prompt) for source in self._sources.values())
        return next((reason for reason in reasons if reason), None)

    def _source(self, reward: Reward, context: Context, policy: Chat | None) -> Source:
        if reward.model is not None:
            return _Model(reward.model, context, policy)
        if reward.judge is not None:
            return _Judge(reward, context, self._stack)
        return _Function(reward.function or "", context)


class _Model:
    """A reward model."""

    def __init__(self, name: str, context: Context, policy: Chat | None) -> None:
        self.name = name
        self.context = context
        self.policy = policy

    @functools.cached_property
    def model(self) -> RewardModel:
        return RewardModel.load(self.context.model(self.name), self.context.profile)

    @functools.cached_property
    def reads_ids(self) -> bool:
        """Whether the policy's ids are what this model would read of the same text."""
        return self.policy is not None and not self.policy.thinks and self.policy.same_ids(self.model.chat)

    def reason_against(self, prompt: Prompt) -> str | None:
        return None

    def scores(self, responses: Sequence[Response], retries: int) -> list[float | Failure]:
        read = [self._ids(response) for response in responses]
        fitting = [ids for ids in read if not isinstance(ids, Failure)]
        scores = iter(self.model.scores(fitting))
        return [ids if isinstance(ids, Failure) else next(scores) for ids in read]

    def _ids(self, response: Response) -> list[int] | Failure:
        """What the model reads of the response, or why it cannot."""
        chat, id = self.model.chat, response.prompt["id"]
        drawn = response.token_ids
        if drawn and self.reads_ids and (not response.finished or drawn[-1] in chat.end_ids):
            # Whatever ended it, pad among them: reward models have learned to score at the end of a turn.
            ids = response.prompt_ids + ([*drawn[:-1], chat.end_of_turn] if response.finished else drawn)
        else:
            try:
                prompt, said = chat.example(response.prompt["messages"], response.text)
            except BadInput as error:
                return Failure(id, str(error))
            if not response.finished and chat.end_of_turn in said:
                said = said[: len(said) - 1 - said[::-1].index(chat.end_of_turn)]
            ids = prompt + said
        if chat.context_length is not None and len(ids) > chat.context_length:
            return Failure(id, f"prompt and response have {len(ids)} tokens, but {self.name!r} takes "
                               f"{chat.context_length}")  # fmt: skip
        return ids


class _Judge:
    """A judge that rates."""

    def __init__(self, reward: Reward, context: Context, stack: contextlib.ExitStack) -> None:
        assert context.constitution is not None, "the recipe was checked for one"
        named = None if reward.principles == "all" else set(reward.principles)
        self.principles = [
            each for each in context.constitution.principles if each.weight > 0 and (named is None or each.id in named)
        ]
        self.reward = reward
        self.context = context
        self.stack = stack

    @functools.cached_property
    def engine(self) -> Engine:
        return self.stack.enter_context(self.context.engine(self.reward.judge))

    def applicable(self, prompt: Prompt) -> list[Principle]:
        return [each for each in self.principles if each.applies(prompt["tags"])]

    def reason_against(self, prompt: Prompt) -> str | None:
        return None if self.applicable(prompt) else "no principle applies to the prompt"

    def scores(self, responses: Sequence[Response], retries: int) -> list[float | Failure]:
        cases = {
            f"{number}/{principle.id}": Rated(response.prompt["messages"], response.text, principle)
            for number, response in enumerate(responses)
            for principle in self.applicable(response.prompt)
        }
        templates = self.context.templates(self.reward.judge)
        ratings = rate(self.engine, templates, cases, self.reward.scale, MIN_OPTION_PROBABILITY, retries)
        return [self._mean(number, response, ratings) for number, response in enumerate(responses)]

    def _mean(self, number: int, response: Response, ratings: Mapping[str, Rating | Failure]) -> float | Failure:
        """Over the principles that apply, by their weights."""
        principles = self.applicable(response.prompt)
        if not principles:
            return Failure(response.prompt["id"], "no principle applies to the prompt")
        scores = []
        for principle in principles:
            rating = ratings[f"{number}/{principle.id}"]
            if isinstance(rating, Failure):
                return Failure(response.prompt["id"], f"{principle.id!r}: {rating.reason}")
            scores.append(rating.score)
        return float(np.average(scores, weights=[each.weight for each in principles]))


class _Function:
    """A function of the user's own."""

    def __init__(self, written: str, context: Context) -> None:
        self.written = written
        self.folder = context.home

    @functools.cached_property
    def function(self) -> RewardFunction:
        return load_function(self.written, self.folder)

    def reason_against(self, prompt: Prompt) -> str | None:
        return None

    def scores(self, responses: Sequence[Response], retries: int) -> list[float | Failure]:
        if not responses:
            return []
        prompts = [list(each.prompt["messages"]) for each in responses]
        given = call_function(self.function, self.written, self.folder, prompts, [each.text for each in responses])
        return [
            Failure(response.prompt["id"], score) if isinstance(score, str) else score
            for response, score in zip(responses, given, strict=True)
        ]
