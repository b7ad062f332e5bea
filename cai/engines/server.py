"""The engine elsewhere: any OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted ones).

Where the model's tokenizer is on this machine and the server takes token ids, it is sent those that `cai.models.chat`
makes, the same as on engine `local`, so that text can never become a special token. Otherwise it is sent messages,
which it renders itself: special tokens and markers spelled in them are escaped first if the tokenizer is here; if it is
not, they cannot be, and a warning says so.

The server's capabilities are probed at first use, each with one small request. Options are read from the likeliest next
tokens, never from log-probabilities of the prompt, for which vLLM skips its prefix cache. vLLM also gives those of
chosen tokens (`logprob_token_ids`); elsewhere an option can be missing from the list, and then the list bounds it
(`cai.engines.server_answers.read_options`).

Left out: tools, images, streaming, servers that neither render messages nor take ids.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Server
from cai.engines import server_answers
from cai.engines.server_answers import CompletionAnswer, Generated, ModelList, OptionMatcher
from cai.engines.server_connection import Connection, RequestFailed
from cai.models.chat import Chat
from cai.storage.rows import Failure, Message
from cai.text.errors import BadInput, StageFailed, did_you_mean

LIST_LENGTHS = (20, 5, 1)
"""How many of the likeliest tokens a server is asked to list, the most first: vLLM's and OpenAI's limits."""
FULL_DISTRIBUTION = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Leaves the distribution as it is. vLLM would otherwise take these from the model's generation_config.json."""
FIRST_RETRIES = 2
"""Retries of the first request: where it gets no answer at all, the address is usually wrong."""
MIN_UNANSWERED = 8
"""Requests in a row without an answer that end a stage; more where more are sent at once."""
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]

Prompt = Mapping[str, Any]
"""`{"prompt": ids}` or `{"messages": conversation}`: a conversation as fields of a request's body."""


@dataclass(frozen=True)
class Capabilities:
    """What a server can do with a model: its endpoint, and which settings beyond OpenAI's it takes."""

    path: Literal["/completions", "/chat/completions"]
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    takes_extensions: bool = False
    returns_ids: bool = False
    """Whether it returns the ids that it sampled."""
    takes_option_ids: bool = False
    """Whether it accepts `logprob_token_ids`; it may ignore them."""
    list_length: int = 0
    """How many of the likeliest next tokens it gives log-probabilities of; 0 = none."""


class _QuestionFields(NamedTuple):
    """A question in a request's body, further settings, and for each option whether a listed token is it."""

    prompt: Prompt
    settings: dict[str, Any]
    matchers: Sequence[OptionMatcher]


