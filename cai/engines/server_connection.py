"""One server: requests sent many at once, again where that can help, and errors in words that are safe to show.

A request that meets a busy, broken or absent server is sent again after a wait that doubles each time, drawn from its
upper half so that many requests do not come back together. Where the server says how long to wait (Retry-After), all
requests wait as long. What still fails is `Refused`. The key comes from the environment, goes into the header, and is
taken out of everything that a server says: some repeat the header in their error pages.

An event loop in a thread of its own does the work, so that results are there as they come in, also below a notebook's
own loop. Left out: streaming of single tokens, several servers.
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

Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=BaseModel)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the first repetition and, at most, before any that the server does not put off itself."""
LONGEST_DELAY = 600.0
"""Seconds that a server may ask to wait; one that asks for more refuses."""
PASSING = {408, 409, 425, 429}
"""Status codes below 500 that another try can turn into an answer."""


class Refused(Exception):
    """What was asked has no answer. `status` is HTTP's, None where nothing readable came back."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


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
            max_retries=0,  # `ask` sends again, also what came back garbled
            timeout=None,  # `ask` bounds the whole answer, not each read
        )
        # The processes of a stage share what the profile allows; `cai.run.launch` says how many they are.
        self.concurrency = max(1, server.concurrency // int(os.environ.get("WORLD_SIZE", "1")))
        self._free = asyncio.Semaphore(self.concurrency)
        self._answered = False
        self._silent_until = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"server {self.server.url}"

    def close(self) -> None:
        """Cancels what is under way and ends the thread."""

        async def end() -> None:
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await self._client.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def each(self, asks: Sequence[Callable[[], Awaitable[Result]]]) -> Iterator[Result]:
        """The results as they come in. An exception in one, or an end of the iteration, cancels all others."""
        results: SimpleQueue[Result | Exception | None] = SimpleQueue()

        async def one(ask: Callable[[], Awaitable[Result]]) -> None:
            async with self._free:
                results.put(await ask())

        async def every() -> None:
            tasks = [asyncio.create_task(one(ask)) for ask in asks]
            try:
                await asyncio.gather(*tasks)
                results.put(None)
            except Exception as error:
                results.put(error)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        done = asyncio.run_coroutine_threadsafe(every(), self._loop)
        try:
            while True:
                try:
                    result = results.get(timeout=0.2)  # Ctrl-C is seen when this thread wakes
                except Empty:
                    continue
                if result is None:
                    return
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            done.cancel()

    async def ask(
        self,
        method: Literal["get", "post"],
        path: str,
        kind: type[Answer],
        body: Mapping[str, Any] | None = None,
        retries: int | None = None,
    ) -> Answer:
        """The server's answer, read as `kind`. Raises Refused; BadInput where a key is refused or lacks credit."""
        retries = self.server.retries if retries is None else retries
        attempt = 0
        while True:
            await pause(self._silent_until - time.monotonic())
            delay = 0.0
            try:
                async with asyncio.timeout(self.server.timeout):
                    if method == "get":
                        found = await self._client.get(path, cast_to=object)
                    else:
                        found = await self._client.post(path, cast_to=object, body=body)
                answer = kind.model_validate(found)
                self._answered = True
                return answer
            except openai.APIStatusError as error:
                status, reason = error.status_code, f"answered {error.status_code}: {self._said(error)}"
                if status == 401 or (status == 403 and not self._answered):  # later 403 is said of flagged inputs too
                    raise BadInput(f"{self} refuses {self._whose_key()}: it {reason}") from None
                if status == 402:
                    raise BadInput(f"{self} has no credit left for us: it {reason}") from None
                if status not in PASSING and status < 500:
                    raise Refused(f"{self} {reason}", status) from None
                delay = _delay(error.response.headers.get("retry-after"))
                if delay > LONGEST_DELAY:
                    raise Refused(f"{self} {reason}; it asks to wait {delay:.0f} seconds", status) from None
            except TimeoutError:
                status, reason = None, f"gave no answer within {self.server.timeout:g} seconds"
            except openai.APIConnectionError as error:
                status, reason = None, f"cannot be reached: {self.clean(repr(error.__cause__ or error))}"
            except ValueError:  # no JSON, or JSON of another shape
                status, reason = None, "gave an answer that cannot be read"
            if attempt >= retries:
                times = f", {attempt + 1} times in a row" if attempt else ""
                raise Refused(f"{self} {reason}{times}", status)
            if delay:  # what it said to one it means for all
                self._silent_until = max(self._silent_until, time.monotonic() + delay)
            await pause(delay + min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1))
            attempt += 1

    def _whose_key(self) -> str:
        name = self.server.api_key_env
        return (
            f"the key in ${name}" if os.environ.get(name, "").strip() else f"to answer without a key (${name} is unset)"
        )

    def _said(self, error: openai.APIStatusError) -> str:
        """The message in an error's body, or the body."""
        body = error.body
        for name in ("error", "message", "detail"):  # {"error": {"message": …}}, {"error": …}, {"detail": …}
            if isinstance(body, Mapping) and name in body:
                body = body[name]
        return self.clean(str(body or error.response.reason_phrase))

    def clean(self, text: str) -> str:
        """A server's words: without the key, on one line, short."""
        return shorten(printable(" ".join(self._conceal(text).split())), 200)


async def pause(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


def _delay(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms; 0 where it does not say."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    date = email.utils.parsedate_tz(retry_after)
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
