"""The HTTP side: routes, keys, the places in line, and answers in the OpenAI API's shape, whole or as events."""

import asyncio
import contextlib
import hmac
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from .answers import Answer, AnswerSettings
from .batching import Batcher, Job
from .chat_request import ChatRequest, read_chat_request
from .errors import RequestError
from .fetching import TOO_LARGE
from .preparation import Preparation

logger = logging.getLogger(__name__)

BODY_SECONDS = 60.0
"""How long the body of a request may take to arrive."""


class Service:
    """
    What answers requests, and who is waiting for it.

    Args:
        model_name (`str`): What requests call the model.
        preparation ([`Preparation`]): Prepares requests.
        batcher ([`Batcher`]): Answers them.
        max_queue (`int`): The most requests that wait for the model or for their media.
        max_body_bytes (`int`): The largest body of a request.
        max_tokens (`int`): The most tokens of an answer whose request does not say.
        temperature, top_p (`float`): Of requests that do not say.
        seed (`int`): Of the seeds of requests that do not say.
        api_key (`str`, *optional*): The key that requests need.
    """

    def __init__(
        self,
        model_name: str,
        preparation: Preparation,
        batcher: Batcher,
        max_queue: int,
        max_body_bytes: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        api_key: str | None = None,
    ):
        self.model_name = model_name
        self.preparation = preparation
        self.batcher = batcher
        self.max_queue = max_queue
        self.max_body_bytes = max_body_bytes
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.api_key = api_key
        self.created = int(time.time())
        self._seeds = random.Random(seed)
        self._jobs: set[Job] = set()
        self._on_drained: Callable[[], None] | None = None

    @property
    def num_waiting(self) -> int:
        return sum(not job.is_started for job in self._jobs)

    @property
    def num_running(self) -> int:
        return len(self._jobs) - self.num_waiting

    @property
    def is_draining(self) -> bool:
        return self._on_drained is not None

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Takes no more requests, and calls `on_drained` when those that were taken are answered."""
        self._on_drained = on_drained
        if not self._jobs:
            on_drained()

    def cancel(self) -> None:
        """Stops answering."""
        for job in self._jobs:
            job.is_cancelled = True

    @contextlib.contextmanager
    def place(self, on_event: Callable[[str | Answer | Exception], None]) -> Generator[Job]:
        """
        A place in line for the duration of a `with` block.

        Raises:
            RequestError: 429 if there is none, 503 if the server is about to end.
        """
        if self.is_draining:
            raise RequestError(503, "The server is shutting down.", code="shutting_down")
        waiting = self.num_waiting
        if waiting >= self.max_queue:
            seconds = round(self.batcher.seconds * (1 + waiting // self.batcher.batch_size))
            raise RequestError(
                429,
                f"{waiting} requests are waiting, which is as many as may: try again later.",
                code="queue_full",
                headers={"Retry-After": str(min(max(seconds, 1), 60))},
            )
        job = Job(on_event)
        self._jobs.add(job)
        try:
            yield job
        finally:
            job.is_cancelled = True
            self._jobs.discard(job)
            if self._on_drained is not None and not self._jobs:
                self._on_drained()

    def settings(self, request: ChatRequest, num_prompt_tokens: int) -> AnswerSettings:
        """How an answer is wanted, with the server's settings for what a request does not say."""
        room = self.preparation.context_length - num_prompt_tokens
        return AnswerSettings(
            max_tokens=min(self.max_tokens, room) if request.max_tokens is None else request.max_tokens,
            temperature=self.temperature if request.temperature is None else request.temperature,
            top_p=self.top_p if request.top_p is None else request.top_p,
            stop=request.stop,
            seed=self._seeds.getrandbits(63) if request.seed is None else request.seed,
        )

    def check_key(self, request: Request) -> None:
        """Raises 401 if a key is needed and the request has another one or none."""
        if self.api_key is None:
            return
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise RequestError(
                401, "The API key is wrong or missing: send `Authorization: Bearer KEY`.", code="invalid_api_key"
            )

    def check_model(self, name: str) -> None:
        """Raises 404 for another model than the one that is served."""
        if name != self.model_name:
            raise RequestError(
                404,
                f"There is no model {name!r:.100} here, only {self.model_name!r}.",
                code="model_not_found",
                param="model",
            )


