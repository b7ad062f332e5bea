"""The engine elsewhere: any OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, hosted ones).

Where the model's tokenizer is here and the server takes token ids, it is sent those that `cai.models.chat` makes, the
same as on engine `local`, so that text can never become a control token. Elsewhere it is sent messages, which it
renders itself: control tokens and markers spelled in them are parted first where the tokenizer is here; where it is
not, that cannot be done, and a warning says so.

What a server can do is tried at first use: each ability with one small request. Options are read from the most likely
next tokens, never from log-probabilities of the prompt, for which vLLM skips its prefix cache. vLLM also tells those of
the very tokens that are asked about (`logprob_token_ids`); elsewhere an option can be missing from the list, and then
the list bounds it (`read_options`).

Left out: tools, images, streaming, servers that render nothing and take no ids.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Server
from cai.engines.server_connection import Connection, Refused
from cai.models.chat import THINK, THINK_END, Chat, TextAndReasoning
from cai.storage.rows import Failure, Message
from cai.text.errors import BadInput, StageFailed, nearest

TOPS = (20, 5, 1)
"""How many of the likeliest tokens servers are asked for, the most first: vLLM's and OpenAI's limits."""
NEGLIGIBLE = 0.01
"""An option that holds at most this share of the likeliest one's probability may be replaced by that bound."""
WHOLE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Leaves the distribution whole. Unsaid, vLLM takes these from the model's generation_config.json."""
FIRST_RETRIES = 2
"""Times that a server which does not answer at all is tried at first: most often its address is wrong."""
FEWEST_UNANSWERED = 8
"""Requests in a row without an answer, and as many as are under way at once, that end a stage."""
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]

Prompt = Mapping[str, Any]
"""`{"prompt": ids}` or `{"messages": conversation}`: a conversation in a request's body."""
Spells = Callable[[str], bool]
"""Whether a token in a list of log-probabilities is an option."""


class _Listed(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Listed] = Field(default_factory=list)


class _Finite(BaseModel):
    """Python reads NaN and Infinity in JSON, which has neither. NaN comes of a model whose numbers broke; -Infinity, of
    a distribution that was cut and is not the one asked for: vLLM and OpenAI give an impossible token -9999."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Token(_Finite):
    token: str
    logprob: float


class _Position(_Token):
    top_logprobs: list[_Token] = Field(default_factory=list)


class _LogProbs(_Finite):
    """Of a chat completion: `content`. Of a completion: the other three, position by position."""

    content: list[_Position] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Said(BaseModel):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[int] | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(BaseModel):
    choices: list[_Said] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class Abilities:
    """What a server can do with a model: where it is asked, and which settings beyond OpenAI's it takes."""

    path: Literal["/completions", "/chat/completions"]
    limit: Literal["max_tokens", "max_completion_tokens"]
    extras: bool = False
    ids: bool = False
    """Whether it tells the ids that it drew."""
    by_id: bool = False
    """Whether it takes the ids of tokens whose log-probabilities are wanted, whatever comes of it."""
    top: int = 0
    """How many of the likeliest next tokens it tells the log-probabilities of; 0 = none."""


class NextTokens(NamedTuple):
    """The likeliest next tokens that a server listed, and the one it drew."""

    log_probs: list[tuple[str, float]]
    drawn: str | None


