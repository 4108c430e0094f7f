"""Messages as bytes: msgpack behind a length of four bytes, big-endian. Never pickle: nothing read here can run code.

A record is an extension type: its number in RECORDS, and the values of its fields in order. Tuples are marked too,
so that what arrives equals what was sent. What is not plain data is refused where it is sent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any

import msgpack

from pelton import errors
from pelton.config import EngineArgs
from pelton.engine.messages import (
    Abort,
    Answer,
    Begin,
    Close,
    Command,
    EngineInfo,
    Failed,
    Finish,
    Meet,
    Message,
    Met,
    Order,
    Progress,
    Ready,
    Refusal,
    Report,
    Run,
    Start,
)
from pelton.engine.scheduler import SchedulerStats
from pelton.engine.step import Chunk, EngineRequest, StepPlan, TokenLogprobs, Update
from pelton.errors import PeltonError, RequestError
from pelton.types import (
    GuidedDecodingParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct(">I")

RECORDS: tuple[type, ...] = (
    Start, EngineRequest, Abort, Close, Progress, Ready, Failed, Refusal, Report, Update, TokenLogprobs,
    SchedulerStats, EngineInfo, EngineArgs, SamplingParams, StructuredOutputsParams, GuidedDecodingParams,
    RepetitionDetectionParams, Run, Begin, Finish, Meet, Met,
)  # fmt: skip
ERRORS: dict[str, type[PeltonError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, PeltonError)
}
_CODES = {record: code for code, record in enumerate(RECORDS)}
_FIELDS = {record: tuple(field.name for field in fields(record)) for record in RECORDS}
_REQUEST = _CODES[EngineRequest]
_PLAN, _TUPLE, _ERROR = 125, 126, 127  # extension types go up to 127


class WireError(PeltonError):
    """Bytes that are no message: the other end is not an engine of this version."""


def encode(message: Command | Message | Order | Answer) -> bytes:
    """One frame. RequestError if a request holds what cannot be sent."""
    if isinstance(message, EngineRequest):
        message = _plain(message)
    try:
        body = _pack(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(message, EngineRequest):
            raise RequestError(f"the request must be plain data, numbers, text and lists, but: {error}") from None
        raise
    if len(body) > MAX_FRAME_BYTES:
        raise RequestError(f"the request has {len(body) >> 20} MiB, the engine takes {MAX_FRAME_BYTES >> 20}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Any:
    """The message in a frame's body. A request whose fields are out of range arrives as a Refusal of itself."""
    try:
        try:
            return _unpack(body)
        except RequestError as error:
            return Refusal(_request_id(body), error)
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"the engine and its door do not understand each other: {error}") from None


class FrameParser:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes. WireError if they are none."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a message of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield decode(body)


def _plain(request: EngineRequest) -> EngineRequest:
    """The request without what only its door looks at. RequestError for functions: they stay in their process."""
    params = request.params
    if params.logits_processors:
        raise RequestError(
            "logits_processors are functions and cannot reach the engine's process; use LLM, which runs in this one",
            "logits_processors",
        )
    structured = params.structured_outputs
    return replace(request, params=params.clone(stop=None, guided_decoding=None, structured_outputs=structured))


def _pack(value: Any) -> bytes:
    # strict_types: subclasses and tuples go through _to_extension, so nothing changes its type on the way
    data: bytes = msgpack.packb(
        value, default=_to_extension, strict_types=True, use_bin_type=True, unicode_errors="surrogatepass"
    )
    return data


def _to_extension(value: Any) -> Any:
    if (code := _CODES.get(type(value))) is not None:
        return msgpack.ExtType(code, _pack([getattr(value, name) for name in _FIELDS[type(value)]]))
    if isinstance(value, StepPlan):
        return msgpack.ExtType(_PLAN, _pack_plan(value))
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    if isinstance(value, PeltonError):
        return msgpack.ExtType(_ERROR, _pack([type(value).__name__, str(value), vars(value)]))
    if isinstance(value, IntEnum):
        return int(value)
    raise TypeError(f"{type(value).__name__} object")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(
        data, ext_hook=_from_extension, raw=False, strict_map_key=False, unicode_errors="surrogatepass"
    )


def _from_extension(code: int, data: bytes) -> Any:
    values = _unpack(data)
    if code == _TUPLE:
        return tuple(values)
    if code == _PLAN:
        return _unpack_plan(*values)
    if code == _ERROR:
        name, text, details = values
        error = ERRORS[name](text)
        vars(error).update(details)
        return error
    return RECORDS[code](*values)


def _pack_plan(plan: StepPlan) -> bytes:
    """Chunks as lists of their fields, in one piece: there are hundreds in each step."""
    chunks = [
        (chunk.request_id, chunk.start, chunk.num_tokens, chunk.table_start, chunk.blocks, chunk.sample)
        for chunk in plan.chunks
    ]
    return _pack([plan.step_id, plan.new, msgpack.packb(chunks), plan.gone])


def _unpack_plan(step_id: int, new: tuple[EngineRequest, ...], chunks: bytes, gone: tuple[int, ...]) -> StepPlan:
    return StepPlan(step_id, new, tuple(Chunk(*fields) for fields in msgpack.unpackb(chunks, use_list=False)), gone)


def _request_id(body: bytes) -> int:
    """The id of the request in `body`, without a look at its other fields."""
    outer = msgpack.unpackb(body)
    if not isinstance(outer, msgpack.ExtType) or outer.code != _REQUEST:
        raise ValueError("a field is out of range")
    return int(msgpack.unpackb(outer.data)[0])
