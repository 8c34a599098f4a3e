"""Routes, limits and answers. Every error is JSON in OpenAI's format, never a traceback."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanochat_native.inference.server.metrics import CONTENT_TYPE, Metrics
from nanochat_native.inference.server.protocol import (
    Answer,
    ApiError,
    Call,
    Reader,
    Served,
    read_chat,
    read_completion,
    read_json,
)
from nanochat_native.inference.server.worker import BusyError, ClosedError, Event, Job, Worker

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
RETRY_SECONDS = 1


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        max_body_bytes: Largest size of the body.
        timeout: Seconds from the first byte of the request to the last byte of the answer.
    """

    max_body_bytes: int
    timeout: float


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down")


class GoneError(Exception):
    """The client has disconnected."""


class Server:
    """The application.

    Args:
        api_key: Key that requests must send; None for no key.
        loopback: Whether the Host header must name this machine.
    """

    def __init__(self, served: Served, worker: Worker, limits: Limits, *, api_key: str | None, loopback: bool) -> None:
        self.served, self.worker, self.limits, self.metrics = served, worker, limits, Metrics()
        self.api_key, self.loopback = api_key, loopback
        self.page, self.policy = read_page()
        routes = [
            self.route("/", self.show_page, public=True),
            self.route("/health", self.health, public=True),
            self.route("/metrics", self.show_metrics),
            self.route("/v1/models", self.models),
            self.route("/v1/models/{model:path}", self.model),
            self.route("/v1/completions", self.generation(read_completion), "POST"),
            self.route("/v1/chat/completions", self.generation(read_chat), "POST"),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self.unknown})

    # --- what all routes share ---

    def route(
        self, path: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET", *, public: bool = False
    ) -> Route:
        """Return a route that checks host and key, turns errors into answers, and counts requests."""

        async def handle(request: Request) -> Response:
            try:
                self.check_host(request)
                if not public:
                    self.check_key(request)
                response = await answer(request)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            except (ClientDisconnect, GoneError):
                self.metrics.gone.add()
                response = Response(status_code=499)  # never read; in the metrics it is nginx's code for a disconnect
            except asyncio.CancelledError:  # the server shuts down, and the grace period is over
                ended = shutting_down()
                response = JSONResponse(ended.body, ended.status)
            except Exception:
                traceback.print_exc()
                failed = ApiError(500, "internal server error; see the server's log")
                response = JSONResponse(failed.body, 500)
            self.metrics.requests.add(1, path, str(response.status_code))
            return response

        return Route(path, handle, methods=[method])

    async def unknown(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "no such path", 405: f"method {request.method} is not allowed here"}
        failed = ApiError(error.status_code, what.get(error.status_code, error.detail))
        self.metrics.requests.add(1, "unknown", str(error.status_code))
        return JSONResponse(failed.body, error.status_code, dict(error.headers or {}))

    def check_host(self, request: Request) -> None:
        """Raise ApiError for requests of pages from other sites, on loopback.

        The Host header shows a name that was made to resolve to this machine (DNS rebinding); the Origin header shows a
        page that sends requests across origins.
        """
        host = re.sub(r":\d+$", "", request.headers.get("host", ""))
        if self.loopback and host.lower() not in LOOPBACK:
            raise ApiError(421, f"Host must be one of {', '.join(LOOPBACK)}")
        origin = request.headers.get("origin")
        if self.loopback and origin is not None and origin != f"http://{request.headers['host']}":
            raise ApiError(403, "requests from other web pages are not allowed")

    def check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.api_key.encode())
        if kind.lower() != "bearer" or not right:
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def read_body(self, request: Request) -> bytes:
        limit = self.limits.max_body_bytes
        too_large = ApiError(413, f"the body must have at most {limit:,} bytes", headers={"Connection": "close"})
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    # --- routes ---

    async def show_page(self, request: Request) -> Response:
        headers = {
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(self.page, media_type="text/html; charset=utf-8", headers=headers)

    async def health(self, request: Request) -> Response:
        if self.worker.failed is not None:
            return JSONResponse({"status": "failed", "reason": self.worker.failed}, 503)
        return JSONResponse({"status": "ok", "model": self.served.name, "key_needed": self.api_key is not None})

    async def show_metrics(self, request: Request) -> Response:
        gauges = {
            "nanochat_running": ("Requests that run now.", self.worker.running),
            "nanochat_waiting": ("Requests that wait for a slot.", self.worker.waiting),
            "nanochat_slots": ("Requests that can run at once.", self.worker.slots),
        }
        return Response(self.metrics.text(gauges), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.served.description()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self.served.name:
            message = f"the model {name[:100]!r} does not exist; this server serves {self.served.name!r}"
            raise ApiError(404, message, code="model_not_found")
        return JSONResponse(self.served.description())

    def generation(self, read: Reader) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            arrived = time.monotonic()
            try:
                async with asyncio.timeout(self.limits.timeout):
                    body = await self.read_body(request)
            except TimeoutError:
                message = f"the body did not arrive within {self.limits.timeout:g} s"
                raise ApiError(408, message, headers={"Connection": "close"}) from None
            # In a thread: tokenizing a long text takes time, and must not delay other requests.
            call = await asyncio.to_thread(lambda: read(read_json(body), self.served))
            try:
                jobs = self.worker.submit(list(zip(call.prompts, call.samplings, strict=True)))
            except BusyError as error:
                raise ApiError(429, f"{error}: try again", headers={"Retry-After": str(RETRY_SECONDS)}) from None
            except ClosedError as error:
                raise ApiError(503, str(error)) from None
            self.metrics.prompt_tokens.add(call.prompt_tokens)
            generation = Generation(self, call, jobs, arrived)
            if call.stream:
                return EventStream(generation)
            async with watched(request.receive) as gone:
                return JSONResponse(await generation.whole(gone), headers=call.headers)

        return answer


class Generation:
    """A running call: turns its events into an answer."""

    def __init__(self, server: Server, call: Call, jobs: list[Job], arrived: float) -> None:
        self.server, self.call, self.jobs, self.arrived = server, call, jobs, arrived
        self.answer = Answer(call, server.served)
        self.started = False  # a token has come

    async def events(self, gone: "asyncio.Task[None]") -> AsyncGenerator[Event, None]:
        """Yield the events of all choices until each has ended; free the slots in every case.

        Raises GoneError if the client disconnects, ApiError 504 on timeout and 500 if the engine fails.
        """
        metrics, ended = self.server.metrics, 0
        deadline = self.arrived + self.server.limits.timeout
        queue = self.jobs[0].events
        try:
            while ended < len(self.jobs):
                getter = asyncio.ensure_future(queue.get())
                done, _ = await asyncio.wait(
                    {getter, gone}, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
                )
                if getter not in done:
                    getter.cancel()
                    if gone in done:
                        raise GoneError
                    raise ApiError(504, f"not finished within {self.server.limits.timeout:g} s", code="timeout")
                event = getter.result()
                if event.tokens and not self.started:
                    self.started = True
                    metrics.first_token.observe(time.monotonic() - self.arrived)
                metrics.generated_tokens.add(event.tokens)
                if event.finish_reason == "error":
                    raise ApiError(500, str(event.error))
                self.answer.put(event.choice, event.tokens, event.text, event.scored, event.finish_reason, event.code)
                ended += event.finish_reason is not None
                yield event
            metrics.duration.observe(time.monotonic() - self.arrived)
        finally:
            self.server.worker.cancel(self.jobs)

    async def whole(self, gone: "asyncio.Task[None]") -> dict[str, Any]:
        async with contextlib.aclosing(self.events(gone)) as events:
            async for _ in events:
                pass
        return self.answer.whole()

    async def chunks(self, gone: "asyncio.Task[None]") -> AsyncGenerator[dict[str, Any], None]:
        for job in self.jobs:
            if first := self.answer.first_chunk(job.choice):
                yield first
        async with contextlib.aclosing(self.events(gone)) as events:
            async for event in events:
                if chunk := self.answer.chunk(event.choice, event.text, event.scored):
                    yield chunk
                if event.finish_reason is not None:
                    if call := self.answer.call_chunk(event.choice):
                        yield call
                    yield self.answer.last_chunk(event.choice)
        if self.call.include_usage:
            yield self.answer.usage_chunk()


class EventStream(Response):
    """Server-sent events with the chunks of a generation. A late error is an event, and no [DONE] follows it."""

    def __init__(self, generation: Generation) -> None:
        headers = {"Cache-Control": "no-cache", **generation.call.headers}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(content: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": True})

        server = self.generation.server
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with watched(receive) as gone:
                try:
                    async with contextlib.aclosing(self.generation.chunks(gone)) as chunks:
                        async for chunk in chunks:
                            await put(json.dumps(chunk))
                    await put("[DONE]")
                except ApiError as error:
                    await put(json.dumps(error.body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (GoneError, OSError):
            server.metrics.gone.add()
        except asyncio.CancelledError:  # the server shuts down, and the grace period is over
            with contextlib.suppress(OSError, RuntimeError):
                await put(json.dumps(shutting_down().body))
        finally:
            server.worker.cancel(self.generation.jobs)


@contextlib.asynccontextmanager
async def watched(receive: Receive) -> "AsyncIterator[asyncio.Task[None]]":
    """Provide a task that ends when the client disconnects; the body must have been read."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(wait())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def read_page() -> tuple[str, str]:
    """Return the page and a content security policy that allows only its own scripts and styles."""
    page = files("nanochat_native.inference.server").joinpath("page.html").read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy
