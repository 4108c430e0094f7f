"""What can fail on a GPU, told in one line each; torch and the driver are replaced where they are called."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pelton import LLM, EngineDeadError, SamplingParams, build
from pelton.config import EngineArgs, ModelFacts
from pelton.engine.step import StepPlan
from pelton.errors import ConfigError, DeviceError, DeviceLostError, OutOfMemoryError
from pelton.ops import gpu
from pelton.runner import device
from pelton.runner.model_runner import ModelRunner

NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by ..."
TORCH_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which ..."
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built_for", "error", "visible", "says"),
    [
        (None, "", None, "was built without CUDA; install one with it"),
        ("13.0", OLD_DRIVER, "0", "driver of CUDA 12.4 is too old for this torch, which is for CUDA 13.0; update the"),
        ("13.0", NO_DRIVER, None, "there is no NVIDIA driver; install it"),
        ("13.0", "No CUDA GPUs are available", "", "CUDA_VISIBLE_DEVICES= names no GPU of this machine; unset it"),
        ("13.0", "No CUDA GPUs are available", "7", "CUDA_VISIBLE_DEVICES=7 names no GPU of this machine; unset it"),
        ("13.0", "CUDA unknown error\nmore", None, "sees no GPU (CUDA unknown error); see whether nvidia-smi does"),
    ],
)
def test_no_gpu(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, error: str, visible: str | None, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(error)))
    with pytest.raises(ConfigError, match=r"^--device cuda: .*; or use --device cpu$") as caught:
        device.probe_device("cuda", visible)
    assert says in str(caught.value)
    assert device.probe_device("auto", visible).kind == "cpu"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore", "cannot be opened (CUDA error: CUDA-"),
        ("CUDA error: out of memory", "see with nvidia-smi who uses it and its memory"),
        ("CUDA error: no kernel image is available", "has no kernels for V100 (compute capability 7.0)"),
    ],
)
def test_a_gpu_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, error: str, says: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", raising(RuntimeError(error)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    with pytest.raises(DeviceError, match=re.escape(says)) as caught:
        device.probe_device("auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cuda", "package"), [("12.9", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")])
def test_without_its_compiler_a_gpu_runs_plain_torch(monkeypatch: pytest.MonkeyPatch, cuda: str, package: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu, "nvrtc", lambda: None)
    assert f"libnvrtc of the package {package} is missing: steps run in plain torch" in gpu.why_not.__wrapped__()


# --- computing ------------------------------------------------------------------------------------------------------


def out_of_memory_in_a_capture() -> None:
    try:
        raise torch.OutOfMemoryError(TORCH_OOM)
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def out_of_memory_where_a_kernel_is_loaded() -> None:
    raise DeviceError("a kernel does not compile") from RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(
    ("compute", "asked"),
    [
        (raising(torch.OutOfMemoryError(TORCH_OOM)), ", 2.00 GiB were asked for in vain"),
        (raising(RuntimeError("Triton Error [CUDA]: out of memory")), ""),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), ""),
        (raising(OutOfMemoryError("launch failed on the GPU: out of memory")), ""),
        (out_of_memory_in_a_capture, ""),
        (out_of_memory_where_a_kernel_is_loaded, ""),
    ],
)
def test_out_of_memory(compute: Callable[[], None], asked: str) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        device.guard(compute, "in a step", "lower it")
    assert str(caught.value) == f"GPU memory ran out in a step{asked}; lower it"


def test_memory_is_released_when_nothing_holds_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []
    held: list[bool] = []

    def compute() -> None:
        activation = torch.zeros(3)
        tensors.append(weakref.ref(activation))
        raise torch.OutOfMemoryError(TORCH_OOM)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(tensors[0]() is not None))
    with pytest.raises(OutOfMemoryError):
        device.guard(compute, "in a step", "lower it")
    assert held == [False]


def test_a_lost_gpu_and_one_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError(ILLEGAL)))
    with pytest.raises(DeviceLostError, match=r"\(CUDA error: an illegal memory access was encountered\); only"):
        device.guard(raising(RuntimeError(ILLEGAL)), "in a step", "lower it")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        device.guard(raising(RuntimeError("CUDA error: invalid configuration argument")), "in a step", "lower it")


# --- the places where it is called ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "options", "says"),
    [
        ("pelton.models.llama.Llama.load", {}, r"while the model was loaded \(the weights need .* GiB were free\), "
         "2.00 GiB were asked for in vain; end other processes that use the GPU, or use a quantised checkpoint"),
        ("pelton.build.KVCache", {}, r"for the KV cache \(keys and values need .* lower --gpu-memory-utilization; "
         "--kv-cache-dtype fp8 or int8 and a lower --max-model-len"),
        ("pelton.build.KVCache", {"kv_cache_memory_bytes": 1 << 20}, "lower --kv-cache-memory-bytes;"),
        ("pelton.build.KVCache", {"num_gpu_blocks_override": 99}, "lower --num-gpu-blocks-override;"),
        ("pelton.runner.model_runner.BatchBuffers", {}, "while steps were captured, .*; use --enforce-eager, or lower "
         "--max-num-seqs or --gpu-memory-utilization"),
    ],
)
def test_what_does_not_fit_while_an_engine_is_built(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(place, raising(torch.OutOfMemoryError(TORCH_OOM)))
    with pytest.raises(OutOfMemoryError, match=says) as caught:
        build.build_engine(EngineArgs(str(tiny_model_path), load_format="dummy", **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [("tiny_model_path", {"load_format": "dummy"}, False),
     ("tiny_model_path", {"load_format": "dummy", "quantization": "gptq"}, True), ("smollm2_path", {}, True)],
)  # fmt: skip
def test_whether_weights_are_quantised(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any], expected: bool
) -> None:
    found: list[bool] = []

    def note(args: EngineArgs, facts: ModelFacts, *rest: object) -> None:
        found.append(facts.has_codes)
        raise ConfigError("that is all")

    monkeypatch.setattr(build, "resolve", note)
    with pytest.raises(ConfigError, match="that is all"):
        build.build_engine(EngineArgs(str(request.getfixturevalue(model)), **options))
    assert found == [expected]


def test_how_much_is_missing() -> None:
    assert build._need("the weights", 3 << 30, 1 << 29) == (
        "the weights need 3.00 GiB, 0.50 GiB were free, 2.50 GiB are missing"
    )


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"), DeviceError,
         r"could not be captured as CUDA graphs \(CUDA error: operation .*capturing\); use --enforce-eager"),
        (torch.OutOfMemoryError(TORCH_OOM), torch.OutOfMemoryError, "out of memory"),
        (DeviceError("libnvrtc is missing"), DeviceError, "^libnvrtc is missing$"),
    ],
)
def test_a_capture_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], says: str
) -> None:
    runner: Any = object.__new__(ModelRunner)
    runner.device, runner.model, runner.kv, runner._apart = torch.device("cuda"), None, None, False
    monkeypatch.setattr(gpu, "why_not", lambda: "")
    graphs = SimpleNamespace(note_order=lambda: None, capture=raising(error))
    monkeypatch.setattr(runner, "_compile", lambda: (graphs, graphs))
    with pytest.raises(kind, match=says):
        runner._capture(lazily=False)


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=3)
PENALISED = SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True, seed=3, frequency_penalty=0.5,
                           prompt_logprobs=1)


def test_steps_that_do_not_fit_change_no_output(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", enforce_eager=True)
    prompts = [[7 * i + k for k in range(3 + 5 * i)] for i in range(6)]
    params = [GREEDY, PENALISED] * 3
    expected = llm.generate(prompts, params, use_tqdm=False)
    model, most = llm._core.runner.model, 3
    forward, num_failed = model.forward, 0

    def limited(batch: Any) -> torch.Tensor:
        nonlocal num_failed
        if len(batch.token_ids) > most:
            num_failed += 1
            raise torch.OutOfMemoryError(TORCH_OOM)
        return forward(batch)

    monkeypatch.setattr(model, "forward", limited)
    found = llm.generate(prompts, params, use_tqdm=False)
    assert num_failed > 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert len(ours.prompt_logprobs or []) == len(theirs.prompt_logprobs or [])
    llm._core.scheduler.check()


def test_a_request_that_never_fits_is_told_what_would_help(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", enforce_eager=True)
    monkeypatch.setattr(llm._core.runner.model, "forward", raising(torch.OutOfMemoryError(TORCH_OOM)))
    (output,) = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert output.error == (
        "even alone this request does not fit: GPU memory ran out in a step, 2.00 GiB were asked for in vain; lower "
        "--gpu-memory-utilization, which leaves more to steps, or --max-num-batched-tokens"
    )


def test_a_lost_gpu_ends_an_llm(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_model_path), load_format="dummy", dtype="float32", enforce_eager=True)
    calls: list[StepPlan] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError(ILLEGAL)))
    monkeypatch.setattr(llm._core.runner.model, "forward", lambda batch: calls.append(batch) or raising(
        RuntimeError(ILLEGAL))())
    with pytest.raises(DeviceLostError):
        llm.generate([[1, 2, 3], [4, 5]], GREEDY, use_tqdm=False)
    assert len(calls) == 1  # it is not asked again, request by request
    with pytest.raises(EngineDeadError, match="start the program again$"):
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
