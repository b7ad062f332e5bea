"""What an engine is asked and what it answers.

Requests carry messages rather than token ids, because a hosted server takes nothing else. Answers come in any order and
carry the id of their request; what cannot be answered is a `Failure`, never an exception and never a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

from cai.storage.rows import Failure, Message


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 keep the whole distribution."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A request for one response. Its tokens depend on `seed` alone, not on what shares its batch."""

    id: str
    messages: Sequence[Message]
    seed: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Completion:
    """A response. `token_ids` and `log_probs` (nats) are those of the sampled tokens, the end-of-turn token included;
    `text` holds neither that token nor the reasoning.

    A server that returns no ids leaves `token_ids`, `prompt_ids` and `log_probs` empty: the text is not encoded again.
    `counted` is then the number of tokens that the server reports.
    """

    id: str
    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]
    prompt_ids: list[int]
    reasoning: str | None = None
    counted: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens sampled."""
        return len(self.token_ids) or self.counted


@dataclass(frozen=True)
class Question:
    """Asks which of `options` comes next. Each option is a single token in this context."""

    id: str
    messages: Sequence[Message]
    options: tuple[str, ...] = ("A", "B")


@dataclass(frozen=True)
class Choice:
    """Log-probability (nats) of each option as the next token, and the probability of all options together."""

    id: str
    log_probs: tuple[float, ...]
    option_probability: float


class Engine(Protocol):
    """A context manager that loads its model on first use, so that a finished stage loads none."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]: ...

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]: ...


@runtime_checkable
class CountsTokens(Protocol):
    """An engine that tells of the tokens that it samples while their responses are still being written."""

    on_tokens: Callable[[int], None] | None
    """Called with the number of tokens of each decode step."""
