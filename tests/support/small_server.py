"""A small OpenAI-compatible server for tests: it answers from a real tiny model and fails on demand.

It computes one whole forward pass for each token, so that it shares no code with the engine that it tests. `Behaviour`
says which kind of server it plays and what goes wrong. Requests are kept for tests to look at.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch

from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm

EXTENSIONS = {
    "top_k", "min_p", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids", "logprob_token_ids",
    "stop_token_ids", "chat_template_kwargs",
}  # fmt: skip


@dataclass
class Behaviour:
    """What the server takes and returns: what vLLM does, unless a test says otherwise."""

    names: tuple[str, ...] = ("tiny",)
    takes_ids: bool = True
    takes_extensions: bool = True
    """Whether it takes settings that OpenAI's interface does not have. Hosted servers refuse them."""
    takes_option_ids: bool = True
    """Whether it knows `logprob_token_ids`. Earlier versions of vLLM ignore it."""
    list_length: int = 20
    """How many of the likeliest next tokens it lists at most."""
    limit_field: str = "max_tokens"
    """What it calls the token limit of an answer. OpenAI's newer models refuse the older name."""
    key: str | None = None
    fault: Fault = lambda number, server, handler: False
    """Called with the number of each POST that is not a probe of the server's capabilities. Returns True if it has
    answered the request itself."""


@dataclass
class Server:
    """What a test sees: the address, the behaviour, which it may change at any time, and the requests so far."""

    url: str
    behaviour: Behaviour
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(path, body) of each POST."""
    max_concurrent: int = 0
    n_concurrent: int = 0
    n_requests: int = 0
    """POST requests without probes."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sampled(NamedTuple):
    """A response. `distributions` are the log-probabilities of all tokens at each sampled one."""

    ids: list[int]
    distributions: list[torch.Tensor]
    text: str
    finish_reason: str