def make_app(service: Service, allowed_hosts: Sequence[str]) -> Starlette:
    """The application, for an ASGI server. Requests that name another host than those that are allowed get 400."""

    async def health(request: Request) -> Response:
        status = "shutting down" if service.is_draining else "ok"
        body = {"status": status, "waiting": service.num_waiting, "running": service.num_running}
        return JSONResponse(body, 503 if service.is_draining else 200)

    async def list_models(request: Request) -> Response:
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [_model_entry(service)]})

    async def show_model(request: Request) -> Response:
        service.check_key(request)
        service.check_model(request.path_params["name"])
        return JSONResponse(_model_entry(service))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", show_model),
            Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)],
        exception_handlers={RequestError: _show_error, HTTPException: _show_http_error, Exception: _show_failure},
    )


class ChatCompletions:
    """`POST /v1/chat/completions`: an ASGI application by itself, because it answers and listens at the same time."""

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.service.check_key(request)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[str | Answer | Exception] = asyncio.Queue()
        with self.service.place(lambda event: loop.call_soon_threadsafe(events.put_nowait, event)) as job:
            try:
                chat = read_chat_request(await self._read_json(request))
            except ClientDisconnect:
                return
            self.service.check_model(chat.model)
            answering = asyncio.ensure_future(self._answer(chat, job, events, scope, receive, send))
            leaving = asyncio.ensure_future(_wait_until_left(receive))
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if answering.done():
                    answering.result()
            finally:
                job.is_cancelled = True
                answering.cancel()
                leaving.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _read_json(self, request: Request) -> Any:
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            # Web pages cannot send it to other hosts unasked
            raise RequestError(400, "The request needs the header `Content-Type: application/json`.")
        limit, body = self.service.max_body_bytes, bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise RequestError(413, f"The request has more than {limit} bytes.", code=TOO_LARGE)
                body.extend(chunk)

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise RequestError(408, f"The request did not arrive within {BODY_SECONDS:g} seconds.") from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"The request is no JSON: {error}") from error

    async def _answer(
        self,
        chat: ChatRequest,
        job: Job,
        events: "asyncio.Queue[str | Answer | Exception]",
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        preparing = self.service.preparation.submit(chat, lambda: job.is_cancelled)
        job.inputs = await asyncio.wrap_future(preparing)
        chat.messages.clear()  # with the files that are in it
        num_prompt_tokens = job.inputs["input_ids"].shape[1]
        job.settings = self.service.settings(chat, num_prompt_tokens)
        self.service.batcher.submit(job)
        completion = _Completion(self.service.model_name, chat, num_prompt_tokens)
        first = await _next_event(events)  # what goes wrong before it still has a status of its own
        headers = {"X-Request-Id": completion.id}
        if not chat.stream:
            while not isinstance(first, Answer):
                first = await _next_event(events)
            await JSONResponse(completion.whole(first), headers=headers)(scope, receive, send)
            return
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-store"),
                    *((name.lower().encode(), value.encode()) for name, value in headers.items()),
                ],
            }
        )
        async for line in completion.stream(first, events):
            await send({"type": "http.response.body", "body": f"data: {line}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Completion:
    """An answer in the shape of the OpenAI API."""

    def __init__(self, model_name: str, chat: ChatRequest, num_prompt_tokens: int):
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model_name = model_name
        self.chat = chat
        self.num_prompt_tokens = num_prompt_tokens

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(answer)}

    async def stream(
        self, event: str | Answer, events: "asyncio.Queue[str | Answer | Exception]"
    ) -> AsyncIterator[str]:
        """The data of the events of a stream, which begins with `event`."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            while not isinstance(event, Answer):
                yield self._chunk({"content": event})
                event = await _next_event(events)
        except RequestError as error:
            yield json.dumps(error.body())
            return
        yield self._chunk({}, event.finish_reason)
        if self.chat.include_usage:
            yield json.dumps({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(event)})
        yield "[DONE]"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.chat.include_usage else {}
        return json.dumps({**self._head("chat.completion.chunk"), "choices": [choice], **usage}, ensure_ascii=False)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}

    def _usage(self, answer: Answer) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": answer.num_tokens,
            "total_tokens": self.num_prompt_tokens + answer.num_tokens,
        }


async def _next_event(events: "asyncio.Queue[str | Answer | Exception]") -> str | Answer:
    event = await events.get()
    if isinstance(event, Exception):  # the model's thread has logged it
        raise RequestError(500, "The model failed to answer; the server's log says why.") from event
    return event


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _model_entry(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "transformers_videollama",
    }


async def _show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(RequestError(error.status_code, message).body(), error.status_code, headers=error.headers)


async def _show_failure(request: Request, error: Exception) -> Response:
    """What nobody expected; the log has it."""
    return JSONResponse(RequestError(500, "The server failed; its log says why.").body(), 500)