class ServerEngine:
    """One model at a server. Nothing is sent before it is first used."""

    def __init__(self, model: Model, server: Server) -> None:
        self.model, self.server = model, server
        self.name = server.called(model.name)
        self._open_connection: Connection | None = None
        self._n_unanswered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open_connection is not None:
            self._open_connection.close()
            self._open_connection = None

    @functools.cached_property
    def chat(self) -> Chat | None:
        """The model's tokenisation; None for a model that is known by its name at the server alone."""
        return None if self.model.served else Chat.load(self.model)

    @property
    def _connection(self) -> Connection:
        if self._open_connection is None:
            self._open_connection = Connection(self.server)
        return self._open_connection

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """What the server can do, probed once. Raises BadInput where it does not have the model or gives no answer."""
        (capabilities,) = self._connection.run_all([self._probe_capabilities])
        if capabilities.path == "/completions":
            return capabilities
        if self.model.served:
            warning = (
                f"the tokenizer of model {self.model.name!r} is not here: control tokens that prompts or responses "
                f"spell reach it as they are written"
            )
        elif self.model.chat_template is not None:
            raise BadInput(
                f"{self._connection} takes no token ids and renders conversations itself, so that the recipe's "
                f"`chat_template:` cannot reach model {self.name!r}"
            )
        else:
            server = self._connection
            warning = f"{server} takes no token ids: it renders conversations for {self.name!r} in its own way"
        warnings.warn(warning, stacklevel=2)
        return capabilities

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, as they come in.

        Raises BadInput for what fails for every request: a refused key, a model that is not served, `top_k` for a
        server that does not take it. Raises StageFailed for a server that stops answering.
        """
        if not requests:
            return
        if not self.capabilities.takes_extensions and any(request.sampling.top_k for request in requests):
            server = self._connection
            raise BadInput(f"{server} takes no `top_k`, which OpenAI's interface does not have: leave it at 0")
        calls = []
        for request in requests:
            try:
                calls.append(functools.partial(self._complete, request, self._prompt_fields(request.messages)))
            except BadInput as error:
                yield Failure.of_error(request.id, error)
        yield from self._connection.run_all(calls)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question. Raises BadInput if the server gives none."""
        if not questions:
            return
        list_length = self.capabilities.list_length
        if not list_length:
            raise BadInput(
                f"{self._connection} gives no log-probabilities for model {self.name!r}, from which a judge's answers "
                f"are read; `verdicts: text` in a `judge` stage counts sampled answers instead"
            )
        calls = []
        for question in questions:
            try:
                prompt, settings, matchers = self._question_fields(question)
            except BadInput as error:
                yield Failure.of_error(question.id, error)
                continue
            body = self._body(self.capabilities, prompt, Sampling(1)) | _list_fields(list_length, prompt) | settings
            calls.append(functools.partial(self._answer, question, body, matchers))
        yield from self._connection.run_all(calls)

    async def _complete(self, request: Request, prompt: Prompt) -> Completion | Failure:
        stop = (*(self.chat.stop if self.chat else ()), *request.sampling.stop)
        body = self._body(self.capabilities, prompt, request.sampling, request.seed, stop)
        if self.capabilities.returns_ids:
            body |= _list_fields(0, prompt)
        try:
            answer = await self._post(body)
        except RequestFailed as error:
            return Failure(request.id, error.reason, error.kind)
        generated = answer.choices[0]
        if generated.finish_reason not in ("stop", "length"):
            ending = self._connection.clean(str(generated.finish_reason))
            return Failure(request.id, f"{self._connection} ended it: {ending}")
        ids, log_probs = generated.token_ids or [], server_answers.sampled_log_probs(generated)
        text = self.chat.text(ids, stop=stop) if self.chat and ids else server_answers.read_text(generated, stop)
        if len(log_probs) != len(ids):
            log_probs = []
        prompt_ids, n_tokens = list(prompt.get("prompt", [])), (answer.usage and answer.usage.completion_tokens) or 0
        reason: Literal["stop", "length"] = "stop" if generated.finish_reason == "stop" else "length"
        return Completion(request.id, text.text, ids, log_probs, reason, prompt_ids, text.reasoning, n_tokens)

    async def _answer(
        self, question: Question, body: Mapping[str, Any], matchers: Sequence[OptionMatcher]
    ) -> Choice | Failure:
        try:
            answer = await self._post(body)
        except RequestFailed as error:
            return Failure(question.id, error.reason, error.kind)
        return server_answers.read_options(question, server_answers.next_tokens(answer.choices[0]), matchers)

    def _prompt_fields(self, messages: Sequence[Message]) -> Prompt:
        """The conversation as the server takes it. Raises BadInput where the model's template refuses it."""
        if self.chat is None:
            return {"messages": list(messages)}
        if self.capabilities.path == "/completions":
            return {"prompt": self.chat.prompt_ids(messages)}
        return {"messages": self.chat.escape_messages(messages)}

    def _question_fields(self, question: Question) -> _QuestionFields:
        if self.chat and self.capabilities.path == "/completions":
            prompt, ids = self.chat.question(question.messages, question.options)
            settings = _option_id_fields(ids) if self.capabilities.takes_option_ids else {}
            return _QuestionFields({"prompt": prompt}, settings, [self._spellings(id).__contains__ for id in ids])
        can_think = self.capabilities.takes_extensions and (self.chat is None or self.chat.thinks)
        settings = {"chat_template_kwargs": {"enable_thinking": False}} if can_think else {}
        matchers = [functools.partial(server_answers.is_option, option) for option in question.options]
        return _QuestionFields(self._prompt_fields(question.messages), settings, matchers)

    def _body(
        self, capabilities: Capabilities, prompt: Prompt, sampling: Sampling, seed: int = 0, stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            capabilities.limit_field: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**31,  # the range that every server takes
            **prompt,
        }
        if stop:
            body["stop"] = list(stop)
        if capabilities.takes_extensions:
            body |= FULL_DISTRIBUTION | {"return_token_ids": True}
            if sampling.top_k:
                body["top_k"] = sampling.top_k
            if self.chat:
                body["stop_token_ids"] = sorted(self.chat.end_ids)
        return body

    async def _post(self, body: Mapping[str, Any]) -> CompletionAnswer:
        """Raises RequestFailed for this request alone, BadInput or StageFailed for all."""
        try:
            answer = await self._connection.request("post", self.capabilities.path, CompletionAnswer, body)
        except RequestFailed as error:
            if error.status == 404:
                raise BadInput(f"{error.reason}; it had model {self.name!r} before") from None
            self._n_unanswered = self._n_unanswered + 1 if error.status is None or error.status >= 500 else 0
            if self._n_unanswered >= max(MIN_UNANSWERED, self._connection.concurrency):
                raise StageFailed(
                    f"{self._connection} has not answered {self._n_unanswered} requests in a row (the last: "
                    f"{error.reason}); run the same command again when it is back: what is done is kept"
                ) from None
            raise
        self._n_unanswered = 0
        return answer

    def _spellings(self, token_id: int) -> set[str]:
        """How servers write a token in a list of log-probabilities."""
        assert self.chat is not None
        raw = self.chat.tokenizer.convert_ids_to_tokens(token_id)
        return {f"token_id:{token_id}", self.chat.decode([token_id]), str(raw)}

    async def _probe_capabilities(self) -> Capabilities:
        await self._find_model()
        messages: Prompt = {"messages": HELLO}
        if self.chat is not None:
            prompt = self.chat.prompt_ids(HELLO)
            capabilities = Capabilities("/completions")
            with contextlib.suppress(RequestFailed):
                answer = await self._probe(capabilities, {"prompt": prompt})
                n_counted = answer.usage and answer.usage.prompt_tokens
                if n_counted in (None, len(prompt)):  # else it did not take the ids for ids, or put one in front
                    return await self._probe_extensions(capabilities, {"prompt": prompt})
            messages = {"messages": self.chat.escape_messages(HELLO)}
        capabilities = Capabilities("/chat/completions")
        try:
            await self._probe(capabilities, messages)
        except RequestFailed as first_failure:
            capabilities = replace(capabilities, limit_field="max_completion_tokens")
            try:
                await self._probe(capabilities, messages)
            except RequestFailed as second_failure:
                reasons = dict.fromkeys([first_failure.reason, second_failure.reason])
                explanation = f"; with `{capabilities.limit_field}`: ".join(reasons)
                raise BadInput(f"model {self.model.name!r} cannot be asked: {explanation}") from None
        return await self._probe_extensions(capabilities, messages)

    async def _find_model(self) -> None:
        """Raises BadInput where the server does not list the model. Some servers have no list."""
        try:
            retries = min(FIRST_RETRIES, self.server.retries)
            models = await self._connection.request("get", "/models", ModelList, retries=retries)
        except RequestFailed as error:
            if error.status is None or error.status >= 500:
                raise BadInput(f"{error.reason}; is it running, and is `server.url` of the profile right?") from None
            return
        names = [self._connection.clean(model.id) for model in models.data]
        if names and self.name not in [model.id for model in models.data]:
            raise BadInput(
                f"{self._connection} has no model {self.name!r}, only {', '.join(names[:3])}"
                f"{' and others' if len(names) > 3 else ''}{did_you_mean(self.name, names)}; `server.names` of the "
                f"profile says what the server calls a model"
            )

    async def _probe_extensions(self, capabilities: Capabilities, prompt: Prompt) -> Capabilities:
        """The capabilities with what else the server takes and returns. Some accept settings and ignore them."""

        async def try_settings(candidate: Capabilities, settings: Mapping[str, object]) -> Generated | None:
            try:
                return (await self._probe(candidate, prompt, retries=1, **settings)).choices[0]
            except RequestFailed:
                return None

        if generated := await try_settings(replace(capabilities, takes_extensions=True), {}):
            capabilities = replace(capabilities, takes_extensions=True, returns_ids=bool(generated.token_ids))
        may_take_option_ids = capabilities.takes_extensions and "prompt" in prompt
        for list_length in LIST_LENGTHS:
            for by_id in (True, False) if may_take_option_ids else (False,):
                settings = _list_fields(list_length, prompt) | (_option_id_fields([0, 1]) if by_id else {})
                if generated := await try_settings(capabilities, settings):
                    length = list_length if server_answers.next_tokens(generated).log_probs else 0
                    return replace(capabilities, takes_option_ids=by_id, list_length=length)
        return capabilities

    async def _probe(
        self, capabilities: Capabilities, prompt: Prompt, retries: int | None = None, **settings: object
    ) -> CompletionAnswer:
        body = self._body(capabilities, prompt, Sampling(1)) | settings
        return await self._connection.request("post", capabilities.path, CompletionAnswer, body, retries)


def _list_fields(length: int, prompt: Prompt) -> dict[str, Any]:
    """Asks for the log-probabilities of the sampled token and of the `length` likeliest ones."""
    return {"logprobs": length} if "prompt" in prompt else {"logprobs": True, "top_logprobs": length}


def _option_id_fields(ids: Sequence[int]) -> dict[str, Any]:
    """Asks for the log-probabilities of these tokens, and for tokens to be named by their ids."""
    return {"logprob_token_ids": list(ids), "return_tokens_as_token_ids": True}