class ServedModel:
    """The model behind the server."""

    def __init__(self, model: Model) -> None:
        self.chat = Chat.load(model)
        self.lm = load_causal_lm(model, "float32", "cpu")
        self.lock = threading.Lock()

    @torch.inference_mode()
    def next_log_probs(self, ids: list[int]) -> torch.Tensor:
        """(vocabulary,)"""
        with self.lock:
            return self.lm(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)

    def sample(self, ids: list[int], body: Mapping[str, Any], limit: int) -> Sampled:
        end_ids = {self.chat.end_of_turn, *body.get("stop_token_ids", [])}
        generator = torch.Generator().manual_seed(body["seed"])
        sampled: list[int] = []
        distributions: list[torch.Tensor] = []
        while len(sampled) < limit:
            log_probs = self.next_log_probs(ids + sampled)
            scores = log_probs.clone()
            scores[self.chat.pad_id] = -torch.inf
            if body["temperature"] == 0:
                token = int(scores.argmax())
            else:
                token = int(torch.multinomial((scores / body["temperature"]).softmax(-1), 1, generator=generator))
            sampled.append(token)
            distributions.append(log_probs)
            text = self.chat.decode(sampled)
            if token in end_ids:
                return Sampled(sampled, distributions, text, "stop")
            for stop in body.get("stop", []):
                if stop in text:
                    return Sampled(sampled, distributions, text.partition(stop)[0], "stop")
        return Sampled(sampled, distributions, self.chat.decode(sampled), "length")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: ServedModel
    state: Server

    def log_message(self, *args: object) -> None:
        pass

    def send(self, status: int, body: object, **headers: str) -> None:
        """Sends a complete answer; a string is sent as it is."""
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, message: str, **headers: str) -> None:
        self.send(status, {"error": {"message": message, "type": "error", "code": status}}, **headers)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            data = [{"id": name, "object": "model"} for name in self.state.behaviour.names]
            self.send(200, {"object": "list", "data": data})
        else:
            self.error(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state, behaviour = self.state, self.state.behaviour
        with state.lock:
            state.requests.append((self.path, body))
            state.n_concurrent += 1
            state.max_concurrent = max(state.max_concurrent, state.n_concurrent)
            prompt = self.model.chat.decode([id for id in body.get("prompt", []) if isinstance(id, int)])
            is_probe = "Hello" in json.dumps(body.get("messages", "")) or "Hello" in prompt
            if not is_probe:
                state.n_requests += 1
            number = state.n_requests
        try:
            if behaviour.key and self.headers["Authorization"] != f"Bearer {behaviour.key}":
                self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
            elif is_probe or not behaviour.fault(number, state, self):
                self.answer(body)
        finally:
            with state.lock:
                state.n_concurrent -= 1

    def answer(self, body: dict[str, Any]) -> None:
        behaviour, tokenizer = self.state.behaviour, self.model.chat.tokenizer
        is_chat = self.path == "/v1/chat/completions"
        list_length = (body.get("top_logprobs") or 0) if is_chat else body.get("logprobs")
        wants_log_probs = bool(body.get("logprobs")) if is_chat else list_length is not None
        if not is_chat and not (self.path == "/v1/completions" and behaviour.takes_ids):
            return self.error(404, "Not Found")
        if body["model"] not in behaviour.names:
            return self.error(404, f"The model `{body['model']}` does not exist.")
        if not behaviour.takes_extensions and (unknown := EXTENSIONS & set(body)):
            return self.error(400, f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}")
        if behaviour.limit_field not in body:
            refused = next(name for name in body if name.startswith("max_"))
            return self.error(400, f"no `{refused}`: use `{behaviour.limit_field}` instead")
        if wants_log_probs and (behaviour.list_length == 0 or list_length > behaviour.list_length):
            return self.error(400, f"top_logprobs must be at most {behaviour.list_length}")
        if is_chat:  # as real servers do: special tokens that a content spells become special tokens
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = body["prompt"]
        if len(ids) + body[behaviour.limit_field] > 4096:
            return self.error(400, f"This model's maximum context length is 4096 tokens, but you asked for {len(ids)}.")
        sampled = self.model.sample(ids, body, body[behaviour.limit_field])
        names_by_id = behaviour.takes_extensions and body.get("return_tokens_as_token_ids")

        def name(token_id: int) -> str:
            return f"token_id:{token_id}" if names_by_id else tokenizer.decode([token_id])

        def list_tokens(log_probs: torch.Tensor) -> list[tuple[str, float]]:
            ids = log_probs.topk(list_length).indices.tolist()
            if behaviour.takes_extensions and behaviour.takes_option_ids and body.get("logprob_token_ids"):
                ids = body["logprob_token_ids"]
            return [(name(id), float(log_probs[id])) for id in ids]

        choice: dict[str, Any] = {"index": 0, "finish_reason": sampled.finish_reason}
        positions = [
            (name(id), float(log_probs[id]), list_tokens(log_probs) if wants_log_probs else [])
            for id, log_probs in zip(sampled.ids, sampled.distributions, strict=True)
        ]
        if is_chat:
            choice["message"] = {"role": "assistant", "content": sampled.text}
            if wants_log_probs:
                choice["logprobs"] = {"content": [
                    {"token": token, "logprob": value,
                     "top_logprobs": [{"token": name, "logprob": log_prob} for name, log_prob in listed]}
                    for token, value, listed in positions
                ]}  # fmt: skip
        else:
            choice["text"] = sampled.text
            if wants_log_probs:
                choice["logprobs"] = {
                    "tokens": [token for token, _, _ in positions],
                    "token_logprobs": [value for _, value, _ in positions],
                    "top_logprobs": [dict(listed) | {token: value} for token, value, listed in positions],
                }
        if behaviour.takes_extensions and body.get("return_token_ids"):
            choice["token_ids"] = sampled.ids
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(sampled.ids)}
        self.send(200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage})


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that have disconnected."""


@contextmanager
def serving(model: ServedModel, behaviour: Behaviour | None = None, port: int = 0) -> Iterator[Server]:
    """The server, until the block ends; connections are then refused."""
    handler = type("Bound", (Handler,), {"model": model})
    listener = Listener(("127.0.0.1", port), handler)
    state = Server(f"http://127.0.0.1:{listener.server_address[1]}/v1", behaviour or Behaviour())
    handler.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


Fault = Callable[[int, Server, Handler], bool]


def when(condition: Callable[[int], bool], answer: Callable[[Handler], None]) -> Fault:
    """A fault of the requests whose number meets the condition."""

    def fault(number: int, server: Server, handler: Handler) -> bool:
        if condition(number):
            answer(handler)
        return condition(number)

    return fault


def too_many(*, until: int, after: str = "0.01") -> Fault:
    """429 with Retry-After for the first requests."""
    return when(lambda number: number <= until, lambda handler: handler.error(429, "slow down", Retry_After=after))


def broken(*, until: int) -> Fault:
    """500 for the first requests."""
    return when(lambda number: number <= until, lambda handler: handler.error(500, "it broke"))


def reset(*, until: int) -> Fault:
    """Closes the connection of the first requests without an answer."""
    return when(lambda number: number <= until, hang_up)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def truncated(*, until: int) -> Fault:
    """Half a JSON object, alternately in a complete answer and in one that ends before its announced length."""

    def fault(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            handler.send(200, '{"choices": [{"text": "abc', **({} if number % 2 else {"Content_Length": "5000"}))
            handler.close_connection = number % 2 == 0
        return number <= until

    return fault


def slow(*, until: int, seconds: float) -> Fault:
    """The first requests are answered, late."""

    def fault(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            time.sleep(seconds)
        return False

    return fault
