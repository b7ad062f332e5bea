"""The engine on this machine: transformers' own forward pass, batches filled by a token budget.

What questions begin with alike, and what samples of one prompt share, is read once (`cai.engines.local.scoring`,
`cai.engines.local.decoding`); a model that cannot do that reads each row whole (`cai.engines.local.plain_forward`), and
a warning says why. About `token_budget` tokens of the profile are held at once; where memory runs out, the work goes on
with half of them. A conversation that does not fit the model's context is a failure that names both lengths: nothing is
cut. A model is loaded on first use, in bfloat16 where the hardware computes in it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self, TypeVar

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, unpartitioned
from cai.storage.rows import Failure
from cai.text.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.contracts.profile import Profile
    from cai.engines.local.scoring import Asked, Scores


Item = TypeVar("Item")
Result = TypeVar("Result")

_LEAST = 512
"""Tokens at once below which a machine is too small for the model."""


class LocalEngine:
    """One model in this process. `lm` is the model itself where it is loaded already, as a policy in training is."""

    def __init__(self, model: Model, profile: Profile, lm: PreTrainedModel | None = None) -> None:
        self.model = model
        self.profile = profile
        self._budget = profile.token_budget
        self._loaded: PreTrainedModel | None = None
        if lm is not None:
            self._take(lm)

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
            with unpartitioned():
                self._take(load_causal_lm(self.model, self.profile.dtype, self.profile.device))
        assert self._loaded is not None
        return self._loaded

    def _take(self, lm: PreTrainedModel) -> None:
        """Answers with this model from now on, and holds no more tokens at once than memory has room for."""
        self._loaded = lm
        self._budget = min(self._budget, self._room(lm))

    def _room(self, lm: PreTrainedModel) -> int:
        """Tokens whose keys and values fit into a quarter of a CPU's free memory, with a warning where that counts.

        A GPU says when its memory is full; an operating system promises more than there is and ends the process.
        """
        import psutil

        config = lm.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if lm.device.type != "cpu" or heads is None:
            return self._budget
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bytes_a_token = 2 * config.num_hidden_layers * heads * width * lm.dtype.itemsize
        room = max(_LEAST, psutil.virtual_memory().available // 4 // bytes_a_token)
        if room < self._budget:
            warnings.warn(
                f"model {self.model.name!r}: the profile's {self._budget:,} tokens at once may be more than memory has "
                f"room for; going on with {room:,}",
                stacklevel=2,
            )
        return int(room)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, a batch at a time, in no particular order."""
        waiting: dict[Sampling, list[tuple[list[int], Request]]] = {}
        for request in requests:
            room = request.sampling.max_new_tokens
            try:
                prompt = self.chat.prompt_ids(request.messages)
                self._check(prompt, room, f"the prompt has {len(prompt)} tokens and {room} more are wanted")
            except BadInput as error:
                yield Failure(request.id, str(error))
                continue
            waiting.setdefault(request.sampling, []).append((prompt, request))
        for sampling, items in waiting.items():
            yield from self._complete(items, sampling)

    def _complete(self, items: Sequence[tuple[list[int], Request]], sampling: Sampling) -> Iterator[Completion]:
        from cai.engines.local import decoding, plain_forward

        chat = self.chat
        stop = (*chat.stop, *sampling.stop)
        stopping = decoding.Stopping(chat.end_ids, self._stop_check(stop) if stop else None)
        banned = [] if chat.pad_id in chat.end_ids else [chat.pad_id]
        way = decoding.decode if self._shares else plain_forward.decode

        def drawn(wanted: Sequence[decoding.Wanted], budget: int) -> Iterator[tuple[int, decoding.Drawn]]:
            return way(self.lm, wanted, sampling, stopping, budget=budget, banned=banned)

        for number, row in self._all([decoding.Wanted(prompt, request.seed) for prompt, request in items], drawn):
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
        """Whether the latest token completes a stop string. A token is at least one byte, so a short tail is enough."""
        tail = max(len(text.encode()) for text in stop) + 4
        last = {text[-1] for text in stop}

        @functools.cache
        def may_complete(token: int) -> bool:
            said = self.chat.decode([token])  # a part of a character reads as U+FFFD; blanks at the edge may be lost
            return "\ufffd" in said or any(character.isspace() or character in said for character in last)

        return lambda ids: may_complete(ids[-1]) and any(text in self.chat.decode(ids[-tail:]) for text in stop)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question, in no particular order."""
        asked: list[Asked] = []
        fitting: list[Question] = []
        for question in questions:
            try:
                prompt, options = self.chat.question(question.messages, question.options)
                self._check(prompt, 1, f"the question has {len(prompt)} tokens and its answer 1")
            except BadInput as error:
                yield Failure(question.id, str(error))
                continue
            asked.append((prompt, options))
            fitting.append(question)
        for number, scores in self._scores(asked):
            yield Choice(fitting[number].id, tuple(scores), sum(map(math.exp, scores)))

    def _check(self, prompt: Sequence[int], room: int, said: str) -> None:
        """Raises BadInput for a prompt that is empty, or does not fit the model's context with `room` more tokens."""
        if not prompt:
            raise BadInput("the conversation has no tokens at all")
        if (limit := self.chat.context_length) is not None and len(prompt) + room > limit:
            raise BadInput(f"{said}, but {self.model.name!r} takes {limit} in all")

    def _scores(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Scores]]:
        """(index, log-probability of each option) of every question."""
        from cai.engines.local import plain_forward, scoring

        way = scoring.score if self._shares else plain_forward.score
        return self._all(asked, lambda some, budget: way(self.lm, some, budget))

    def _all(
        self, items: Sequence[Item], work: Callable[[Sequence[Item], int], Iterator[tuple[int, Result]]]
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) of every item. Where memory runs out, what is left starts again with half the budget."""
        from accelerate.utils.memory import clear_device_cache

        left = list(range(len(items)))
        while left:
            done: set[int] = set()
            try:
                for number, result in work([items[n] for n in left], self._budget):
                    done.add(left[number])
                    yield left[number], result
                assert len(done) == len(left), "some items got no answer"
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error) or self._budget < _LEAST:
                    raise
                self._budget //= 2
                warnings.warn(
                    f"model {self.model.name!r}: memory ran out; going on with {self._budget:,} tokens at once",
                    stacklevel=2,
                )
                clear_device_cache(garbage_collection=True)
            left = [n for n in left if n not in done]

    @functools.cached_property
    def _shares(self) -> bool:
        """Whether what questions and responses have in common can be read once with this model."""
        from cai.attention.shared_prefixes import can_share

        if reason := can_share(self.lm):
            warnings.warn(f"model {self.model.name!r} reads each row whole: {reason}", stacklevel=2)
        return not reason


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    # oneDNN, which multiplies on CPUs, says no more than this where it gets no memory.
    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "could not create a" in str(error)
