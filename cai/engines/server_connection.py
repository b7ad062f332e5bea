"""One server: many requests at once, retries where they can help, and error messages that are safe to show.

A request that meets a busy, broken or absent server is sent again after a wait that doubles each time and is drawn from
its upper half, so that many requests do not come back together. Where the server says how long to wait (Retry-After),
all requests wait as long. A request that still fails raises `RequestFailed`. The key comes from the environment, goes
into the header, and is removed from everything that a server answers: some repeat the header in their error pages.

An event loop in a thread of its own does the work, so that results are available as they come in, also inside a
notebook, which has a loop of its own. Left out: streaming of single tokens, several servers.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

import openai
from pydantic import BaseModel

from cai.contracts.profile import Server
from cai.text.errors import BadInput
from cai.text.formatting import printable, shorten
from cai.text.left_out import FailureKind

Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=BaseModel)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first retry, and before later ones at most; what the server asks for is added."""
LONGEST_DELAY = 600.0
"""Seconds that a server may ask to wait; more than that is a failure."""
RETRIED_STATUS_CODES = {408, 409, 425, 429}
"""Status codes below 500 for which a retry can succeed."""


class RequestFailed(Exception):
    """A request without an answer. `status` is HTTP's, None where nothing readable came back."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status

    @property
    def kind(self) -> FailureKind:
        """Transient where the same request may succeed later."""
        is_transient = self.status is None or self.status >= 500 or self.status in RETRIED_STATUS_CODES
        return "transient" if is_transient else "other"


class Connection:
    """Requests to one server. Close it when done."""

    def __init__(self, server: Server) -> None:
        key = os.environ.get(server.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise BadInput(f"the key in ${server.api_key_env} has characters that no header takes")
        self.server = server
        self._conceal: Callable[[str], str] = lambda text: text.replace(key, "[key]") if key else text
        self._client = openai.AsyncOpenAI(
            base_url=server.url,
            api_key=key or "none",
            max_retries=0,  # `request` retries, also after answers that cannot be read
            timeout=None,  # `request` limits the time of the whole answer, not of each read
        )
        # The processes of a stage, which `cai.run.launch` starts, share what the profile allows.
        self.concurrency = max(1, server.concurrency // int(os.environ.get("WORLD_SIZE", "1")))
        self._slots = asyncio.Semaphore(self.concurrency)
        self._has_answered = False
        self._paused_until = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"server {self.server.url}"

    def close(self) -> None:
        """Cancels pending requests and ends the thread."""

        async def end() -> None:
            pending = asyncio.all_tasks() - {asyncio.current_task()}
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await self._client.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run_all(self, calls: Sequence[Callable[[], Awaitable[Result]]]) -> Iterator[Result]:
        """The calls' results as they come in. An exception in one, or an end of the iteration, cancels all others."""
        results: SimpleQueue[Result | Exception | None] = SimpleQueue()

        async def run(call: Callable[[], Awaitable[Result]]) -> None:
            async with self._slots:
                results.put(await call())

        async def run_tasks() -> None:
            tasks = [asyncio.create_task(run(call)) for call in calls]
            try:
                await asyncio.gather(*tasks)
                results.put(None)
            except Exception as error:
                results.put(error)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        future = asyncio.run_coroutine_threadsafe(run_tasks(), self._loop)
        try:
            while True:
                try:
                    result = results.get(timeout=0.2)  # so that this thread wakes and notices Ctrl-C
                except Empty:
                    continue
                if result is None:
                    return
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            future.cancel()

    async def request(
        self,
        method: Literal["get", "post"],
        path: str,
        answer_type: type[Answer],
        body: Mapping[str, Any] | None = None,
        retries: int | None = None,
    ) -> Answer:
        """The server's answer. Raises RequestFailed; BadInput where the key is refused or has no credit left."""
        retries = self.server.retries if retries is None else retries
        attempt = 0
        while True:
            await pause(self._paused_until - time.monotonic())
            delay = 0.0
            try:
                async with asyncio.timeout(self.server.timeout):
                    if method == "get":
                        parsed_json = await self._client.get(path, cast_to=object)
                    else:
                        parsed_json = await self._client.post(path, cast_to=object, body=body)
                answer = answer_type.model_validate(parsed_json)
                self._has_answered = True
                return answer
            except openai.APIStatusError as error:
                status, reason = error.status_code, f"answered {error.status_code}: {self._error_message(error)}"
                # After the first answer 403 can also mean that an input was flagged.
                if status == 401 or (status == 403 and not self._has_answered):
                    raise BadInput(f"{self} refuses {self._whose_key()}: it {reason}") from None
                if status == 402:
                    raise BadInput(f"{self} has no credit left for us: it {reason}") from None
                if status not in RETRIED_STATUS_CODES and status < 500:
                    raise RequestFailed(f"{self} {reason}", status) from None
                delay = _retry_after_seconds(error.response.headers.get("retry-after"))
                if delay > LONGEST_DELAY:
                    raise RequestFailed(f"{self} {reason}; it asks to wait {delay:.0f} seconds", status) from None
            except TimeoutError:
                status, reason = None, f"gave no answer within {self.server.timeout:g} seconds"
            except openai.APIConnectionError as error:
                status, reason = None, f"cannot be reached: {self.clean(repr(error.__cause__ or error))}"
            except ValueError:  # no JSON, or JSON of another shape
                status, reason = None, "gave an answer that cannot be read"
            if attempt >= retries:
                times = f", {attempt + 1} times in a row" if attempt else ""
                raise RequestFailed(f"{self} {reason}{times}", status)
            if delay:  # the server means all requests
                self._paused_until = max(self._paused_until, time.monotonic() + delay)
            await pause(delay + min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1))
            attempt += 1

    def _whose_key(self) -> str:
        name = self.server.api_key_env
        has_key = os.environ.get(name, "").strip()
        return f"the key in ${name}" if has_key else f"to answer without a key (${name} is unset)"

    def _error_message(self, error: openai.APIStatusError) -> str:
        """The message in an error's body, or the body."""
        body = error.body
        for name in ("error", "message", "detail"):  # {"error": {"message": …}}, {"error": …}, {"detail": …}
            if isinstance(body, Mapping) and name in body:
                body = body[name]
        return self.clean(str(body or error.response.reason_phrase))

    def clean(self, text: str) -> str:
        """Text from a server: without the key, on one line, short."""
        return shorten(printable(" ".join(self._conceal(text).split())), 200)


async def pause(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


def _retry_after_seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms; 0 where it does not say."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    date = email.utils.parsedate_tz(retry_after)
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
