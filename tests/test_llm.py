"""LLM on a small model with random weights: every way to ask, every way to be refused or interrupted."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pelton import LLM, ConfigError, EngineDeadError, PromptTooLongError, RequestError, SamplingParams
from pelton.config import EngineArgs
from pelton.door import args_from_keywords, log_choices
from pelton.engine.messages import EngineInfo
from pelton.engine.step import StepPlan, StepResult
from pelton.progress import ProgressBar

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["one", "two and more", "three"]


@pytest.fixture(scope="module")
def llm(tiny_model_path: Path) -> LLM:
    return LLM(str(tiny_model_path), load_format="dummy", dtype="float32", max_num_seqs=4, num_threads=1)


@pytest.fixture(autouse=True)
def _nothing_is_left(llm: LLM) -> Any:
    yield
    stats = llm._core.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    assert not llm._jobs and not llm._core.has_work()
    llm._core.scheduler.check()


class Failing:
    """A runner that fails in the step after the first `num_good`."""

    def __init__(self, runner: Any, fail: Callable[[], None], num_good: int = 3) -> None:
        self.runner, self.fail, self.num_left = runner, fail, num_good

    def run(self, plan: StepPlan) -> StepResult:
        self.num_left -= 1
        if self.num_left == -1:
            self.fail()
        result: StepResult = self.runner.run(plan)
        return result


def test_prompts_come_in_every_form(llm: LLM) -> None:
    (alone,) = llm.generate("one", GREEDY)
    ids = alone.prompt_token_ids
    assert alone.prompt == "one" and alone.finished and len(alone.outputs[0].token_ids) == 12
    forms: list[Any] = ["one", ["one"], ids, [ids], {"prompt": "one"}, [{"prompt_token_ids": ids}]]
    for prompts in forms:
        (output,) = llm.generate(prompts, GREEDY)
        assert (output.prompt_token_ids, output.outputs[0].text) == (ids, alone.outputs[0].text)
    for legacy in (ids, [ids]):
        (output,) = llm.generate(prompt_token_ids=legacy, sampling_params=GREEDY)
        assert output.outputs[0].text == alone.outputs[0].text
    assert llm.generate([], GREEDY) == []


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [GREEDY.clone(max_tokens=10 - i) for i in range(10)]
    outputs = llm.generate([f"prompt {i}" for i in range(10)], params)
    assert [output.prompt for output in outputs] == [f"prompt {i}" for i in range(10)]
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(10, 0, -1))
    ids = [int(output.request_id) for output in outputs]
    assert ids == sorted(set(ids))


def test_a_stream_is_running_text(llm: LLM) -> None:
    whole = {output.prompt: output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)}
    parts: dict[str | None, list[str]] = {}
    ends = 0
    for output in llm.generate(PROMPTS, GREEDY, stream=True):
        parts.setdefault(output.prompt, []).append(output.outputs[0].text)
        ends += output.finished
    assert {prompt: "".join(texts) for prompt, texts in parts.items()} == whole
    assert ends == 3 and all(len(texts) > 3 for texts in parts.values())


def test_n_samples_stop_strings_and_best_of(llm: LLM) -> None:
    (output,) = llm.generate("one", SamplingParams(n=3, seed=1, max_tokens=8, ignore_eos=True))
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({sample.text for sample in output.outputs}) == 3
    text = llm.generate("one", GREEDY)[0].outputs[0].text
    stop = text[4:6]
    (output,) = llm.generate("one", GREEDY.clone(stop=[stop]))
    assert output.outputs[0].stop_reason == stop and output.outputs[0].text == text[: text.index(stop)]
    (output,) = llm.generate("one", SamplingParams(n=1, best_of=3, seed=1, max_tokens=4))
    assert len(output.outputs) == 1


def test_a_closed_stream_ends_its_requests(llm: LLM) -> None:
    stream = llm.generate(PROMPTS, GREEDY.clone(max_tokens=100), stream=True)
    next(stream)
    assert llm._core.scheduler.stats().num_running == 3
    stream.close()
    assert llm._core.scheduler.stats().num_running == 0


def test_streams_may_be_read_in_turns(llm: LLM) -> None:
    first, second = llm.generate("one", GREEDY, stream=True), llm.generate("two", GREEDY, stream=True)
    texts = ["", ""]
    for a, b in zip(first, second, strict=True):
        texts[0] += a.outputs[0].text
        texts[1] += b.outputs[0].text
    assert texts == [output.outputs[0].text for output in llm.generate(["one", "two"], GREEDY)]


def test_threads_share_an_llm(llm: LLM) -> None:
    texts = {output.prompt: output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)}
    seen: dict[str, str] = {}

    def ask(prompt: str) -> None:
        seen[prompt] = llm.generate(prompt, GREEDY)[0].outputs[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == texts


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "<|user|>hello>" and len(output.outputs[0].token_ids) == 12
    both = llm.chat([messages, [{"role": "user", "content": "hi"}]], GREEDY)
    assert [one.prompt for one in both] == ["<|user|>hello>", "<|user|>hi>"]
    assert both[0].outputs[0].text == output.outputs[0].text
    streamed = "".join(one.outputs[0].text for one in llm.chat(messages, GREEDY, stream=True))
    assert streamed == output.outputs[0].text
    (other,) = llm.chat(messages, GREEDY, chat_template="{{ messages[0].content }}!", add_generation_prompt=False)
    assert other.prompt == "hello!"


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_is_named_before_anything_is_computed(llm: LLM, stream: bool) -> None:
    before = llm._core.scheduler._num_steps
    with pytest.raises(RequestError, match="prompt 1: .*out of vocabulary"):
        llm.generate(["fine", [1, 99999]], GREEDY, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(PromptTooLongError, match="prompt 2: .*maximum context length is 256"):
        llm.generate(["fine", "fine", "long" * 100], GREEDY, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="3 prompts and 2"):
        llm.generate(PROMPTS, [GREEDY] * 2, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="list of token ids"):
        llm.generate([1, "two"], GREEDY, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="conversation 1"):
        llm.chat([[{"role": "user", "content": "x"}], [{"role": "user"}, 3]], GREEDY)  # type: ignore[list-item]
    assert llm._core.scheduler._num_steps == before


def test_a_request_that_fails_in_the_engine_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    good = llm.generate(["one", "three"], GREEDY)
    runner, bad = llm._core.runner, set[int]()

    class Poisoned:
        def run(self, plan: StepPlan) -> StepResult:
            bad.update(request.request_id for request in plan.new if request.params.seed == 13)
            if any(chunk.request_id in bad for chunk in plan.chunks):
                raise FloatingPointError("not finite")
            return runner.run(plan)

    monkeypatch.setattr(llm._core, "runner", Poisoned())
    outputs = llm.generate(PROMPTS, [GREEDY, GREEDY.clone(seed=13), GREEDY])
    assert "not finite" in (outputs[1].error or "") and outputs[1].outputs[0].finish_reason == "error"
    assert [outputs[0].outputs[0].text, outputs[2].outputs[0].text] == [one.outputs[0].text for one in good]
    assert outputs[0].error is None


def test_ctrl_c_waits_for_the_step_and_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("one", GREEDY)[0].outputs[0].text
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm._core, "runner", Failing(llm._core.runner, lambda: signal.raise_signal(signal.SIGINT)))
        llm.generate(PROMPTS, GREEDY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate("one", GREEDY)[0].outputs[0].text == expected


def test_an_engine_that_failed_says_so(tiny_model_path: Path) -> None:
    llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", num_threads=1)

    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    llm._core.runner = Failing(llm._core.runner, press_twice)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("one", GREEDY)
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate("one", GREEDY)


def test_nobody_steps_an_engine_that_failed(tiny_model_path: Path) -> None:
    llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", num_threads=1)
    stream = llm.generate("one", GREEDY, stream=True)
    next(stream)

    def leave() -> None:
        raise KeyboardInterrupt

    llm._core.runner = Failing(llm._core.runner, leave, num_good=1)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("two", GREEDY)
    num_steps = llm._core.scheduler._num_steps
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        list(stream)  # what came before is still given out
    assert llm._core.scheduler._num_steps == num_steps


def test_options_are_checked(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        LLM(str(tiny_model_path), max_modle_len=10)
    with pytest.raises(ConfigError, match="generation_config.json"):
        LLM(str(tiny_model_path), generation_config=str(tiny_model_path))
    with pytest.raises(ConfigError, match="load-format gguf"):
        LLM(str(tiny_model_path), load_format="gguf")
    with caplog.at_level("INFO"):
        llm = LLM(str(tiny_model_path), load_format="dummy", max_model_len=64, swap_space=4, num_threads=1)
    assert "swap_space has no effect" in caplog.text
    assert any("dtype" in record.message for record in caplog.records if record.levelname == "INFO")
    assert llm.info.max_model_len == 64 and llm.get_tokenizer().encode("a") == llm.tokenizer.encode("a")
    assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"enable_lora": True}, "LoRA is not in this version"), ({"kv_cache_dtype": "fp4"}, "choose one of auto"),
     ({"reasoning_parser": "qwen3"}, "reasoning_parser: parsing of reasoning"), ({"task": "embed"}, "task embed")],
)
def test_what_vllm_has_and_pelton_has_not_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        args_from_keywords(options)


def test_vllms_defaults_are_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    options = {"kv_cache_dtype": "auto", "pipeline_parallel_size": 1, "tokenizer_mode": "auto", "task": "generate",
               "cpu_offload_gb": 0, "enable_lora": False, "reasoning_parser": None, "swap_space": None}
    with caplog.at_level("DEBUG"):
        assert args_from_keywords(options) == EngineArgs()
    assert not caplog.records


def test_what_a_person_has_to_know_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    info = EngineInfo(320, 320, "rms_norm cpu-generic", ("dtype float32",), ("max_model_len 320 instead of 1024",))
    with caplog.at_level("DEBUG"):
        log_choices(info)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("DEBUG", "kernels: rms_norm cpu-generic"), ("INFO", "dtype float32"),
        ("WARNING", "max_model_len 320 instead of 1024"),
    ]  # fmt: skip


def test_the_progress_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("pelton.progress.PATIENCE_S", 0.0)
    monkeypatch.setattr("pelton.progress.REDRAW_S", 0.0)
    cases = [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)]
    for stderr, enabled, is_drawn in cases:
        monkeypatch.setattr(sys, "stderr", stderr)
        with ProgressBar("Prompts", 4, enabled) as bar:
            bar.advance()
            bar.advance()
        assert ("Prompts:  50% |############" in stderr.getvalue()) is is_drawn
        assert not stderr.getvalue().split("\r")[-1].strip()
