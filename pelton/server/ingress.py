"""The one way in: keys, limits, strict JSON, deadlines and the watch for clients that hang up, for every route.

It stands in front of the router, so a new route cannot forget any of it. A handler finds the parsed body in
`request.state.json`; when the client goes away the handler's task is cancelled, whatever it is doing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pelton.errors import RequestError
from pelton.server.body import parse_json
from pelton.server.errors import UNAUTHORIZED, ErrorReply, StatusError, render
from pelton.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})  # these need no key
BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
BIG_BODY = 256 << 10  # parsed in a thread, so that the event loop keeps turning


class Ingress:
    """Pure ASGI middleware in front of `app`."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.root_path = settings.root_path
        self.limits = settings.limits
        self.key_digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "not served"})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send, _request_id(Headers(scope=scope)))
        try:
            error = await self._admit(scope, receive, reply)
            if error is not None:
                await reply.error(error)
            elif scope["method"] in BODY_METHODS:
                await self._serve_until_disconnect(scope, receive, reply)
            else:
                await self.app(scope, receive, reply.send)
        except Exception as error:  # what no handler foresaw: told without its text, and logged, in render()
            await reply.error(render(error))

    async def _serve_until_disconnect(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Run the handler; cancel it as soon as the client hangs up."""

        async def handle() -> None:
            await self.app(scope, _nothing_more, reply.send)

        work, watch = asyncio.create_task(handle()), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _admit(self, scope: Scope, receive: Receive, reply: _Reply) -> ErrorReply | None:
        """Let the request in (None), with the parsed body in scope["state"], or say why not."""
        headers = Headers(scope=scope)
        if self.root_path and scope["path"].startswith(self.root_path + "/"):
            scope["path"] = scope["path"][len(self.root_path) :]
        state = scope.setdefault("state", {})
        state["request_id"] = reply.request_id
        try:
            self._check_headers(scope)
            if not self._may_enter(scope, headers, state):
                return UNAUTHORIZED
            if scope["method"] in BODY_METHODS:
                body = await self._read_body(headers, receive)
                state["json"] = await self._parse(headers, body)
        except StatusError as error:
            refusal = render(error)
            refusal.headers["Connection"] = "close"  # the rest of the body is not read
            return refusal
        except RequestError as error:
            return render(error)
        return None

    def _check_headers(self, scope: Scope) -> None:
        limits = self.limits
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.target_bytes:
            raise StatusError(414, f"the URL is longer than {limits.target_bytes} bytes")
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > limits.num_headers or size > limits.header_bytes:
            raise StatusError(
                431, f"the headers exceed {limits.num_headers} fields or {limits.header_bytes} bytes"
            )

    def _may_enter(self, scope: Scope, headers: Headers, state: dict[str, object]) -> bool:
        """Whether the caller holds a key. Everything needs one but OPEN_PATHS and OPTIONS, which does no work."""
        if not self.key_digests or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.key_digests]
        state["key_id"] = digest.hex()[:16] if len(matches) > 1 else ""
        return scheme.lower() == "bearer" and any(matches)

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.limits.body_bytes
        too_large = StatusError(413, f"the body exceeds {limit} bytes")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.receive_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise StatusError(408, "the client went away before the body was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise StatusError(408, f"the body did not arrive within {self.limits.receive_s:g} s") from None

    async def _parse(self, headers: Headers, body: bytes) -> object:
        if not body:
            return None
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise StatusError(400, "the body must be JSON: send Content-Type: application/json")
        if len(body) > BIG_BODY:
            return await asyncio.to_thread(parse_json, body, self.limits.json_depth)
        parsed: object = parse_json(body, self.limits.json_depth)
        return parsed


class _Reply:
    """The way out of one request: labels the answer, and knows whether it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def error(self, error: ErrorReply) -> None:
        if self.started:
            return  # too late for a status: sse.py has ended the stream with an error event
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing_more() -> Message:
    """What a handler receives: the body is parsed already, and Ingress itself watches the connection."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


def _request_id(headers: Headers) -> str:
    """A label for logs and for the answer. A client may choose it; nothing else is ever looked up by it."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
