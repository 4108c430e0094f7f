"""Every "auto" is decided from the model and the machine, and what cannot work is refused with figures."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pelton.config import (
    GIB,
    DeviceFacts,
    EngineArgs,
    EngineConfig,
    Environment,
    KVLayer,
    ModelFacts,
    blocks_for,
    make_groups,
    resolve,
)
from pelton.errors import ConfigError

CPU = DeviceFacts("cpu", "a CPU", free_bytes=16 * GIB, has_fast_bf16=True, num_cores=4)
LAYERS = [KVLayer(None, 4, 64)] * 8
WEIGHTS = {"float32": 4 * GIB, "bfloat16": 2 * GIB, "float16": 2 * GIB}
MODEL = ModelFacts("bfloat16", 1024, LAYERS, WEIGHTS)


def decide(args: dict[str, Any] | None = None, model: ModelFacts = MODEL, device: DeviceFacts = CPU,
           env: Environment | None = None) -> EngineConfig:
    return resolve(EngineArgs(**(args or {})), model, device, env or Environment())


@pytest.mark.parametrize(
    ("trained", "fast", "kind", "dtype"),
    [
        ("bfloat16", True, "cpu", "bfloat16"),
        ("float16", True, "cpu", "bfloat16"),
        ("float16", True, "cuda", "float16"),
        ("float32", True, "cpu", "bfloat16"),
        ("bfloat16", False, "cpu", "float32"),
        ("bfloat16", False, "cuda", "float32"),
    ],
)
def test_dtype(trained: str, fast: bool, kind: str, dtype: str) -> None:
    config = decide(model=replace(MODEL, dtype=trained), device=replace(CPU, kind=kind, has_fast_bf16=fast))
    assert config.model.dtype == dtype
    assert any(dtype in note for note in config.notes)


def test_dtype_as_asked() -> None:
    assert decide({"dtype": "half"}).model.dtype == "float16"


def test_context_length() -> None:
    assert decide().model.max_model_len == 1024
    assert decide({"max_model_len": 100}).model.max_model_len == 100
    with pytest.raises(ConfigError, match="use 1024 or less"):
        decide({"max_model_len": 1025})


def test_context_that_the_memory_cannot_hold() -> None:
    block_bytes = 16 * 2 * 4 * 64 * 2 * 8
    small = {"kv_cache_memory_bytes": 21 * block_bytes}
    config = decide(small)
    assert config.model.max_model_len == 320  # 20 blocks of 16 tokens beside the null block
    (warning,) = config.warnings
    assert warning.startswith("max_model_len 320 instead of 1024: ")
    with pytest.raises(ConfigError, match="--max-model-len 320"):
        decide({**small, "max_model_len": 321})
    assert decide({**small, "max_model_len": 320}).cache.num_blocks == 21


def test_cache_is_no_larger_than_its_use() -> None:
    assert decide({"max_num_seqs": 2}).cache.num_blocks == 1 + 2 * (1024 // 16 + 1)


def test_groups_are_of_one_size() -> None:
    gemma = [KVLayer(None if i % 6 == 5 else 512, 1, 256) for i in range(18)]
    groups = make_groups(gemma)
    assert [group.window for group in groups] == [None, 512, 512, 512, 512, 512]
    assert {len(group.layer_ids) for group in groups} == {3}
    assert sorted(i for group in groups for i in group.layer_ids) == list(range(18))
    assert blocks_for(4000, 16, groups, chunk=100) == 250 + 5 * -(-(511 + 100 + 16) // 16)


def test_environment() -> None:
    env = Environment.read({"VLLM_USE_MODELSCOPE": "True", "VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "3,1"})
    assert env.use_modelscope and env.cpu_kv_cache_bytes == 2 * GIB and env.num_threads == 3
    assert all(Environment.read({"VLLM_USE_MODELSCOPE": value}).use_modelscope for value in ("1", "true", "True"))
    assert not Environment.read({"VLLM_USE_MODELSCOPE": "0"}).use_modelscope
    assert Environment.read({"VLLM_CPU_KVCACHE_SPACE": "0"}).cpu_kv_cache_bytes is None
    assert decide(env=env).device.num_threads == 3


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("VLLM_CPU_KVCACHE_SPACE", "4096", "for 4096 MB write 4"),
        ("VLLM_CPU_KVCACHE_SPACE", "-1", "GiB"),
        ("VLLM_CPU_KVCACHE_SPACE", "lots", "GiB"),
        ("OMP_NUM_THREADS", "0", "OMP_NUM_THREADS"),
        ("OMP_NUM_THREADS", "many", "OMP_NUM_THREADS"),
    ],
)
def test_environment_that_cannot_work(name: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        Environment.read({name: value})


def test_cache_space_beyond_the_memory() -> None:
    with pytest.raises(ConfigError, match=r"100\.0 GiB, but only 14\.0 GiB"):
        decide(env=Environment(cpu_kv_cache_bytes=100 * GIB))


def test_weights_beyond_the_memory() -> None:
    with pytest.raises(ConfigError, match=r"weights need 2\.0 GiB and a CPU has 1\.0 GiB"):
        decide(device=replace(CPU, free_bytes=GIB))


@pytest.mark.parametrize(
    "args",
    [{"dtype": "int3"}, {"device": "tpu"}, {"tensor_parallel_size": "2"}, {"block_size": 12}, {"block_size": 0},
     {"kv_cache_dtype": "fp4"}, {"cpu_activations": "int4"},
     {"gpu_memory_utilization": 0.0}, {"max_num_seqs": 0}, {"max_model_len": -5}, {"max_model_len": "128"}],
)
def test_arguments_that_cannot_work(args: dict[str, Any]) -> None:
    name = next(iter(args))
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        EngineArgs(**args)


@pytest.mark.parametrize(
    "args",
    [{"max_logprobs": -2}, {"seed": "1"}, {"block_size": True}, {"enforce_eager": 1}, {"gpu_memory_utilization": "1"},
     {"gpu_memory_utilization": float("nan")}, {"tensor_parallel_size": 0}, {"model": 3}, {"dtype": ["half"]}],
)
def test_arguments_of_the_wrong_type(args: dict[str, Any]) -> None:
    test_arguments_that_cannot_work(args)


def test_none_stands_for_the_default() -> None:
    names = [field.name for field in fields(EngineArgs)]
    assert EngineArgs(**dict.fromkeys(names)) == EngineArgs()


def test_arguments_in_other_forms() -> None:
    """A path, one served name, a dtype of torch."""
    args = EngineArgs(Path("a/b"), served_model_name="name", dtype=torch.float16)  # type: ignore[arg-type]
    assert (args.model, args.served_model_name, args.dtype) == ("a/b", ["name"], "float16")


def test_no_seed_is_the_default_seed() -> None:
    """vLLM's LLM takes seed=None."""
    assert decide({"seed": None}).device.seed == EngineArgs.seed


