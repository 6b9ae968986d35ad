"""Captions from a model behind an OpenAI-compatible server (vLLM, SGLang, transformers serve): many questions at once.

Requests are taken from their source only as fast as answers come, so neither images nor answers pile up.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass
from typing import Any

import aiohttp

from pipeline.pool import JobStopped

from .config import Server

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}        # the server may do better later
HOPELESS = {401: "the key is wrong or missing; set the variable that `api_key_env` names",
            403: "the key may not use this model",
            404: "the address or the model is wrong; `url` ends in /v1 for most servers, and GET {url}/models "
                 "lists what is served"}


@dataclass(frozen=True)
class Question:
    """What is asked about one image."""

    key: str
    image: bytes                    # an encoded file
    text: str
    media: str = "image/jpeg"
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a question: text and how it ended, or an error."""

    key: str
    text: str = ""
    finish_reason: str = ""         # "stop", "length"
    tokens: int | None = None       # generated
    error: str | None = None        # its class, e.g. timeout, bad_answer, refused
    message: str = ""


class ServerFailed(JobStopped):
    """Asking on is useless: the server is down, or refuses the key or the model."""


class Client:
    """A connection to a server; any number of threads may stream questions, and share the bound of requests."""

    def __init__(self, server: Server) -> None:
        self.server, self.clock, self.under_way = server, _Clock(server), 0
        self.room = threading.Semaphore(server.concurrency)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="served", daemon=True).start()
        self.session = asyncio.run_coroutine_threadsafe(self._open(), self.loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        return _session(self.server)

    def stream(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Asks every question, and yields answers as they come; one question at most waits for its turn.

        Raises:
            ServerFailed: wrong key, address or model; or no answer at all for `patience_s`.
        """
        running: set[Future] = set()
        try:
            for question in questions:
                self.room.acquire()
                future = asyncio.run_coroutine_threadsafe(self._ask(question), self.loop)
                future.add_done_callback(lambda _: self.room.release())
                running.add(future)
                done, running = wait(running, timeout=0)
                yield from (future.result() for future in done)
            for future in as_completed(running):
                yield future.result()
        finally:
            for future in running:
                future.cancel()

    async def _ask(self, question: Question) -> Answer:
        if not self.under_way:
            self.clock.answered()       # its patience begins with the first question
        self.under_way += 1
        try:
            return await _ask(self.session, self.server, question, self.clock)
        finally:
            self.under_way -= 1

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.session.close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)


class _Clock:
    """When the server last answered anything that made sense."""

    def __init__(self, server: Server) -> None:
        self.server, self.last = server, time.monotonic()

    def answered(self) -> None:
        self.last = time.monotonic()

    def check(self, why: str) -> None:
        silent = time.monotonic() - self.last
        if silent > self.server.patience_s:
            raise ServerFailed(f"{self.server.url} has given no answer for {silent:.0f} seconds ({why}). Is the server "
                               "up? What was finished is kept: start it, then run the same command again.")


def _session(server: Server) -> aiohttp.ClientSession:
    key = os.environ.get(server.api_key_env)
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        connector=aiohttp.TCPConnector(limit=server.concurrency),
        timeout=aiohttp.ClientTimeout(total=server.timeout_s))


async def _ask(session: aiohttp.ClientSession, server: Server, question: Question, clock: _Clock) -> Answer:
    failure, attempt = Answer(question.key), 0
    while True:
        pause = min(60.0, server.backoff_s * 2 ** attempt) * random.uniform(0.5, 1)
        try:
            async with session.post(f"{server.url.rstrip('/')}/chat/completions", json=body(server, question)) as reply:
                if reply.status in HOPELESS:
                    remedy = HOPELESS[reply.status].format(url=server.url)
                    raise ServerFailed(f"{server.url} answers {reply.status} for model {server.model!r}: {remedy}. "
                                       f"It says: {await _said(reply)}")
                if reply.status == 200:
                    answer = read(question.key, await reply.read())
                    clock.answered()
                    if answer.error is None:
                        return answer
                    failure = answer
                else:
                    failure = Answer(question.key, error="refused", message=f"{reply.status}: {await _said(reply)}")
                    if reply.status not in AGAIN:
                        clock.answered()
                        return failure
                    pause = max(pause, _asked_to_wait(reply))
        except aiohttp.ClientConnectorError as error:
            # Nobody listens: no fault of this row, so it waits as long as patience lasts.
            clock.check(f"{error}")
            await asyncio.sleep(min(pause, 5.0, server.patience_s / 4))
            continue
        except TimeoutError:
            failure = Answer(question.key, error="timeout", message=f"no answer within {server.timeout_s:g} s")
        except aiohttp.ClientError as error:
            failure = Answer(question.key, error="no_connection", message=f"{type(error).__name__}: {error}"[:300])
        clock.check(failure.message)
        attempt += 1
        if attempt > server.retries:
            return failure
        await asyncio.sleep(min(pause, server.patience_s))


def body(server: Server, question: Question) -> dict[str, Any]:
    """The request for a question, in OpenAI's form of chat completions with an image."""
    image = f"data:{question.media};base64,{base64.b64encode(question.image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question.text}]
    messages = [{"role": "system", "content": question.system}] if question.system else []
    request = {"model": server.model, "messages": [*messages, {"role": "user", "content": content}],
               "max_tokens": question.max_tokens, "temperature": question.temperature}
    return request if question.seed is None else request | {"seed": question.seed}


def read(key: str, data: bytes) -> Answer:
    """The answer in a reply; whatever it is, never an exception."""
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason") or "stop"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer(key, error="bad_answer", message=f"not a chat completion: {data[:200]!r}")
    if not isinstance(text, str) or not text.strip():
        return Answer(key, error="bad_answer", message="the answer is empty")
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    tokens = usage.get("completion_tokens")
    return Answer(key, text, str(reason), tokens if isinstance(tokens, int) else None)


async def _said(reply: aiohttp.ClientResponse) -> str:
    return (await reply.content.read(300)).decode("utf-8", "replace").strip() or reply.reason or ""


def _asked_to_wait(reply: aiohttp.ClientResponse) -> float:
    """Seconds of a Retry-After header; dates are left to the back-off."""
    try:
        return min(300.0, max(0.0, float(reply.headers.get("Retry-After", 0))))
    except ValueError:
        return 0.0
