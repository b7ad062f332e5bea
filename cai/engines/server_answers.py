"""What OpenAI-compatible servers answer, as checked models, and what an engine reads from it.

`read_options` takes the log-probabilities of options from a list of the likeliest next tokens, and bounds those that
are not on the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from cai.contracts.engine import Choice, Question
from cai.models.chat import THINK, THINK_END, TextAndReasoning
from cai.storage.rows import Failure

NEGLIGIBLE = 0.01
"""An option that holds at most this share of the likeliest one's probability may be replaced by that bound."""

OptionMatcher = Callable[[str], bool]
"""Whether a token in a list of log-probabilities is an option."""


class ListedModel(BaseModel):
    id: str


class ModelList(BaseModel):
    data: list[ListedModel] = Field(default_factory=list)


class _FiniteNumbers(BaseModel):
    """Refuses NaN (the model overflowed) and -Infinity (a truncated distribution), which Python reads in JSON."""

    model_config = ConfigDict(allow_inf_nan=False)


class TokenLogProb(_FiniteNumbers):
    token: str
    logprob: float


class Position(TokenLogProb):
    top_logprobs: list[TokenLogProb] = Field(default_factory=list)


class LogProbs(_FiniteNumbers):
    """A chat completion has `content`; a completion has the other three, position by position."""

    content: list[Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class ChatMessage(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Generated(BaseModel):
    """One of the choices of an answer."""

    text: str | None = None
    message: ChatMessage | None = None
    finish_reason: str | None = None
    logprobs: LogProbs | None = None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class CompletionAnswer(BaseModel):
    choices: list[Generated] = Field(min_length=1)
    usage: Usage | None = None


class NextTokens(NamedTuple):
    """The likeliest next tokens that a server listed, and the one it sampled."""

    log_probs: list[tuple[str, float]]
    sampled: str | None


def next_tokens(generated: Generated) -> NextTokens:
    """The list at the first position of an answer."""
    log_probs = generated.logprobs or LogProbs()
    if log_probs.content:
        position = log_probs.content[0]
        return NextTokens([(listed.token, listed.logprob) for listed in position.top_logprobs], position.token)
    top = (log_probs.top_logprobs or [None])[0] or {}
    return NextTokens(list(top.items()), log_probs.tokens[0] if log_probs.tokens else None)


def sampled_log_probs(generated: Generated) -> list[float]:
    """The log-probability of every sampled token that the server gives one for."""
    log_probs = generated.logprobs or LogProbs()
    if log_probs.content is not None:
        return [position.logprob for position in log_probs.content]
    return [value for value in log_probs.token_logprobs or [] if value is not None]


def read_text(generated: Generated, stop: Sequence[str]) -> TextAndReasoning:
    """The text of an answer and its reasoning, whether the server separates them or the text contains both."""
    message = generated.message or ChatMessage(content=generated.text)
    text = message.content or ""
    reasoning = message.reasoning or message.reasoning_content or ""
    if not reasoning and THINK_END in text:
        reasoning, _, text = text.partition(THINK_END)
    elif not reasoning and text.lstrip().startswith(THINK):
        reasoning, text = text, ""
    for stop_string in stop:
        text = text.partition(stop_string)[0]
    return TextAndReasoning(text.strip(), reasoning.strip().removeprefix(THINK).strip() or None)


def is_option(option: str, token: str) -> bool:
    """Whether a token spells the option, with or without a space before it, in either way that tokenizers write one."""
    return token.strip(" \n▁Ġ") == option


def read_options(question: Question, listed: NextTokens, matchers: Sequence[OptionMatcher]) -> Choice | Failure:
    """The options' log-probabilities from a list of the likeliest next tokens.

    An option that is not listed is no likelier than any listed token, and has no more probability than the list leaves
    over. Where that bound is at most `NEGLIGIBLE` of the likeliest option's probability, it is taken for the option's:
    the log-odds are then too close to even, never on the wrong side, and a label is off by at most that much. Leaving
    such questions out would leave out those that the judge is surest about. Where the list leaves more open, the
    question is a failure. `option_probability` counts listed options alone.
    """
    matches = [[value for token, value in listed.log_probs if matcher(token)] for matcher in matchers]
    log_probs = [_log_sum_exp(values) if values else None for values in matches]
    listed_options = [value for value in log_probs if value is not None]
    place = f"among the {len(listed.log_probs)} next tokens that the server lists"
    if not listed_options:
        options = ", ".join(map(repr, question.options))
        return Failure(question.id, f"none of the options {options} is {place}", "no_option")
    lowest = min((value for token, value in listed.log_probs if token != listed.sampled), default=0.0)
    left_over = max(1 - sum(math.exp(value) for _, value in listed.log_probs), 1e-7)  # float32's resolution at 1
    bound = min(lowest, math.log(left_over))
    if None in log_probs and bound > max(listed_options) + math.log(NEGLIGIBLE):
        option = question.options[log_probs.index(None)]
        return Failure(
            question.id, f"option {option!r} is not {place}, which leave it up to {math.exp(bound):.2g}", "no_option"
        )
    option_probability = sum(map(math.exp, listed_options))
    return Choice(question.id, tuple(bound if value is None else value for value in log_probs), option_probability)


def _log_sum_exp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
