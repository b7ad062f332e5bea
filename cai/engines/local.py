"""The engine on this machine: transformers' own forward pass, batches filled by a token budget.

Requests are sorted by length and batched so that rows times length, padding and new tokens included, stay within the
profile's `token_budget`; a single longer request runs alone. What questions share is computed once. A conversation that
does not fit the model's context is a failure that names both lengths: nothing is cut. A model is loaded on first use,
in bfloat16 where the hardware computes in it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from cai.chat import Chat
from cai.checkpoint import Model, load_causal_lm
from cai.engines import Choice, Completion, Failure, Question, Request, Sampling
from cai.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.engines.scoring import Asked, Scores
    from cai.profile import Profile


class LocalEngine:
    """One model in this process."""

    def __init__(self, model: Model, profile: Profile) -> None:
        self.model = model
        self.profile = profile
        self._loaded: PreTrainedModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loaded = None

    @functools.cached_property
    def chat(self) -> Chat:
        """The model's tokenisation. Raises BadInput where the model has no chat template."""
        return Chat.load(self.model)

    @property
    def lm(self) -> PreTrainedModel:
        """The model, loaded on first use."""
        if self._loaded is None:
            self._loaded = load_causal_lm(self.model, self.profile.dtype, self.profile.device)
        return self._loaded

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, a batch at a time, in no particular order."""
        waiting: dict[Sampling, list[tuple[list[int], Request]]] = {}
        for request in requests:
            room = request.sampling.max_new_tokens
            try:
                prompt = self.chat.prompt_ids(request.messages)
            except BadInput as error:
                yield Failure(request.id, str(error))
                continue
            if (limit := self.chat.context_length) is not None and len(prompt) + room > limit:
                yield Failure(
                    request.id,
                    f"the prompt has {len(prompt)} tokens and {room} more are wanted, but {self.model.name!r} takes "
                    f"{limit} in all",
                )
                continue
            waiting.setdefault(request.sampling, []).append((prompt, request))
        for sampling, items in waiting.items():
            yield from self._complete(items, sampling)

    def _complete(self, items: Sequence[tuple[list[int], Request]], sampling: Sampling) -> Iterator[Completion]:
        from cai.engines import decoding, plain

        chat = self.chat
        stop = (*chat.stop, *sampling.stop)
        drawn = (decoding if self._shares else plain).decode(
            self.lm,
            [decoding.Wanted(n, prompt, request.seed) for n, (prompt, request) in enumerate(items)],
            sampling,
            decoding.Stopping(chat.end_ids, self._stop_check(stop) if stop else None),
            budget=self.profile.token_budget,
            pad_id=chat.pad_id,
            banned=[] if chat.pad_id in chat.end_ids else [chat.pad_id],
        )
        for number, row in drawn:
            prompt, request = items[number]
            said = chat.text(row.token_ids, stop=stop)
            yield Completion(
                request.id,
                said.text,
                row.token_ids,
                row.log_probs,
                "stop" if row.ended else "length",
                prompt,
                said.reasoning,
            )

    def _stop_check(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether the latest tokens complete a stop string. A token is at least one byte, so a short tail is enough."""
        tail = max(len(text.encode()) for text in stop) + 4
        return lambda ids: any(text in self.chat.decode(ids[-tail:]) for text in stop)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question, in no particular order."""
        asked: list[Asked] = []
        fitting: list[Question] = []
        for question in questions:
            try:
                prompt, options = self.chat.question(question.messages, question.options)
            except BadInput as error:
                yield Failure(question.id, str(error))
                continue
            if (limit := self.chat.context_length) is not None and len(prompt) + 1 > limit:
                yield Failure(
                    question.id,
                    f"the question has {len(prompt)} tokens and its answer 1, but {self.model.name!r} takes {limit} "
                    f"in all",
                )
                continue
            asked.append((prompt, options))
            fitting.append(question)
        for number, scores in self._scores(asked):
            yield Choice(fitting[number].id, tuple(scores), sum(map(math.exp, scores)))

    def _scores(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Scores]]:
        """(index, log-probability of each option) of every question, a batch at a time."""
        from cai.engines import plain, scoring

        return (scoring if self._shares else plain).score(self.lm, asked, self.profile.token_budget, self.chat.pad_id)

    @functools.cached_property
    def _shares(self) -> bool:
        """Whether what questions and responses have in common can be read once with this model."""
        from cai.engines.prefixes import can_share

        if reason := can_share(self.lm):
            warnings.warn(f"model {self.model.name!r} reads each row whole: {reason}", stacklevel=2)
        return not reason
