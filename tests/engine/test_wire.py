"""What is sent between the processes arrives as it was, and nothing that arrives can do harm."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import msgpack
import pytest

from pelton.config import EngineArgs
from pelton.engine.messages import (
    Abort,
    Begin,
    Close,
    EngineInfo,
    Failed,
    Finish,
    Meet,
    Met,
    Progress,
    Ready,
    Refusal,
    Report,
    Run,
    Start,
)
from pelton.engine.scheduler import SchedulerStats
from pelton.engine.step import Chunk, EngineRequest, StepPlan, TokenLogprobs, Update
from pelton.engine.wire import MAX_FRAME_BYTES, FrameParser, WireError, decode, encode
from pelton.errors import OverloadedError, PeltonError, PromptTooLongError, RequestError
from pelton.types import GuidedDecodingParams, RepetitionDetectionParams, SamplingParams

REQUEST = EngineRequest(
    request_id=7,
    prompt_token_ids=[1, 2, 3],
    params=SamplingParams(
        temperature=0.5,
        seed=(1 << 64) - 1,
        logit_bias={3: -100.0},
        extra_args={"a": [1, None, "\ud800"], "b": (1, 2)},
        structured_outputs=GuidedDecodingParams(regex="a+"),
        repetition_detection=RepetitionDetectionParams(4, 1, 3),
    ),
    eos_token_ids=(2, 5),
    bad_words_token_ids=((1,), (2, 3)),
    think_token_ids=(8, 9),
    cache_salt="salt",
    arrival_time=1.5,
)
STATS = SchedulerStats(1, 2, 0.25, 4, 5, 6, 7, (1, 2))
UPDATE = Update(7, [4], [TokenLogprobs([4, 5], [-0.5, -1.0], [1, 2])], [None, TokenLogprobs([1], [-2.0], [3])], "stop")
CHUNKS = (Chunk(7, 3, 2, 1, ((4,), (5, 6)), False), Chunk(8, 0, 1, 0, ((1,), ()), True))
MESSAGES = [
    Start(EngineArgs(model="m", served_model_name=["a", "b"])), REQUEST, Abort(3), Close(), Progress(1, 2),
    Ready(EngineInfo(512, 100, "k", ("a", "b"), ("c",))), Report(STATS, [UPDATE, Update(8)]),
    Run(StepPlan(3, (EngineRequest(8, [1], SamplingParams()),), CHUNKS, (4, 5))), Begin(StepPlan(4, (), (), ())),
    Finish(3), Meet(), Met(4),
]  # fmt: skip


def parse(data: bytes) -> list[Any]:
    return list(FrameParser().feed(data))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was(message: Any) -> None:
    (arrived,) = parse(encode(message))
    assert arrived == message
    if isinstance(message, EngineRequest):
        assert type(arrived.eos_token_ids) is tuple and type(arrived.prompt_token_ids) is list


def test_messages_are_cut_wherever_the_stream_is() -> None:
    stream, parser = b"".join(map(encode, MESSAGES)), FrameParser()
    assert [m for i in range(len(stream)) for m in parser.feed(stream[i : i + 1])] == MESSAGES
    assert parse(stream) == MESSAGES


@pytest.mark.parametrize(
    "error", [PromptTooLongError("too long", "prompt"), OverloadedError("full", 7), PeltonError("x")], ids=repr
)
def test_errors_keep_their_class_and_fields(error: PeltonError) -> None:
    (failed,) = parse(encode(Failed(error)))
    (report,) = parse(encode(Report(STATS, refusals=[Refusal(1, error)])))
    for arrived in (failed.error, report.refusals[0].error):
        assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))


def with_params(**fields: Any) -> EngineRequest:
    return EngineRequest(7, [1], SamplingParams(**fields))


def circular() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    return circle


def test_functions_cannot_cross() -> None:
    with pytest.raises(RequestError, match="use LLM") as caught:
        encode(with_params(logits_processors=[lambda ids, logits: logits]))
    assert caught.value.param == "logits_processors"


@pytest.mark.parametrize("value", [object(), {1, 2}, 1 << 70, circular()], ids=["object", "set", "number", "circle"])
def test_what_is_not_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="plain data"):
        encode(with_params(extra_args={"x": value}))


def test_requests_have_a_largest_size() -> None:
    with pytest.raises(RequestError, match="MiB"):
        encode(with_params(extra_args={"x": bytes(MAX_FRAME_BYTES)}))


def test_a_request_out_of_range_arrives_as_its_refusal() -> None:
    frame = encode(EngineRequest(7, [1], SamplingParams(top_p=0.25)))
    quarter, three = msgpack.packb(0.25), msgpack.packb(3.0)
    assert frame.count(quarter) == 1
    (refusal,) = parse(frame.replace(quarter, three))
    assert isinstance(refusal, Refusal) and refusal.request_id == 7 and "top_p" in str(refusal.error)


def test_an_absurd_length_is_refused_before_anything_is_read() -> None:
    with pytest.raises(WireError, match="at most"):
        parse(b"\xff\xff\xff\xff")


def test_garbage_is_an_error_and_nothing_else() -> None:
    rng = random.Random(1)
    bodies = [encode(message)[4:] for message in MESSAGES]
    for _ in range(3000):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        with contextlib.suppress(PeltonError):
            decode(bytes(body))
