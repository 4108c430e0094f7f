"""Updates of the engine become RequestOutput objects, for each kind of output."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pelton.engine.step import TokenLogprobs, Update
from pelton.text.output import RequestAssembler
from pelton.text.prompt import Prompts
from pelton.text.tokenizer import Tokenizer
from pelton.types import FlatLogprobs, RequestOutput, RequestOutputKind, SamplingParams

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


def assembler(tokenizer: Tokenizer, **fields: Any) -> RequestAssembler:
    params = SamplingParams(**{"max_tokens": 100, **fields})
    ids = itertools.count(10)
    requests = Prompts(tokenizer, None, 1000).requests(lambda: next(ids), tokenizer.encode("ab"), params)
    clock = itertools.count(requests[0].arrival_time + 1)
    return RequestAssembler("r", "ab", params, tokenizer, requests, clock=lambda: float(next(clock)))


def feed(made: RequestAssembler, tokenizer: Tokenizer, text: str, request_id: int = 10) -> list[RequestOutput]:
    """Push a text token by token, then its end."""
    ids = tokenizer.encode(text)
    updates = [Update(request_id, [token_id]) for token_id in ids]
    updates[-1].finish_reason = "length"
    return [output for update in updates if (output := made.push(update)) is not None]


def test_cumulative_delta_and_final(tiny: Tokenizer) -> None:
    outputs = feed(assembler(tiny, output_kind=CUMULATIVE), tiny, "xyz")
    assert [o.outputs[0].text for o in outputs] == ["x", "xy", "xyz"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3]
    outputs = feed(assembler(tiny, output_kind=DELTA), tiny, "xyz")
    assert [o.outputs[0].text for o in outputs] == ["x", "y", "z"]
    assert [o.finished for o in outputs] == [False, False, True]
    outputs = feed(assembler(tiny, output_kind=FINAL_ONLY), tiny, "xyz")
    assert [(o.outputs[0].text, o.finished, o.outputs[0].finish_reason) for o in outputs] == [("xyz", True, "length")]
    assert (outputs[0].request_id, outputs[0].prompt, outputs[0].prompt_token_ids) == ("r", "ab", tiny.encode("ab"))


def test_earlier_outputs_do_not_change(tiny: Tokenizer) -> None:
    outputs = feed(assembler(tiny, logprobs=None), tiny, "xyz")
    assert list(outputs[0].outputs[0].token_ids) == tiny.encode("x")


def test_stream_interval(tiny: Tokenizer) -> None:
    outputs = feed(assembler(tiny, output_kind=DELTA, stream_interval=3), tiny, "abcdefgh")
    assert [o.outputs[0].text for o in outputs] == ["a", "bcd", "efg", "h"]


def test_the_end_of_text_is_not_shown_but_counted(tiny: Tokenizer) -> None:
    made = assembler(tiny, skip_special_tokens=False)
    output = made.push(Update(10, [*tiny.encode("x"), 0], finish_reason="stop"))
    assert output is not None and made.finished
    assert (output.outputs[0].text, list(output.outputs[0].token_ids)) == ("x", [*tiny.encode("x"), 0])
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    output = assembler(tiny).push(Update(10, tiny.encode("xy"), finish_reason="stop", stop_reason=5))
    assert output is not None and (output.outputs[0].text, output.outputs[0].stop_reason) == ("x", 5)


def test_a_stop_string_ends_the_sample_and_aborts_the_request(tiny: Tokenizer) -> None:
    made = assembler(tiny, stop=["yz"], output_kind=DELTA)
    texts = []
    for token_id in tiny.encode("xyzab"):
        output = made.push(Update(10, [token_id]))
        texts += [output.outputs[0].text] if output else []
    assert texts == ["x", "", ""]
    assert made.finished and made.take_aborts() == [10] and made.take_aborts() == [] and made.request_ids == []
    assert made.push(Update(10, finish_reason="abort")) is None
    made = assembler(tiny, stop=["yz"])
    output = made.push(Update(10, tiny.encode("xyzab"), finish_reason="length"))
    assert output is not None
    sample = output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("x", "stop", "yz")
    assert list(sample.token_ids) == tiny.encode("xyz") and made.take_aborts() == []  # the engine has ended it itself


def test_logprobs(tiny: Tokenizer) -> None:
    made = assembler(tiny, logprobs=1, prompt_logprobs=0, stop=["z"])
    x, y, z = tiny.encode("xyz")
    entries = [TokenLogprobs([token_id, y], [-1.5, -0.5], [3, 1]) for token_id in (x, z, y)]
    prompt = [None, TokenLogprobs([tiny.encode("b")[0]], [-2.0], [7])]
    output = made.push(Update(10, [x, z, y], logprobs=entries, prompt_logprobs=prompt))
    assert output is not None
    sample = output.outputs[0]
    assert sample.logprobs is not None and len(sample.logprobs) == 2  # nothing after the stop string
    assert [(i, p.logprob, p.rank, p.decoded_token) for i, p in sample.logprobs[0].items()] == [
        (x, -1.5, 3, "x"), (y, -0.5, 1, "y"),
    ]
    assert sample.cumulative_logprob == -3.0
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None and [*output.prompt_logprobs[1]] == tiny.encode("b")


def test_logprobs_of_given_tokens(tiny: Tokenizer) -> None:
    x, y = tiny.encode("xy")
    entry = TokenLogprobs([x, y], [-1.5, -0.5], [3, 1])
    output = assembler(tiny, logprob_token_ids=[y]).push(Update(10, [x], logprobs=[entry], finish_reason="length"))
    assert output is not None
    sample = output.outputs[0]
    assert sample.logprobs is not None and [*sample.logprobs[0]] == [x, y] and sample.cumulative_logprob == -1.5


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL_ONLY])
def test_flat_logprobs_say_the_same(tiny: Tokenizer, kind: RequestOutputKind) -> None:
    ids = tiny.encode("xyz")
    entries = [TokenLogprobs([token_id, 1], [-1.5, -0.5], [3, 1]) for token_id in ids]

    def outputs(flat: bool) -> list[RequestOutput]:
        made = assembler(tiny, logprobs=1, prompt_logprobs=1, flat_logprobs=flat, output_kind=kind)
        updates = [Update(10, [token_id], [entry]) for token_id, entry in zip(ids, entries, strict=True)]
        updates[0].prompt_logprobs, updates[-1].finish_reason = [None, entries[0]], "length"
        return [output for update in updates if (output := made.push(update)) is not None]

    for flat, plain in zip(outputs(True), outputs(False), strict=True):
        logprobs = flat.outputs[0].logprobs
        assert isinstance(logprobs, FlatLogprobs) and list(logprobs) == plain.outputs[0].logprobs
        if plain.prompt_logprobs is not None:
            assert isinstance(flat.prompt_logprobs, FlatLogprobs)
            assert list(flat.prompt_logprobs) == [{}, *plain.prompt_logprobs[1:]]


def test_prompt_logprobs_come_once_in_deltas(tiny: Tokenizer) -> None:
    made = assembler(tiny, prompt_logprobs=0, output_kind=DELTA)
    first = made.push(Update(10, tiny.encode("x"), prompt_logprobs=[None, TokenLogprobs([5], [-1.0], [1])]))
    second = made.push(Update(10, tiny.encode("y")))
    assert first is not None and first.prompt_logprobs is not None
    assert second is not None and second.prompt_logprobs is None and second.outputs[0].logprobs is None


def test_only_the_prompt_is_asked_for(tiny: Tokenizer) -> None:
    made = assembler(tiny, max_tokens=0, prompt_logprobs=0)
    output = made.push(Update(10, prompt_logprobs=[None], finish_reason="length"))
    assert output is not None and output.finished
    assert (output.outputs[0].text, output.outputs[0].token_ids, output.prompt_logprobs) == ("", [], [None])


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL_ONLY])
def test_several_samples(tiny: Tokenizer, kind: RequestOutputKind) -> None:
    made = assembler(tiny, n=2, output_kind=kind)
    outputs = [*feed(made, tiny, "xy", 11), *feed(made, tiny, "uvw", 10)]
    texts = ["", ""]
    for output in outputs:
        for sample in output.outputs:
            texts[sample.index] = texts[sample.index] + sample.text if kind == DELTA else sample.text
    assert texts == ["uvw", "xy"]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_best_of(tiny: Tokenizer) -> None:
    made = assembler(tiny, n=2, best_of=3)
    for request_id, text, logprob in ((10, "x", -3.0), (11, "y", -1.0), (12, "z", -2.0)):
        output = made.push(
            Update(request_id, tiny.encode(text), [TokenLogprobs([1], [logprob], [1])], finish_reason="length")
        )
    assert output is not None and output.finished
    assert [(s.index, s.text, s.cumulative_logprob, s.logprobs) for s in output.outputs] == [
        (0, "y", -1.0, None), (1, "z", -2.0, None),
    ]


def test_times_and_cached_tokens(tiny: Tokenizer) -> None:
    made = assembler(tiny)
    made.push(Update(10, tiny.encode("x"), scheduled_time=5.0, num_cached_tokens=2))
    output = made.push(Update(10, tiny.encode("y"), finish_reason="length"))
    assert output is not None and output.metrics is not None and output.num_cached_tokens == 2
    times = output.metrics
    assert times.first_scheduled_time == 5.0
    assert times.arrival_time < times.first_token_time < times.last_token_time < times.finished_time  # type: ignore[operator]


def test_errors(tiny: Tokenizer) -> None:
    output = assembler(tiny).push(Update(10, finish_reason="error", error="it broke"))
    assert output is not None and (output.error, output.outputs[0].finish_reason) == ("it broke", "error")
    made = assembler(tiny, n=2, output_kind=FINAL_ONLY)
    feed(made, tiny, "xy", 10)
    output = made.fail("the engine is gone")
    assert output.finished and output.error == "the engine is gone"
    assert [sample.finish_reason for sample in output.outputs] == ["length", "error"]