class ServerEngine:
    """One model at a server. Nothing is sent before it is first used."""

    def __init__(self, model: Model, server: Server) -> None:
        self.model = model
        self.server = server
        self.name = server.called(model.name)
        self._opened: Connection | None = None
        self._unanswered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @functools.cached_property
    def chat(self) -> Chat | None:
        """The model's tokenisation; None for a model that is known by its name at the server alone."""
        return None if self.model.served else Chat.load(self.model)

    @property
    def _connection(self) -> Connection:
        if self._opened is None:
            self._opened = Connection(self.server)
        return self._opened

    @functools.cached_property
    def abilities(self) -> Abilities:
        """What the server can do, tried once. Raises BadInput where it does not have the model or cannot be asked."""
        (found,) = self._connection.each([self._try])
        if found.path == "/completions":
            return found
        if self.model.served:
            said = (
                f"the tokenizer of model {self.model.name!r} is not here: control tokens that prompts or responses "
                f"spell reach it as they are written"
            )
        elif self.model.chat_template is not None:
            raise BadInput(
                f"{self._connection} takes no token ids and renders conversations itself, so that the recipe's "
                f"`chat_template:` cannot reach model {self.name!r}"
            )
        else:
            said = f"{self._connection} takes no token ids: it renders conversations for {self.name!r} in its own way"
        warnings.warn(said, stacklevel=2)
        return found

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion | Failure]:
        """A completion or a failure for each request, as they come in.

        Raises BadInput for what no request can survive: a refused key, a model that is not served, `top_k` for a server
        that does not know it; StageFailed for a server that has gone.
        """
        if not requests:
            return
        able, asks = self.abilities, []
        if not able.extras and any(request.sampling.top_k for request in requests):
            raise BadInput(
                f"{self._connection} takes no `top_k`, which OpenAI's interface does not have: leave it at 0"
            )
        for request in requests:
            try:
                asks.append(functools.partial(self._generate, able, request, self._prompt(able, request.messages)))
            except BadInput as error:
                yield Failure(request.id, str(error))
        yield from self._connection.each(asks)

    def choose(self, questions: Sequence[Question]) -> Iterator[Choice | Failure]:
        """The options' log-probabilities, or a failure, for each question, as they come in.

        Raises like `generate`, and BadInput where the server gives no log-probabilities.
        """
        if not questions:
            return
        able, asks = self.abilities, []
        if not able.top:
            raise BadInput(
                f"{self._connection} gives no log-probabilities for model {self.name!r}, from which a judge's answers "
                f"are read; `verdicts: text` in a `judge` stage counts drawn answers instead"
            )
        for question in questions:
            try:
                prompt, more, spells = self._question(able, question)
            except BadInput as error:
                yield Failure(question.id, str(error))
                continue
            body = self._body(able, prompt, Sampling(1)) | _listing(able.top, prompt) | more
            asks.append(functools.partial(self._choose, able, question, body, spells))
        yield from self._connection.each(asks)

    async def _generate(self, able: Abilities, request: Request, prompt: Prompt) -> Completion | Failure:
        stop = (*(self.chat.stop if self.chat else ()), *request.sampling.stop)
        body = self._body(able, prompt, request.sampling, request.seed, stop)
        if able.ids:
            body |= _listing(0, prompt)
        try:
            answer = await self._asked(able, body)
        except Refused as error:
            return Failure(request.id, error.reason)
        said = answer.choices[0]
        if said.finish_reason not in ("stop", "length"):
            return Failure(
                request.id, f"{self._connection} ended it: {self._connection.clean(str(said.finish_reason))}"
            )
        ids, log_probs = said.token_ids or [], _drawn_log_probs(said)
        text = self.chat.text(ids, stop=stop) if self.chat and ids else _text(said, stop)
        return Completion(
            request.id,
            text.text,
            ids,
            log_probs if len(log_probs) == len(ids) else [],
            "stop" if said.finish_reason == "stop" else "length",
            list(prompt.get("prompt", [])),
            text.reasoning,
            (answer.usage and answer.usage.completion_tokens) or 0,
        )

    async def _choose(
        self, able: Abilities, question: Question, body: Mapping[str, Any], spells: Sequence[Spells]
    ) -> Choice | Failure:
        try:
            answer = await self._asked(able, body)
        except Refused as error:
            return Failure(question.id, error.reason)
        return read_options(question, _next_tokens(answer.choices[0]), spells)

    def _prompt(self, able: Abilities, messages: Sequence[Message]) -> Prompt:
        """The conversation as the server takes it. Raises BadInput where the model's template refuses it."""
        if self.chat is None:
            return {"messages": list(messages)}
        if able.path == "/completions":
            return {"prompt": self.chat.prompt_ids(messages)}
        return {"messages": self.chat.disarmed(messages)}

    def _question(self, able: Abilities, question: Question) -> tuple[Prompt, dict[str, Any], Sequence[Spells]]:
        """(the conversation, more settings, for each option whether a listed token is it). Raises as `_prompt`."""
        if self.chat and able.path == "/completions":
            prompt, ids = self.chat.question(question.messages, question.options)
            return (
                {"prompt": prompt},
                _of_ids(ids) if able.by_id else {},
                [self._spellings(number).__contains__ for number in ids],
            )
        thinks = able.extras and (self.chat is None or self.chat.thinks)
        at_once = {"chat_template_kwargs": {"enable_thinking": False}} if thinks else {}
        spells = [functools.partial(_is_option, option) for option in question.options]
        return self._prompt(able, question.messages), at_once, spells

    def _body(
        self, able: Abilities, prompt: Prompt, sampling: Sampling, seed: int = 0, stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            able.limit: sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**31,  # what every server takes
            **prompt,
        }
        if stop:
            body["stop"] = list(stop)
        if able.extras:
            body |= WHOLE | {"return_token_ids": True}
            if sampling.top_k:
                body["top_k"] = sampling.top_k
            if self.chat:
                body["stop_token_ids"] = sorted(self.chat.end_ids)
        return body

    async def _asked(self, able: Abilities, body: Mapping[str, Any]) -> _Answer:
        """Raises Refused for this one alone, BadInput or StageFailed for all."""
        try:
            answer = await self._connection.ask("post", able.path, _Answer, body)
        except Refused as error:
            if error.status == 404:
                raise BadInput(f"{error.reason}; it had model {self.name!r} before") from None
            self._unanswered = self._unanswered + 1 if error.status is None or error.status >= 500 else 0
            if self._unanswered >= max(FEWEST_UNANSWERED, self._connection.concurrency):
                raise StageFailed(
                    f"{self._connection} has not answered {self._unanswered} requests in a row (the last: "
                    f"{error.reason}); run the same command again when it is back: what is done is kept"
                ) from None
            raise
        self._unanswered = 0
        return answer

    def _spellings(self, number: int) -> set[str]:
        """How servers write a token in a list of log-probabilities."""
        assert self.chat is not None
        raw = self.chat.tokenizer.convert_ids_to_tokens(number)
        return {f"token_id:{number}", self.chat.decode([number]), str(raw)}

    async def _try(self) -> Abilities:
        await self._find_model()
        messages: Prompt = {"messages": HELLO}
        if self.chat is not None:
            prompt = self.chat.prompt_ids(HELLO)
            able = Abilities("/completions", "max_tokens")
            with contextlib.suppress(Refused):
                answer = await self._tried(able, {"prompt": prompt})
                counted = answer.usage and answer.usage.prompt_tokens
                if counted in (None, len(prompt)):  # else it took the ids for something else, or put one in front
                    return await self._tried_further(able, {"prompt": prompt})
            messages = {"messages": self.chat.disarmed(HELLO)}
        able = Abilities("/chat/completions", "max_tokens")
        try:
            await self._tried(able, messages)
        except Refused as refused:
            able = replace(able, limit="max_completion_tokens")
            try:
                await self._tried(able, messages)
            except Refused as again:
                reasons = f"; with `{able.limit}`: ".join(dict.fromkeys([refused.reason, again.reason]))
                raise BadInput(f"model {self.model.name!r} cannot be asked: {reasons}") from None
        return await self._tried_further(able, messages)

    async def _find_model(self) -> None:
        """Raises BadInput where the server does not list the model. Some servers have no list."""
        try:
            retries = min(FIRST_RETRIES, self.server.retries)
            listed = await self._connection.ask("get", "/models", _Models, retries=retries)
        except Refused as error:
            if error.status is None or error.status >= 500:
                raise BadInput(f"{error.reason}; is it running, and is `server.url` of the profile right?") from None
            return
        names = [self._connection.clean(model.id) for model in listed.data]
        if names and self.name not in [model.id for model in listed.data]:
            raise BadInput(
                f"{self._connection} has no model {self.name!r}, only {', '.join(names[:3])}"
                f"{' and others' if len(names) > 3 else ''}{nearest(self.name, names)}; `server.names` of the profile "
                f"says what the server calls a model"
            )

    async def _tried_further(self, able: Abilities, prompt: Prompt) -> Abilities:
        """The abilities with what else the server takes and gives. Some take settings and ignore them."""

        async def tried(able: Abilities, more: Mapping[str, object]) -> _Said | None:
            try:
                return (await self._tried(able, prompt, more, retries=1)).choices[0]
            except Refused:
                return None

        if said := await tried(replace(able, extras=True), {}):
            able = replace(able, extras=True, ids=bool(said.token_ids))
        for top in TOPS:
            for by_id in (True, False) if able.extras and "prompt" in prompt else (False,):
                if said := await tried(able, _listing(top, prompt) | (_of_ids([0, 1]) if by_id else {})):
                    return replace(able, by_id=by_id, top=top if _next_tokens(said).log_probs else 0)
        return able

    async def _tried(
        self, able: Abilities, prompt: Prompt, more: Mapping[str, object] | None = None, retries: int | None = None
    ) -> _Answer:
        body = self._body(able, prompt, Sampling(1)) | dict(more or {})
        return await self._connection.ask("post", able.path, _Answer, body, retries)