def test_keys_and_values_are_kept_as_asked() -> None:
    assert decide().cache.dtype == "bfloat16"
    assert decide({"kv_cache_dtype": "half"}).cache.dtype == "float16"
    small, large = (
        decide({"kv_cache_dtype": dtype, "kv_cache_memory_bytes": GIB >> 6}).cache.num_blocks
        for dtype in ("bfloat16", "int8")
    )
    assert small < large < 2 * small  # int8 has a scale for each head and token


@pytest.mark.parametrize(
    ("args", "activations"),
    [({}, "int8"), ({"dtype": "bfloat16"}, "int8"), ({"dtype": "float32"}, "fp32"),
     ({"cpu_activations": "bf16"}, "bf16"), ({"cpu_activations": "int8", "dtype": "float32"}, "int8")],
)  # fmt: skip
def test_activations(args: dict[str, Any], activations: str) -> None:
    assert decide(args).device.activations == activations


def test_deterministic_where_kernels_are() -> None:
    """On a CPU the flag changes nothing; elsewhere it is refused where it could not be kept."""
    model = replace(MODEL, weight_bytes={**WEIGHTS, "stored": GIB // 2})
    gpu = replace(CPU, kind="cuda", name="a GPU", keeps_formats=True)
    for device, expected in ((replace(CPU, keeps_formats=True), False), (gpu, True)):
        config = decide({"deterministic": True}, model=model, device=device)
        assert config.device.deterministic == config.scheduler.deterministic == expected
        assert not config.device.apart
        config = decide({"deterministic": True}, model=replace(model, has_codes=True), device=device)
        assert config.device.apart == expected
    assert not decide(model=model, device=gpu).device.deterministic
    assert not decide(model=replace(model, has_codes=True), device=gpu).device.apart
    with pytest.raises(ConfigError, match="--deterministic: on a CPU pelton computes in plain torch"):
        decide({"deterministic": True})
    with pytest.raises(ConfigError, match="--max-num-batched-tokens must be more than 16, got 16"):
        decide({"deterministic": True, "max_num_batched_tokens": 16}, model=model, device=gpu)
    assert decide({"deterministic": True, "tensor_parallel_size": 2}, model=model, device=gpu).device.deterministic
    with pytest.raises(ConfigError, match="--deterministic: in which order 4 ranks .*-parallel-size 1 or 2$"):
        decide({"deterministic": True, "tensor_parallel_size": 4}, model=model, device=gpu)


def test_formats_are_kept_where_kernels_read_them() -> None:
    """Memory is counted as the file's, and bfloat16 needs no instructions of its own."""
    model = replace(MODEL, weight_bytes={**WEIGHTS, "stored": GIB // 2})
    device = replace(CPU, free_bytes=GIB, has_fast_bf16=False, keeps_formats=True)
    assert decide(model=model, device=device).model.dtype == "bfloat16"


def test_threads_and_processors() -> None:
    device = replace(CPU, cpus=(0, 2, 4, 6))
    assert decide(device=device).device.cpus == (0, 2, 4, 6)
    assert decide({"num_threads": 3}, device=device).device.cpus == ()  # others may want the same processors
    config = decide(device=device, env=Environment(cpu_binding="4,0|2,6"))
    assert (config.device.num_threads, config.device.cpus) == (2, (4, 0))
    config = decide(device=device, env=Environment(cpu_binding="all", num_threads=3))
    assert (config.device.num_threads, config.device.cpus) == (3, (0, 2, 4))
    assert decide(device=device, env=Environment(cpu_binding="nobind")).device.cpus == ()
    many = replace(CPU, num_cores=16, cpus=tuple(range(16)))
    assert decide(device=many).device.num_threads == 15  # one is left to the server


@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        ({"num_threads": 5}, {}, "--num-threads asks for 5 threads, but this process has 4 cores"),
        ({}, {"num_threads": 64}, "OMP_NUM_THREADS asks for 64 threads, but this process has 4 cores"),
        ({}, {"cpu_binding": "0-9"}, "processor 4 is not one this process may run on; those are 0, 1, 2, 3"),
        ({}, {"cpu_binding": "3-1"}, "is not a list of processors"),
        ({}, {"cpu_binding": "cores"}, "is not a list of processors"),
        ({"kv_cache_memory_bytes": 100 * GIB}, {}, r"--kv-cache-memory-bytes asks for 100.0 GiB, but only 14.0 GiB"),
    ],
)
def test_a_machine_that_cannot(args: dict[str, Any], env: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        decide(args, device=replace(CPU, cpus=(0, 1, 2, 3)), env=Environment(**env))


GPU = DeviceFacts("cuda", "a GPU", free_bytes=12 * GIB, has_fast_bf16=True, num_cores=4, keeps_formats=True)
BIG = replace(
    MODEL, weight_bytes={**WEIGHTS, "stored": GIB}, token_numbers=100_000, vocab_size=1 << 17, largest_weight=1 << 27
)


@pytest.mark.parametrize(("dtype", "weights"), [("bfloat16", int(1.1 * GIB)), ("float32", 4 * GIB)])
def test_the_cache_of_a_gpu(dtype: str, weights: int) -> None:
    config = decide({"dtype": dtype, "max_num_seqs": 1000}, BIG, GPU)
    size = 4 if dtype == "float32" else 2
    work = (8192 + 1024) * 100_000 * size + 16 * 1000 * (1 << 17) + GIB // 2
    if dtype == "bfloat16":
        work += 4 * (1 << 27)  # a quantised weight, opened
    assert config.cache.block_size == 64
    assert config.cache.num_blocks == int(0.9 * 12 * GIB - weights - work) // (64 * 2 * 4 * 64 * size * 8)


def test_a_gpu_that_is_too_small_says_what_would_fit() -> None:
    message = "weights need 1.1 GiB and a step .* of 4.0 GiB .* 90% .*: 2.. GiB are missing; .*max-num-batched-tokens"
    with pytest.raises(ConfigError, match=message):
        decide({"max_num_seqs": 1000}, BIG, replace(GPU, free_bytes=4 * GIB))


def test_float8_for_keys_and_values() -> None:
    big = decide({"kv_cache_dtype": "fp8_e4m3", "kv_cache_memory_bytes": GIB >> 3}, BIG, replace(GPU, has_float8=True))
    half = decide({"kv_cache_memory_bytes": GIB >> 3}, BIG, GPU)
    assert (big.cache.dtype, big.cache.num_blocks) == ("float8_e4m3fn", 2 * half.cache.num_blocks)
    with pytest.raises(ConfigError, match="--kv-cache-dtype fp8: a GPU does not convert it; .* Use int8"):
        decide({"kv_cache_dtype": "fp8"}, BIG, GPU)


def test_a_context_that_does_not_fit_says_what_would_help() -> None:
    for device, flags in (
        (CPU, r"--kv-cache-dtype int8, .* \(--kv-cache-memory-bytes\)"),
        (replace(GPU, has_float8=True), r"--kv-cache-dtype fp8, .* \(--gpu-memory-utilization\)"),
    ):
        with pytest.raises(ConfigError, match=f"use --max-model-len 64 or {flags}"):
            args = {"num_gpu_blocks_override": 2, "max_model_len": 300, "block_size": 64}
            decide(args, MODEL, device)
