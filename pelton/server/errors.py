"""The one place where an error becomes an HTTP status and a body.

The body serves both generations of clients: the nested object that OpenAI and vLLM from 0.10.1 send, and beside
it the flat keys of vLLM up to 0.10.0.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from pelton.errors import EngineDeadError, OverloadedError, PeltonError, RequestError

logger = logging.getLogger(__name__)

KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    414: "RequestTooLargeError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
# What must not leave the server in an internal error's text: addresses, object representations, paths.
PRIVATE = re.compile(r"0x[0-9a-fA-F]{4,}|<(?:class|function|module|bound method) [^>]*>|<[^<>]* object[^<>]*>"
                     r"|(?<![\w.:])/(?:[\w.@+-]+/)+[\w.@+-]*")


class StatusError(PeltonError):
    """An error that the HTTP door itself found."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True)
class ErrorReply:
    """An error, ready to be sent."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def render(error: BaseException) -> ErrorReply:
    """What a client is told about `error`. An error nobody foresaw is logged, and told without its text."""
    if isinstance(error, StatusError):
        return _reply(error.status, str(error), error.param)
    if isinstance(error, RequestError):
        return _reply(400, str(error), error.param)
    if isinstance(error, OverloadedError):
        return _reply(503, str(error), retry_after=error.retry_after)
    if isinstance(error, EngineDeadError):
        return _reply(503, str(error), retry_after=5)
    if isinstance(error, TimeoutError):
        return _reply(504, "the request took longer than the server allows; ask for fewer tokens")
    if isinstance(error, PeltonError):
        return _reply(500, str(error))
    if isinstance(error, HTTPException):
        return _reply(error.status_code, error.detail, headers=dict(error.headers or {}))
    logger.error("a request failed in the server", exc_info=error)
    return _reply(500, "internal error; the server's log tells more")


def _reply(
    status: int,
    message: str,
    param: str | None = None,
    retry_after: int | None = None,
    headers: dict[str, str] | None = None,
) -> ErrorReply:
    if status >= 500:
        message = PRIVATE.sub("...", message)
    detail = {"message": message, "type": KINDS.get(status, "Error"), "param": param, "code": status}
    headers = dict(headers or {})
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, retry_after))
    return ErrorReply(status, {"error": detail, "object": "error", **detail}, headers)


UNAUTHORIZED = ErrorReply(401, {"error": "Unauthorized"}, {"WWW-Authenticate": "Bearer"})