def read_options(question: Question, found: NextTokens, spells: Sequence[Callable[[str], bool]]) -> Choice | Failure:
    """The options' log-probabilities from a list of the likeliest next tokens.

    An option that is not listed is no likelier than what is, and has no more than the list leaves over. Where that
    bound is at most `NEGLIGIBLE` of the likeliest option's probability it stands for the option's: the log-odds are
    then too close to even, never on the wrong side, and a label is off by at most that much. To leave such questions
    out would be to leave out those that the judge is surest about. `option_probability` counts
    listed options alone. Where the list
    leaves more open, the question is a failure.
    """
    listed = [[value for token, value in found.log_probs if is_option(token)] for is_option in spells]
    log_probs = [_log_sum(values) if values else None for values in listed]
    known = [value for value in log_probs if value is not None]
    likeliest = f"among the {len(found.log_probs)} next tokens that the server lists"
    if not known:
        options = ", ".join(map(repr, question.options))
        return Failure(question.id, f"none of the options {options} is {likeliest}")
    least = min((value for token, value in found.log_probs if token != found.drawn), default=0.0)
    left = max(1 - sum(math.exp(value) for _, value in found.log_probs), 1e-7)  # what float32 tells from nothing
    bound = min(least, math.log(left))
    if None in log_probs and bound > max(known) + math.log(NEGLIGIBLE):
        option = question.options[log_probs.index(None)]
        return Failure(question.id, f"option {option!r} is not {likeliest}, which leave it up to {math.exp(bound):.2g}")
    option_probability = sum(map(math.exp, known))
    return Choice(question.id, tuple(bound if value is None else value for value in log_probs), option_probability)


