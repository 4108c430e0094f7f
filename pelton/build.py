"""From what was typed to a running engine. This is the one place that knows all the parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pelton import ops
from pelton.config import (
    GIB,
    EngineArgs,
    EngineConfig,
    Environment,
    KVLayer,
    ModelFacts,
    block_bytes,
    loaded_bytes,
    resolve,
)
from pelton.engine.core import EngineCore, Runner
from pelton.engine.host import Engine
from pelton.engine.messages import EngineInfo
from pelton.engine.scheduler import Scheduler
from pelton.errors import ConfigError, ModelNotFoundError
from pelton.layers.rope import context_length
from pelton.models import Model, find_model
from pelton.ops import gpu, native
from pelton.ops.parallel import ALONE, Ranks
from pelton.quant import CODED
from pelton.runner.device import free_memory, guard, least_of_all, probe_device, use_cpu
from pelton.runner.grammar import Grammars
from pelton.runner.kv_cache import KVCache
from pelton.runner.model_runner import ModelRunner
from pelton.text.tokenizer import load_tokenizer
from pelton.types import OnProgress
from pelton.weights import hub
from pelton.weights.checkpoint import Checkpoint, open_checkpoint
from pelton.weights.dummy import LAYOUTS, DummyCheckpoint
from pelton.weights.fields import Fields
from pelton.weights.files import NO_WEIGHTS, ModelFiles, bytes_in_memory, open_model, weight_bytes

MORE_FOR_WEIGHTS = "end other processes that use the GPU, or use a quantised checkpoint of the model"
LESS_CAPTURED = "use --enforce-eager, or lower --max-num-seqs or --gpu-memory-utilization"


def build_engine(args: EngineArgs, on_progress: OnProgress | None = None) -> Engine:
    """args -> files -> configuration -> checkpoint -> model -> runner -> engine.

    on_progress: called with (bytes done, bytes in all) of the weights. Raises a PeltonError that names what cannot
    work.
    """
    if args.tensor_parallel_size > 1:
        return _build_team(args, on_progress)
    config, runner = _build_runner(args, ALONE, on_progress)
    return _engine(config, runner, runner.why_eager)


def build_worker(args: EngineArgs, rank: int, folder: Path, meet: Callable[[], None]) -> ModelRunner:
    """The runner of a rank beside rank 0; an engine.worker.WorkerBuilder."""
    return _build_runner(args, Ranks(rank, args.tensor_parallel_size), None, folder, meet)[1]


def _build_team(args: EngineArgs, on_progress: OnProgress | None) -> Engine:
    """An engine whose model is shared by several ranks, of which this process is the first."""
    from pelton.engine.ranks import TeamRunner, Workers  # needs msgpack

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink, which not every host lets processes use
    ranks = Ranks(0, args.tensor_parallel_size)
    config_json = open_model(_find(args)).config
    find_model(config_json).kv_layers(config_json, ranks)  # what cannot be is told before any process is started
    probe_device(args.device, Environment.read().cuda_visible_devices, ranks)
    workers = Workers("pelton.build:build_worker", args)
    workers.on_lost(ranks.abort)
    with workers.building():
        config, runner = _build_runner(args, ranks, on_progress, Path(workers.folder), workers.wait)
    config = replace(config, notes=(*config.notes, f"{ranks.size} ranks share the model"))
    return _engine(config, TeamRunner(runner, workers), runner.why_eager)


def _build_runner(
    args: EngineArgs, ranks: Ranks, on_progress: OnProgress | None, folder: Path = Path(),
    meet: Callable[[], None] = lambda: None,
) -> tuple[EngineConfig, ModelRunner]:
    """One rank's share of the model and its KV cache. meet: waits until all ranks are there; folder: where they find
    each other."""
    path = _find(args)
    files = open_model(path)
    if files.format == "none" and args.load_format != "dummy":
        raise ModelNotFoundError(f"{path} holds no weights: {NO_WEIGHTS}; for random ones use --load-format dummy")
    if args.load_format not in ("auto", "dummy", files.format):
        raise ConfigError(f"--load-format {args.load_format}: {args.model} is {files.format}; leave the flag out")
    is_dummy_layout = args.load_format == "dummy" and args.quantization in LAYOUTS
    if args.quantization not in (None, "auto", "none", files.format) and not is_dummy_layout:
        raise ConfigError(
            f"--quantization {args.quantization}: {args.model} is not stored so, and this version does not quantise "
            "while loading; leave the flag out, or use a checkpoint in that format"
        )

    architecture = find_model(files.config)
    kv_layers = architecture.kv_layers(files.config, ranks)
    facts = ModelFacts(
        files.config["torch_dtype"], context_length(files.config), kv_layers, _weight_bytes(architecture, files, ranks),
        *_work_sizes(files, kv_layers, ranks),
        has_codes=is_dummy_layout or any(tensor.type.name in CODED for tensor in files.tensors.values()),
    )
    env = Environment.read()
    machine = probe_device(args.device, env.cuda_visible_devices, ranks)
    if ranks.size > 1:
        meet()
        ranks.connect(folder, machine.kind, not args.disable_custom_all_reduce)
        machine = probe_device(args.device, env.cuda_visible_devices, ranks)  # what is free beside the connections
        machine = least_of_all(machine, ranks)
        binding = env.cpu_binding.split("|")
        if len(binding) == ranks.size:
            env = replace(env, cpu_binding=binding[ranks.rank])
    config = resolve(args, facts, machine, env)

    if config.device.kind == "cpu":
        config = replace(config, notes=(*config.notes, use_cpu(config.device, env.cpu_isa)))
    need = _need("the weights", loaded_bytes(facts, config.model.dtype, machine), machine.free_bytes)
    checkpoint = _open_checkpoint(args, files, config, on_progress, ranks)
    model = guard(lambda: architecture.load(checkpoint), f"while the model was loaded ({need})", MORE_FOR_WEIGHTS)
    checkpoint.finish()

    kv = _make_cache(args, config, kv_layers)
    grammars = Grammars(lambda: load_tokenizer(open_model(path), args.tokenizer))  # opened again: files are large
    meet()
    runner = guard(lambda: ModelRunner(model, kv, config, grammars, ranks), "while steps were captured", LESS_CAPTURED)
    return config, runner


def _find(args: EngineArgs) -> Path:
    return hub.resolve(args.model, hub=args.hub, revision=args.revision, download_dir=args.download_dir)


def _engine(config: EngineConfig, runner: Runner, why_eager: str) -> Engine:
    scheduler = Scheduler(config.scheduler, config.cache)
    return Engine(EngineCore(scheduler, runner), _info(config, why_eager))


def _need(what: str, need: int, free: int) -> str:
    """What did not fit."""
    missing = f", {(need - free) / GIB:.2f} GiB are missing" if need > free else ""
    return f"{what} need {need / GIB:.2f} GiB, {free / GIB:.2f} GiB were free{missing}"


def _make_cache(args: EngineArgs, config: EngineConfig, kv_layers: list[KVLayer]) -> KVCache:
    cache, kind = config.cache, config.device.kind
    size = cache.num_blocks * block_bytes(cache.block_size, kv_layers, cache.dtype)
    flag = "--gpu-memory-utilization"
    if args.num_gpu_blocks_override:
        flag = "--num-gpu-blocks-override"
    elif args.kv_cache_memory_bytes:
        flag = "--kv-cache-memory-bytes"
    remedy = f"lower {flag}; --kv-cache-dtype fp8 or int8 and a lower --max-model-len let less memory suffice"
    doing = f"for the KV cache ({_need('keys and values', size, free_memory(kind))})"
    return guard(lambda: KVCache(cache, kv_layers, torch.device(kind)), doing, remedy)


def _open_checkpoint(
    args: EngineArgs, files: ModelFiles, config: EngineConfig, on_progress: OnProgress | None, ranks: Ranks
) -> Checkpoint:
    device, dtype = torch.device(config.device.kind), getattr(torch, config.model.dtype)
    activations, deterministic = config.device.activations, config.device.deterministic
    if args.load_format == "dummy":
        layout = args.quantization if args.quantization in LAYOUTS else None
        return DummyCheckpoint(
            files.config, dtype, device, args.seed, activations=activations, layout=layout, ranks=ranks,
            deterministic=deterministic,
        )
    return open_checkpoint(files, dtype, device, on_progress, activations, ranks, deterministic)


def _weight_bytes(architecture: type[Model], files: ModelFiles, ranks: Ranks) -> dict[str, int]:
    """The memory that a rank's weights take at most, see `weight_bytes`: its share, and the embedding."""
    sizes = weight_bytes(files) if files.weights else bytes_in_memory(_count_weights(architecture, files))
    if ranks.size == 1:
        return sizes
    fields = Fields(files.config)
    embedding = bytes_in_memory(fields.int("hidden_size", low=1) * fields.int("vocab_size", low=1))
    return {dtype: size // ranks.size + embedding[dtype] for dtype, size in sizes.items()}


def _count_weights(architecture: type[Model], files: ModelFiles) -> int:
    """Of a model of which there is only a config.json: it is built without memory."""
    checkpoint = DummyCheckpoint(files.config, torch.float32, torch.device("meta"))
    architecture.load(checkpoint)
    return checkpoint.num_weights


def _work_sizes(files: ModelFiles, kv_layers: Sequence[KVLayer], ranks: Ranks) -> tuple[int, int, int]:
    """Numbers that a rank's forward pass holds at once for each token, the vocabulary's size, and the largest weight's.

    For each token: the residual stream and what is normalised and added to it, the heads and what attention makes of
    them, the feed-forward layer's halves and their product.
    """
    fields = Fields(files.config)
    heads = fields.int("num_attention_heads", 8, low=1) // ranks.size
    attention = max((2 * heads + 2 * layer.num_kv_heads) * layer.head_size for layer in kv_layers)
    hidden = fields.int("hidden_size", low=1)
    inner, vocab_size = fields.int("intermediate_size", 4 * hidden, low=1), fields.int("vocab_size", low=1)
    inner //= ranks.size
    return 4 * hidden + attention + 3 * inner, vocab_size, hidden * max(vocab_size, 2 * inner)


def _info(config: EngineConfig, why_eager: str) -> EngineInfo:
    cache, kernels = config.cache, ops.describe(config.device.kind)
    why_none = native.reason if config.device.kind == "cpu" else gpu.why_not()
    return EngineInfo(
        max_model_len=config.model.max_model_len,
        num_kv_tokens=(cache.num_blocks - 1) // len(cache.groups) * cache.block_size,
        kernels=kernels or "none, plain torch",
        notes=config.notes,
        warnings=(*config.warnings, *(line for line in ("" if kernels else why_none, why_eager) if line)),
    )
