"""The engine on this machine: transformers' own forward pass, with batches that fill a token budget.

Tokens that questions, or samples of one prompt, share are computed once (`cai.engines.local.scoring`,
`cai.engines.local.decoding`). A model that cannot do that computes each row whole (`cai.engines.local.plain_forward`),
and a warning says why. The KV cache holds about as many tokens as the profile's `token_budget`; where memory runs out,
the work goes on with half of them. A conversation that does not fit the model's context is a failure that names both
lengths: nothing is truncated. A model is loaded on first use, in bfloat16 where the hardware computes in it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

from cai.attention.token_budget import TokenBudget
from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm, unpartitioned
from cai.storage.rows import Failure
from cai.text.errors import BadInput, TooLong

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cai.contracts.profile import Profile
    from cai.engines.local.plain_forward import Padding
    from cai.engines.local.scoring import PromptAndOptions


class LocalEngine:
    """One model in this process. `lm` is the model itself where it is loaded already, as a policy in training is."""

    def __init__(self, model: Model, profile: Profile, lm: PreTrainedModel | None = None) -> None:
        self.model, self.profile = model, profile
        self._budget = TokenBudget(profile.token_budget, f"model {model.name!r}")
        self._loaded: PreTrainedModel | None = None
        self.on_tokens: Callable[[int], None] | None = None
        if lm is not None:
            self._use(lm)

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
                self._use(load_causal_lm(self.model, self.profile.dtype, self.profile.device))
        assert self._loaded is not None
        return self._loaded

    def _use(self, lm: PreTrainedModel) -> None:
        """Answers with this model from now on, with a token budget that fits into memory."""
        from cai.attention.rotary_rows import use_frequencies_of_each_row

        use_frequencies_of_each_row(lm)
        self._loaded = lm
        self.fit_budget()

    def fit_budget(self) -> None:
        """Lowers the token budget to what memory has room for now."""
        self._budget.n_tokens = min(self._budget.n_tokens, self._tokens_in_memory(self.lm))

    def _tokens_in_memory(self, lm: PreTrainedModel) -> int:
        """Tokens whose keys and values fit into the memory that is free; warns where the profile's budget is larger."""
        from cai.models.footprint import free_for_cache, kv_bytes_per_token, kv_tokens

        free = free_for_cache(lm, self.profile)
        n_tokens = kv_tokens(self.profile, kv_bytes_per_token(lm), free, lm.device.type == "cpu")
        if n_tokens < self._budget.n_tokens:
            too_many = f"the profile's {self._budget.n_tokens:,} tokens at once may be more than memory has room for"
            warnings.warn(f"model {self.model.name!r}: {too_many}; going on with {n_tokens:,}", stacklevel=2)
        return n_tokens

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, a batch at a time, in no particular order."""
        by_sampling: dict[Sampling, list[tuple[list[int], Request]]] = {}
        for request in requests:
            n_new = request.sampling.max_new_tokens
            try:
                prompt = self.chat.prompt_ids(request.messages)
                self._check_length(prompt, n_new, f"the prompt has {len(prompt)} tokens and {n_new} more are wanted")
            except BadInput as error:
                yield Failure.of_error(request.id, error)
                continue
            by_sampling.setdefault(request.sampling, []).append((prompt, request))
        for sampling, items in by_sampling.items():
            yield from self._complete(items, sampling)

    def _complete(self, items: Sequence[tuple[list[int], Request]], sampling: Sampling) -> Iterator[Completion]:
        from cai.engines.local import decoding, plain_forward
        from cai.engines.local.token_sampling import PromptAndSeed, TokenSampler

        chat = self.chat
        stop = (*chat.stop, *sampling.stop)
        banned_ids = [] if chat.pad_id in chat.end_ids else [chat.pad_id]
        ends_response = self._stop_check(stop) if stop else None
        sampler = TokenSampler(sampling, chat.end_ids, ends_response, banned_ids, self.on_tokens)
        decode = decoding.decode
        if not self._shares_prefixes:
            decode = functools.partial(plain_forward.decode, padding=self._padding)
        to_sample = [PromptAndSeed(prompt, request.seed) for prompt, request in items]
        for index, sampled in self._budget.run(to_sample, lambda part, budget: decode(self.lm, part, sampler, budget)):
            prompt, request = items[index]
            text = chat.text(sampled.token_ids, stop=stop)
            reason: Literal["stop", "length"] = "stop" if sampled.is_stopped else "length"
            ids, log_probs = sampled.token_ids, sampled.log_probs
            yield Completion(request.id, text.text, ids, log_probs, reason, prompt, text.reasoning)

    def _stop_check(self, stop: Sequence[str]) -> Callable[[list[int]], bool]:
        """Whether the latest token completes a stop string. A token is at least one byte, so a short tail is enough."""
        tail_length = max(len(text.encode()) for text in stop) + 4
        last_characters = {text[-1] for text in stop}

        @functools.cache
        def may_complete(token_id: int) -> bool:
            # A part of a character is decoded as U+FFFD; blanks at the edge of a token may be lost.
            text = self.chat.decode([token_id])
            return "\ufffd" in text or any(last.isspace() or last in text for last in last_characters)

        return lambda ids: may_complete(ids[-1]) and any(text in self.chat.decode(ids[-tail_length:]) for text in stop)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question, in no particular order."""
        from cai.engines.local import plain_forward, scoring

        to_score: list[PromptAndOptions] = []
        fitting: list[Question] = []
        for question in questions:
            try:
                prompt, options = self.chat.question(question.messages, question.options)
                self._check_length(prompt, 1, f"the question has {len(prompt)} tokens and its answer 1")
            except BadInput as error:
                yield Failure.of_error(question.id, error)
                continue
            to_score.append(scoring.PromptAndOptions(prompt, options))
            fitting.append(question)
        score = scoring.score
        if not self._shares_prefixes:
            score = functools.partial(plain_forward.score, padding=self._padding)
        for index, log_probs in self._budget.run(to_score, lambda part, budget: score(self.lm, part, budget)):
            yield Choice(fitting[index].id, tuple(log_probs), sum(map(math.exp, log_probs)))

    def _check_length(self, prompt: Sequence[int], n_new: int, lengths: str) -> None:
        """Raises BadInput for a prompt that is empty, or does not fit the model's context with `n_new` more tokens."""
        if not prompt:
            raise BadInput("the conversation has no tokens at all")
        if (limit := self.chat.context_length) is not None and len(prompt) + n_new > limit:
            raise TooLong(f"{lengths}, but {self.model.name!r} takes {limit} in all")

    @functools.cached_property
    def _shares_prefixes(self) -> bool:
        """Whether this model can compute once what questions and responses have in common."""
        from cai.attention.prefill import find_sharing_obstacle

        if obstacle := find_sharing_obstacle(self.lm):
            warnings.warn(f"model {self.model.name!r} computes each row whole: {obstacle}", stacklevel=2)
        return not obstacle

    @functools.cached_property
    def _padding(self) -> Padding:
        """How this model takes rows of different lengths where it computes each row whole."""
        from cai.engines.local.plain_forward import try_padding

        padding = try_padding(self.lm)
        if obstacle := padding.obstacle:
            warnings.warn(f"model {self.model.name!r} batches only prompts of equal length: {obstacle}", stacklevel=2)
        elif padding.longest_row < math.inf:
            warnings.warn(
                f"model {self.model.name!r} batches only prompts of equal length where prompt and response may have "
                f"more than {padding.longest_row} tokens: its attention takes in no more of them",
                stacklevel=2,
            )
        return padding