def _listing(top: int, prompt: Prompt) -> dict[str, Any]:
    """Asks for the log-probabilities of what is drawn and of the `top` likeliest tokens."""
    return {"logprobs": top} if "prompt" in prompt else {"logprobs": True, "top_logprobs": top}


def _of_ids(ids: Sequence[int]) -> dict[str, Any]:
    """Asks for the log-probabilities of these tokens, and that tokens are named by their ids."""
    return {"logprob_token_ids": list(ids), "return_tokens_as_token_ids": True}


def _log_sum(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))


def _is_option(option: str, token: str) -> bool:
    """Whether a token spells the option, with or without a space before it, in either way that tokenizers write one."""
    return token.strip(" \n▁Ġ") == option


def _next_tokens(said: _Said) -> NextTokens:
    """What stands at the first position of an answer."""
    given = said.logprobs or _LogProbs()
    if given.content:
        first = given.content[0]
        return NextTokens([(each.token, each.logprob) for each in first.top_logprobs], first.token)
    top = (given.top_logprobs or [None])[0] or {}
    return NextTokens(list(top.items()), given.tokens[0] if given.tokens else None)


def _drawn_log_probs(said: _Said) -> list[float]:
    """The log-probability of every drawn token, where the server tells all of them."""
    given = said.logprobs or _LogProbs()
    if given.content is not None:
        return [each.logprob for each in given.content]
    values = given.token_logprobs or []
    return [value for value in values if value is not None]


def _text(said: _Said, stop: Sequence[str]) -> TextAndReasoning:
    """The text that a server made of what it drew, reasoning apart, whether the server or the text parts it."""
    message = said.message or _Message(content=said.text)
    text = message.content or ""
    thought = message.reasoning or message.reasoning_content or ""
    if not thought and THINK_END in text:
        thought, _, text = text.partition(THINK_END)
    elif not thought and text.lstrip().startswith(THINK):
        thought, text = text, ""
    for end in stop:
        text = text.partition(end)[0]
    return TextAndReasoning(text.strip(), thought.strip().removeprefix(THINK).strip() or None)
