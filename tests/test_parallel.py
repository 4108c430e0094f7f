"""`tensor_parallel_size` through the doors: the text that one process gives, and nothing left when a rank is lost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pelton import LLM, AsyncLLM, ConfigError, EngineDeadError, SamplingParams
from pelton.config import EngineArgs
from pelton.engine import ranks
from pelton.types import StructuredOutputsParams

PROMPTS = ["one", "two and more", "three " * 20]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True),
]
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 128}
NUM_GPUS = torch.cuda.device_count()


@pytest.fixture
def model(tiny_model_path: Path, tmp_path: Path) -> Any:
    """The folder of a small model of an architecture, for load_format="dummy"."""

    def make(architecture: str) -> Path:
        folder = tmp_path / architecture
        shutil.copytree(tiny_model_path, folder)
        config = json.loads((folder / "config.json").read_text())
        fields = {**SHAPE, "architectures": [architecture], "sliding_window": 24, "model_type": "any"}
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return make


def load(path: Path, size: int, **options: Any) -> LLM:
    options = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "max_num_seqs": 4, **options}
    return LLM(str(path), tensor_parallel_size=size, **options)


def token_ids(llm: LLM) -> list[list[int]]:
    return [
        list(output.outputs[0].token_ids)
        for params in PARAMS for output in llm.generate(PROMPTS, params, use_tqdm=False)
    ]  # fmt: skip


def pids_of(llm: LLM) -> list[int]:
    return llm._core.runner.workers.pids  # type: ignore[attr-defined,no-any-return]


def are_gone(pids: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("LlamaForCausalLM", None), ("Qwen2ForCausalLM", "gptq"), ("Gemma3ForCausalLM", "gguf")],
)
def test_two_processes_give_the_text_of_one(model: Any, architecture: str, layout: str | None) -> None:
    path = model(architecture)
    llm = load(path, 2, quantization=layout)
    assert "cannot be recorded" in llm.info.warnings[0]
    assert token_ids(llm) == token_ids(load(path, 1, quantization=layout))
    pids = pids_of(llm)
    del llm
    assert are_gone(pids)


@pytest.mark.slow
def test_a_file_is_shared_too(gemma3_path: Path) -> None:
    """Gemma 3 270M in Q4_K_M, whose one key head both ranks keep."""
    options = {"load_format": "auto", "max_model_len": 128, "cpu_activations": "fp32", "num_threads": 1}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = [
        [o.outputs[0].text for o in load(gemma3_path, size, **options).generate(["The sky is"], params, use_tqdm=False)]
        for size in (1, 2)
    ]
    assert texts[0] == texts[1]


def test_constraints_are_kept(tiny_model_path: Path) -> None:
    llm = load(tiny_model_path, 2)
    params = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[ab]{5}"), seed=1)
    (output,) = llm.generate("x", params, use_tqdm=False)
    assert len(output.outputs[0].text) == 5 and set(output.outputs[0].text) <= {"a", "b"}


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_rank_that_dies_ends_the_llm(tiny_model_path: Path, is_idle: bool) -> None:
    llm = load(tiny_model_path, 2)
    pids = pids_of(llm)
    if is_idle:
        os.kill(pids[0], signal.SIGKILL)
    else:
        threading.Timer(0.2, os.kill, (pids[0], signal.SIGKILL)).start()
    with pytest.raises(EngineDeadError, match="rank 1's process was killed by signal 9") as died:
        for _ in range(50):
            llm.generate(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert "\n" not in str(died.value) and are_gone(pids)
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate("x", use_tqdm=False)


def test_rank_0_that_runs_out_of_memory_alone_ends_the_llm(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for it in the middle of the step."""
    llm = load(tiny_model_path, 2)
    pids = pids_of(llm)

    def fail(hidden: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ranks, "ANSWER_S", 0.5)
    monkeypatch.setattr(llm._core.runner.runner.model, "logits", fail)  # type: ignore[attr-defined]
    message = "^rank 0 failed where rank 1 did not: OutOfMemoryError: GPU memory ran out in a step, 2.00 GiB .*; lower"
    with pytest.raises(EngineDeadError, match=message) as died:
        llm.generate(PROMPTS, use_tqdm=False)
    assert "\n" not in str(died.value) and are_gone(pids)
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate("x", use_tqdm=False)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "--tensor-parallel-size 3: the model's 4 heads and 2 .* use one of 1, 2, 4"),
        (1_000_000, "use one of 1, 2, 4"),
    ],
)
def test_a_size_that_the_model_has_not(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, message: str
) -> None:
    """Is refused before a process is started."""
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match=message) as refused:
        load(tiny_model_path, size)
    assert "\n" not in str(refused.value)


