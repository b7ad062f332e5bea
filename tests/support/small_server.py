"""A small OpenAI-compatible server of the tests' own: answers from a real tiny model, and misbehaves on demand.

It computes by itself, one whole forward pass a token, so that the engine is held to something that shares none of its
code. `Behaviour` says which kind of server it plays and what goes wrong. Requests are kept for tests to look at.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
    """Like vLLM unless a test says otherwise."""

    names: tuple[str, ...] = ("tiny",)
    takes_ids: bool = True
    strict: bool = False
    """Refuses settings that OpenAI's interface does not have, as hosted servers do."""
    listed_ids: bool = True
    """Knows `logprob_token_ids`; earlier versions of vLLM ignore it."""
    top: int = 20
    limit: str = "max_tokens"
    """What it calls the most tokens of an answer; OpenAI's newer models refuse the older name."""
    key: str | None = None
    mishap: Callable[[int, Server, Handler], bool] = lambda number, server, handler: False
    """Called with the number of each POST that is no probe. True: it has answered the request itself, somehow."""


@dataclass
class Server:
    """What a test holds: the address, the behaviour to change at any time, and what was asked."""

    url: str
    behaviour: Behaviour
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    number: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Tiny:
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

    def drawn(self, ids: list[int], body: dict[str, Any], limit: int) -> tuple[list[int], list[torch.Tensor], str, str]:
        """(ids, the distribution at each, text, finish reason)."""
        ends = {self.chat.end_of_turn, *body.get("stop_token_ids", [])}
        chance = torch.Generator().manual_seed(body["seed"])
        out: list[int] = []
        rows: list[torch.Tensor] = []
        while len(out) < limit:
            row = self.next_log_probs(ids + out)
            scores = row.clone()
            scores[self.chat.pad_id] = -torch.inf
            if body["temperature"] == 0:
                token = int(scores.argmax())
            else:
                token = int(torch.multinomial((scores / body["temperature"]).softmax(-1), 1, generator=chance))
            out.append(token)
            rows.append(row)
            text = self.chat.decode(out)
            if token in ends:
                return out, rows, text, "stop"
            for stop in body.get("stop", []):
                if stop in text:
                    return out, rows, text.partition(stop)[0], "stop"
        return out, rows, self.chat.decode(out), "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tiny: Tiny
    held: Server

    def log_message(self, *args: object) -> None:
        pass

    def send(self, status: int, body: object, **headers: str) -> None:
        """A whole answer; a string is sent as it is."""
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
            data = [{"id": name, "object": "model"} for name in self.held.behaviour.names]
            self.send(200, {"object": "list", "data": data})
        else:
            self.error(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        held, behaviour = self.held, self.held.behaviour
        with held.lock:
            held.asked.append((self.path, body))
            held.at_once += 1
            held.most_at_once = max(held.most_at_once, held.at_once)
            probe = (
                "Hello" in json.dumps(body.get("messages", ""))
                or self.tiny.chat.decode([one for one in body.get("prompt", []) if isinstance(one, int)]).count("Hello")
                > 0
            )
            if not probe:
                held.number += 1
            number = held.number
        try:
            if behaviour.key and self.headers["Authorization"] != f"Bearer {behaviour.key}":
                self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
            elif probe or not behaviour.mishap(number, held, self):
                self.answer(body)
        finally:
            with held.lock:
                held.at_once -= 1

    def answer(self, body: dict[str, Any]) -> None:
        behaviour, tokenizer = self.held.behaviour, self.tiny.chat.tokenizer
        chats = self.path == "/v1/chat/completions"
        top = (body.get("top_logprobs") or 0) if chats else body.get("logprobs")
        wanted = bool(body.get("logprobs")) if chats else top is not None
        if not chats and not (self.path == "/v1/completions" and behaviour.takes_ids):
            return self.error(404, "Not Found")
        if body["model"] not in behaviour.names:
            return self.error(404, f"The model `{body['model']}` does not exist.")
        if behaviour.strict and (unknown := EXTENSIONS & set(body)):
            return self.error(400, f"Unrecognized request argument supplied: {', '.join(sorted(unknown))}")
        if behaviour.limit not in body:
            refused = next(name for name in body if name.startswith("max_"))
            return self.error(400, f"no `{refused}`: use `{behaviour.limit}` instead")
        if wanted and (behaviour.top == 0 or top > behaviour.top):
            return self.error(400, f"top_logprobs must be at most {behaviour.top}")
        if chats:  # as servers do it: control tokens that a content spells become control tokens
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = body["prompt"]
        if len(ids) + body[behaviour.limit] > 4096:
            return self.error(400, f"This model's maximum context length is 4096 tokens, but you asked for {len(ids)}.")
        out, rows, text, reason = self.tiny.drawn(ids, body, body[behaviour.limit])
        extends = not behaviour.strict
        as_ids = extends and body.get("return_tokens_as_token_ids")

        def name(token: int) -> str:
            return f"token_id:{token}" if as_ids else tokenizer.decode([token])

        def listed(row: torch.Tensor) -> list[tuple[str, float]]:
            if extends and behaviour.listed_ids and body.get("logprob_token_ids"):
                return [(name(token), float(row[token])) for token in body["logprob_token_ids"]]
            values, tokens = row.topk(top)
            return [(name(int(token)), float(value)) for value, token in zip(values, tokens, strict=True)]

        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        drawn = [(name(token), float(row[token])) for token, row in zip(out, rows, strict=True)]
        if chats:
            choice["message"] = {"role": "assistant", "content": text}
            if wanted:
                choice["logprobs"] = {"content": [
                    {"token": token, "logprob": value,
                     "top_logprobs": [{"token": each, "logprob": p} for each, p in listed(row)]}
                    for (token, value), row in zip(drawn, rows, strict=True)
                ]}  # fmt: skip
        else:
            choice["text"] = text
            if wanted:
                choice["logprobs"] = {
                    "tokens": [token for token, _ in drawn], "token_logprobs": [value for _, value in drawn],
                    "top_logprobs": [dict(listed(row)) | {token: value} for (token, value), row in
                                     zip(drawn, rows, strict=True)],
                }  # fmt: skip
        if extends and body.get("return_token_ids"):
            choice["token_ids"] = out
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(out)}
        self.send(200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage})


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is none of ours."""


@contextmanager
def serving(tiny: Tiny, behaviour: Behaviour | None = None, port: int = 0) -> Iterator[Server]:
    """The server, until the block ends; connections are then refused."""
    handler = type("Bound", (Handler,), {"tiny": tiny})
    listener = Listener(("127.0.0.1", port), handler)
    held = Server(f"http://127.0.0.1:{listener.server_address[1]}/v1", behaviour or Behaviour())
    handler.held = held  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def too_many(*, until: int, after: str = "0.01") -> Callable[[int, Server, Handler], bool]:
    """429 with Retry-After for the first requests."""

    def mishap(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            handler.error(429, "slow down", Retry_After=after)
        return number <= until

    return mishap


def broken(*, until: int) -> Callable[[int, Server, Handler], bool]:
    """500 for the first requests."""

    def mishap(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            handler.error(500, "it broke")
        return number <= until

    return mishap


def truncated(*, until: int) -> Callable[[int, Server, Handler], bool]:
    """Half a JSON object, in a whole answer or in one that ends before its announced length, in turn."""

    def mishap(number: int, server: Server, handler: Handler) -> bool:
        if number > until:
            return False
        half = '{"choices": [{"text": "abc'
        if number % 2:
            handler.send(200, half)
        else:
            handler.send(200, half, Content_Length="5000")
            handler.close_connection = True
        return True

    return mishap


def slow(*, until: int, seconds: float) -> Callable[[int, Server, Handler], bool]:
    """The first requests are answered, late."""

    def mishap(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            time.sleep(seconds)
        return False

    return mishap


def reset(*, until: int) -> Callable[[int, Server, Handler], bool]:
    """Hangs up on the first requests without a word."""

    def mishap(number: int, server: Server, handler: Handler) -> bool:
        if number <= until:
            handler.close_connection = True
            handler.connection.close()
        return number <= until

    return mishap