def test_more_ranks_than_gpus(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2: torch sees 1 GPU; use 1, or name more in CUDA_"):
        load(tiny_model_path, 2, device="cuda")


@pytest.mark.slow
def test_the_servers_engine_is_started_again(tiny_model_path: Path) -> None:
    """The engine's child has a child of its own: both are replaced, and both are gone in the end."""

    def ranks_of(engine: int) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{engine}/task/{engine}/children").read_text().split()]

    async def test() -> None:
        args = EngineArgs(
            str(tiny_model_path), load_format="dummy", dtype="float32", device="cpu", tensor_parallel_size=2
        )
        llm = await AsyncLLM.start(args)
        try:
            engine: int = llm._client.pid  # type: ignore[attr-defined]
            ranks = ranks_of(engine)
            assert len(ranks) == 1
            os.kill(ranks[0], signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                async for _ in llm.generate("x", SamplingParams(max_tokens=200, ignore_eos=True)):
                    pass
            async with asyncio.timeout(30):
                while not llm.is_ready:
                    await asyncio.sleep(0.05)
            outputs = [output async for output in llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))]
            assert len(outputs[-1].outputs[0].token_ids) == 3
            ranks = ranks_of(llm._client.pid)  # type: ignore[attr-defined]
        finally:
            await llm.shutdown()
        async with asyncio.timeout(5):
            while not are_gone([engine, *ranks]):
                await asyncio.sleep(0.02)

    asyncio.run(test())


# --- on GPUs ----------------------------------------------------------------------------------------------------------

two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("mode", [{}, {"lazy_capture": True}, {"enforce_eager": True}], ids=str)
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("LlamaForCausalLM", None), ("Qwen2ForCausalLM", "gptq"), ("Gemma3ForCausalLM", "gguf")],
)
def test_two_gpus_give_the_text_of_one(
    model: Any, architecture: str, layout: str | None, mode: dict[str, bool]
) -> None:
    """In float32, steps captured, at start or when they are needed, begun ahead and eager."""
    path = model(architecture)
    options = {"device": "cuda", "quantization": layout, "gpu_memory_utilization": 0.3, **mode}
    found = token_ids(load(path, 2, **options))
    assert found == token_ids(load(path, 1, **options))


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(
    ("layout", "mean", "most"), [("gptq", 0.03, 0.2), ("fp8", 0.03, 0.2), ("w8a8", 0.06, 0.25)]
)
def test_two_gpus_in_bfloat16(model: Any, layout: str, mean: float, most: float) -> None:
    """Log-probabilities of a prompt, which are about -5.5, as near to one GPU's as rounding allows."""
    path, scores = model("LlamaForCausalLM"), []
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0)
    for size in (1, 2):
        llm = load(path, size, device="cuda", dtype="bfloat16", quantization=layout, gpu_memory_utilization=0.3)
        (output,) = llm.generate(PROMPTS[2], params, use_tqdm=False)
        entries = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs or [] if entry]
        scores.append(torch.tensor(entries))
        del llm
    off = (scores[0] - scores[1]).abs()
    assert off.mean() < mean and off.max() < most


@pytest.mark.gpu
@two_gpus
def test_a_gpus_rank_that_dies_ends_the_llm(tiny_model_path: Path) -> None:
    llm = load(tiny_model_path, 2, device="cuda", gpu_memory_utilization=0.3)
    pids = pids_of(llm)
    threading.Timer(0.2, os.kill, (pids[0], signal.SIGKILL)).start()
    with pytest.raises(EngineDeadError, match="rank 1's process was killed by signal 9"):
        for _ in range(200):
            llm.generate(PROMPTS, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert are_gone(pids)
