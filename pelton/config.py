"""What was typed (EngineArgs, "auto" allowed) becomes what is run (EngineConfig: frozen parts, nothing None).

`resolve()` is the only place where defaults meet the model and the machine, and `Environment.read()` the only
place where environment variables are read. Both explain each choice in a line that is printed at start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pelton.errors import ConfigError

GIB = 1 << 30
LIBRARY_BYTES = GIB // 2  # what CUDA's libraries and split sums take at most
TILES_OVER_FILE = 1.1  # quantised weights on a GPU, whose sub-scales take whole bytes
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_NAMES = {"auto": "auto", "half": "float16", "float": "float32", **{name: name for name in DTYPE_BYTES}}
FP8 = "float8_e4m3fn"
KV_BYTES = {**DTYPE_BYTES, FP8: 1}
KV_DTYPES = ("auto", *DTYPE_BYTES, "int8", "fp8")
ACTIVATIONS = ("auto", "int8", "bf16", "fp32")
DEFAULT_MODEL = "smollm2-135m-instruct"
CAPTURED_TOKENS = 1024  # of a step with prompts, at most: a GPU is busy with more for longer than it takes to launch it
FEW_TOKENS = 8  # of a request in a step, which a GPU computes as that many decodes, and not as a chunk
KINDS: dict[str, tuple[Any, str]] = {  # of an option, by its annotation
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a text"),
}
LEAST = {"seed": -(1 << 63), "max_logprobs": -1}  # the least value of an integer option; of all others it is 1


# --- what was typed -----------------------------------------------------------------------------------------------


@dataclass
class EngineArgs:
    """The engine's options under vLLM's names; None and "auto" are decided by `resolve()`.

    Where an option cannot be None, None stands for its default, as in vLLM.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    served_model_name: Sequence[str] | None = None
    hub: str = "auto"  # "auto", "hf", "modelscope"
    revision: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"  # "auto", "safetensors", "gguf", "dummy"
    quantization: str | None = None  # only to say what the checkpoint is anyway; pelton reads it from there
    dtype: str = "auto"
    max_model_len: int | None = None
    device: str = "auto"  # "auto", "cpu", "cuda"
    tensor_parallel_size: int = 1  # ranks that share the model, each on a device of its own
    disable_custom_all_reduce: bool = False  # GPUs that share the model sum by NCCL alone
    trust_remote_code: bool = False  # accepted; no code of a checkpoint is ever run
    enforce_eager: bool = False  # compute each step op by op instead of replaying it
    lazy_capture: bool = False  # on a GPU: capture each size of step when it is first needed, instead of at start
    seed: int = 0
    generation_config: str = "auto"  # "auto": the checkpoint's sampling defaults; "vllm": none; or a directory
    chat_template: str | None = None
    max_logprobs: int = 20
    block_size: int | None = None  # 16 on a CPU, 64 on a GPU
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_waiting: int | None = None  # requests in the queue; more are refused
    gpu_memory_utilization: float = 0.9  # of the memory that is free
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    num_threads: int | None = None
    kv_cache_dtype: str = "auto"  # "auto": the compute dtype; one of KV_DTYPES
    cpu_activations: str = "auto"  # what products with quantised weights round their input to: ACTIVATIONS
    deterministic: bool = False  # on a GPU: answers do not depend on what is computed beside them; on a CPU never do

    def __post_init__(self) -> None:
        if self.dtype is not None:
            self.dtype = str(self.dtype).removeprefix("torch.")
        if isinstance(self.served_model_name, str):
            self.served_model_name = [self.served_model_name]
        for option in fields(self):
            self._check_type(option.name, str(option.type).removesuffix(" | None"), option.default)
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"--dtype {self.dtype} is unknown; choose one of {', '.join(DTYPE_NAMES)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device {self.device} is unknown; choose auto, cpu or cuda")
        names = {**DTYPE_NAMES, "fp8_e4m3": "fp8"}
        self.kv_cache_dtype = names.get(self.kv_cache_dtype, self.kv_cache_dtype)
        if self.kv_cache_dtype not in KV_DTYPES:
            raise ConfigError(
                f"--kv-cache-dtype {self.kv_cache_dtype} is unknown; choose one of {', '.join(KV_DTYPES)}"
            )
        if self.cpu_activations not in ACTIVATIONS:
            raise ConfigError(
                f"--cpu-activations {self.cpu_activations} is unknown; choose one of {', '.join(ACTIVATIONS)}"
            )
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size must be a power of two, got {self.block_size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], got {self.gpu_memory_utilization}")

    def _check_type(self, name: str, kind: str, default: Any) -> None:
        """None becomes the default, a path its text; numbers must be numbers, and not below the least."""
        value: Any = getattr(self, name)
        flag = f"--{name.replace('_', '-')}"
        if value is None or isinstance(value, os.PathLike):
            value = default if value is None else os.fspath(value)
            setattr(self, name, value)
        if value is None or kind not in KINDS:
            return
        types, described = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{flag} must be {described}, got {value!r}")
        if kind == "int" and value < LEAST.get(name, 1):
            raise ConfigError(f"{flag} must be at least {LEAST.get(name, 1)}, got {value}")


@dataclass(frozen=True)
class Environment:
    """The environment variables pelton reads, parsed. See `read()`."""

    use_modelscope: bool = False  # VLLM_USE_MODELSCOPE
    api_key: str | None = None  # VLLM_API_KEY
    cpu_kv_cache_bytes: int | None = None  # VLLM_CPU_KVCACHE_SPACE, GiB
    num_threads: int | None = None  # OMP_NUM_THREADS
    cpu_binding: str = "auto"  # VLLM_CPU_OMP_THREADS_BIND: processors as "0-3,8", "auto", "nobind"
    cpu_isa: str | None = None  # PELTON_CPU_ISA: an instruction set below the processor's best
    cache_dir: str | None = None  # PELTON_CACHE
    log_level: str = "INFO"  # VLLM_LOGGING_LEVEL
    cuda_visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES, which torch reads: for what is said of it
    uv_index_urls: tuple[str, ...] = ()  # UV_INDEX, UV_EXTRA_INDEX_URL, UV_DEFAULT_INDEX, UV_INDEX_URL; pip reads PIP_*

    @staticmethod
    def read(environ: Mapping[str, str] | None = None) -> Environment:
        """Parse `environ` (default: the process's); ConfigError names a variable that cannot work."""
        environ = os.environ if environ is None else environ
        threads = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if threads and not (threads.isdigit() and int(threads) > 0):
            raise ConfigError(f"OMP_NUM_THREADS={threads} is not a number of threads; unset it or use 1, 2, ...")
        return Environment(
            use_modelscope=environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true", "yes", "on"),
            api_key=environ.get("VLLM_API_KEY") or None,
            cpu_kv_cache_bytes=_parse_kv_space(environ.get("VLLM_CPU_KVCACHE_SPACE", "")),
            num_threads=int(threads) if threads else None,
            cpu_binding=environ.get("VLLM_CPU_OMP_THREADS_BIND", "").strip() or "auto",
            cpu_isa=environ.get("PELTON_CPU_ISA", "").strip().lower() or None,
            cache_dir=environ.get("PELTON_CACHE") or None,
            log_level=environ.get("VLLM_LOGGING_LEVEL", "INFO").upper(),
            cuda_visible_devices=environ.get("CUDA_VISIBLE_DEVICES"),
            uv_index_urls=tuple(
                url.partition("=")[2] if "://" in url.partition("=")[2] else url  # "name=url"
                for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
                for url in environ.get(name, "").split()
            ),
        )


def _parse_kv_space(text: str) -> int | None:
    """VLLM_CPU_KVCACHE_SPACE in GiB; 0 and nothing mean "decide for me", as in vLLM."""
    if not text.strip():
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not math.isfinite(gib) or gib < 0:
        raise ConfigError(f"VLLM_CPU_KVCACHE_SPACE={text} is not a size; give a number of GiB, for example 4")
    if gib >= 1024:
        raise ConfigError(
            f"VLLM_CPU_KVCACHE_SPACE={text} would be {gib:g} GiB; the unit is GiB, so for {gib:g} MB write "
            f"{gib / 1024:g}"
        )
    return int(gib * GIB) or None


# --- facts about the machine and the model ------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceFacts:
    """What the runner found out about the device."""

    kind: str  # "cpu" or "cuda"
    name: str
    free_bytes: int
    has_fast_bf16: bool
    num_cores: int  # that this process may use, by affinity and quota
    cpus: tuple[int, ...] = ()  # the processors it may run on, one of each core first
    has_float8: bool = False  # keys and values can be kept in float8
    keeps_formats: bool = False  # weights stay in the precision of their file (on a GPU not in float32)


@dataclass(frozen=True)
class KVLayer:
    """The keys and values of one attention layer: `window` tokens (None: all), heads, head size."""

    window: int | None
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class ModelFacts:
    """What the checkpoint says about itself."""

    dtype: str  # it was trained in: a key of DTYPE_BYTES
    max_len: int  # tokens it was made for, prompt and completion together
    kv_layers: Sequence[KVLayer]
    weight_bytes: Mapping[str, int]  # size of the weights in memory for each dtype; "stored": as in the file
    token_numbers: int = 0  # that a forward pass holds at once for each token
    vocab_size: int = 0
    largest_weight: int = 0  # numbers
    has_codes: bool = False  # some weights are quantised


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one block table. Groups of one model have equally many layers (the last may have fewer),
    so that a block has the same size whichever group holds it, and one pool serves all."""

    window: int | None
    layer_ids: tuple[int, ...]


def make_groups(layers: Sequence[KVLayer]) -> tuple[KVGroup, ...]:
    """Split layers by window into groups as large as the rarest kind of layer; full attention comes first."""
    by_window: dict[int | None, list[int]] = {}
    for layer_id, layer in enumerate(layers):
        by_window.setdefault(layer.window, []).append(layer_id)
    size = min(len(ids) for ids in by_window.values())
    groups = [
        KVGroup(window, tuple(ids[i : i + size]))
        for window, ids in by_window.items()
        for i in range(0, len(ids), size)
    ]
    return tuple(sorted(groups, key=lambda g: (g.window is not None, g.layer_ids)))


# --- what is run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The model as it will run."""

    dtype: str  # "float32", "bfloat16" or "float16"
    max_model_len: int  # tokens, prompt and completion together


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: `num_blocks` blocks (block 0 is the null block) of `block_size` tokens for one group's layers."""

    block_size: int
    num_blocks: int
    groups: tuple[KVGroup, ...]
    enable_prefix_caching: bool
    dtype: str = "float32"  # of keys and values: of KV_BYTES, or "int8" with a float32 scale for each head and token


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step and of the queue."""

    max_num_seqs: int  # requests computed in one step
    max_num_batched_tokens: int  # tokens computed in one step
    max_waiting: int  # requests that wait; more are refused
    max_model_len: int
    enable_chunked_prefill: bool
    deterministic: bool = False  # a token is always computed as a chunk's, or always as a decode: see Scheduler


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how the model runs."""

    kind: str
    num_threads: int
    enforce_eager: bool
    seed: int
    cpus: tuple[int, ...] = ()  # the processors the threads are bound to; empty: not bound
    activations: str = "fp32"  # of products with quantised weights on a CPU: "int8", "bf16" or "fp32"
    deterministic: bool = False  # on a GPU, kernels that give a row the same bits in any company
    lazy_capture: bool = False  # of CUDA graphs
    apart: bool = False  # a step's prompts are computed alone, and so are its decodes: see ops/prompts.py


@dataclass(frozen=True)
class EngineConfig:
    """Everything decided, with one line for each choice a person may wonder about."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    device: DeviceConfig
    notes: tuple[str, ...]
    warnings: tuple[str, ...]  # what is less than the model or the person may expect


def resolve(args: EngineArgs, model: ModelFacts, device: DeviceFacts, env: Environment) -> EngineConfig:
    """Decide everything.

    Raises ConfigError when the model cannot run as asked, with the figures and the flag that would help.
    """
    notes: list[str] = []
    warnings: list[str] = []
    device_config = _device_config(args, device, env)
    dtype = _choose_dtype(args, model.dtype, device, notes)
    apart = device_config.deterministic and model.has_codes and dtype != "float32"
    max_num_seqs = args.max_num_seqs or (64 if device.kind == "cpu" else 256)
    model_len = _context_length(args, model.max_len)
    kv_dtype = _choose_kv_dtype(args, dtype, device)
    block_size = args.block_size or (64 if device.kind == "cuda" else 16)
    one_block = block_bytes(block_size, model.kv_layers, kv_dtype)
    groups = make_groups(model.kv_layers)
    most_blocks = 1 + max_num_seqs * len(groups) * (math.ceil(model_len / block_size) + 1)
    max_num_batched_tokens = args.max_num_batched_tokens or (512 if device.kind == "cpu" else 8192)
    work_bytes = _work_bytes(model, dtype, max_num_batched_tokens, max_num_seqs) if device.kind == "cuda" else 0
    num_blocks = args.num_gpu_blocks_override or min(
        most_blocks, _kv_bytes(args, device, loaded_bytes(model, dtype, device), work_bytes, env) // one_block
    )
    chunk = max_num_batched_tokens if args.enable_chunked_prefill else model_len
    max_model_len = _fit_context(args, groups, num_blocks, block_size, model_len, one_block, chunk, device, warnings)
    if not args.enable_chunked_prefill:
        max_num_batched_tokens = max(max_num_batched_tokens, max_model_len)
    return EngineConfig(
        model=ModelConfig(dtype, max_model_len),
        cache=CacheConfig(block_size, num_blocks, groups, args.enable_prefix_caching, kv_dtype),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=args.max_waiting or 16 * max_num_seqs,
            max_model_len=max_model_len,
            enable_chunked_prefill=args.enable_chunked_prefill,
            deterministic=device_config.deterministic,
        ),
        device=replace(device_config, apart=apart),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _is_deterministic(args: EngineArgs, device: DeviceFacts) -> bool:
    """Whether kernels and plans are to be those that make answers independent of company; a CPU's always are."""
    if args.deterministic and not device.keeps_formats:
        raise ConfigError(
            f"--deterministic: on {device.name} pelton computes in plain torch, which does not promise that; leave the "
            "flag out"
        )
    if args.deterministic and args.tensor_parallel_size > 2:
        raise ConfigError(
            f"--deterministic: in which order {args.tensor_parallel_size} ranks are summed depends on the number of "
            "rows; use --tensor-parallel-size 1 or 2"
        )
    if not args.deterministic or device.kind == "cpu":
        return False
    if args.max_num_batched_tokens is not None and args.max_num_batched_tokens <= 2 * FEW_TOKENS:
        raise ConfigError(
            f"--deterministic: --max-num-batched-tokens must be more than {2 * FEW_TOKENS}, got "
            f"{args.max_num_batched_tokens}"
        )
    return True


def _choose_dtype(args: EngineArgs, trained: str, device: DeviceFacts, notes: list[str]) -> str:
    if args.dtype != "auto":
        dtype, reason = DTYPE_NAMES[args.dtype], "as asked"
    elif device.has_fast_bf16:
        dtype = "bfloat16" if trained == "float32" else trained
        reason = f"trained in {trained}, and {device.name} multiplies {dtype} fast"
        if device.kind == "cpu" and dtype == "float16":
            dtype, reason = "bfloat16", f"{device.name} multiplies bfloat16 fast, float16 not"
    elif device.keeps_formats:
        dtype = "bfloat16" if trained == "float32" else trained
        reason = f"trained in {trained}; {device.name} reads it, and computes in float32"
    else:
        dtype, reason = "float32", f"{device.name} has no fast bfloat16"
    notes.append(f"dtype {dtype}: {reason}")
    return dtype


def _choose_kv_dtype(args: EngineArgs, dtype: str, device: DeviceFacts) -> str:
    if args.kv_cache_dtype == "fp8":
        if not device.has_float8:
            raise ConfigError(
                f"--kv-cache-dtype fp8: {device.name} does not convert it; GPUs from compute capability 8.9 on do. "
                "Use int8"
            )
        return FP8
    return dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype


def _device_config(args: EngineArgs, device: DeviceFacts, env: Environment) -> DeviceConfig:
    """Threads, their processors, and the precision and the kernels of products."""
    bound = _parse_cpus(env.cpu_binding, device) if device.kind == "cpu" else ()
    # From 8 cores on, one is left to the server's own process.
    default = len(bound) or (device.num_cores if device.num_cores < 8 else device.num_cores - 1)
    num_threads = args.num_threads or (min(env.num_threads, default) if bound and env.num_threads else env.num_threads)
    source = "--num-threads" if args.num_threads else "OMP_NUM_THREADS"
    most = len(bound) or device.num_cores
    num_threads = num_threads or default
    if device.kind == "cpu" and num_threads > most:
        raise ConfigError(
            f"{source} asks for {num_threads} threads, but this process has {most} cores to run on; use {most} or less"
        )
    if not bound and env.cpu_binding == "auto" and num_threads == len(device.cpus):
        bound = device.cpus
    activations = args.cpu_activations
    if activations == "auto":
        activations = "fp32" if DTYPE_NAMES[args.dtype] == "float32" else "int8"
    return DeviceConfig(
        device.kind, num_threads, args.enforce_eager, args.seed, tuple(bound[:num_threads]), activations,
        _is_deterministic(args, device), args.lazy_capture,
    )


def _parse_cpus(text: str, device: DeviceFacts) -> tuple[int, ...]:
    """VLLM_CPU_OMP_THREADS_BIND: "0-3,8"; with several ranks "0-3|4-7", of which this is the first. "auto" and
    "nobind" name none, "all" means every one."""
    if text in ("auto", "nobind"):
        return ()
    if text == "all":
        return device.cpus
    cpus: list[int] = []
    for part in text.partition("|")[0].split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(
                f"VLLM_CPU_OMP_THREADS_BIND={text} is not a list of processors; write 0-3,8 or all, auto, nobind"
            )
        cpus += range(int(first), min(int(last or first), 1 << 16) + 1)
    if missing := sorted(set(cpus) - set(device.cpus)):
        raise ConfigError(
            f"VLLM_CPU_OMP_THREADS_BIND={text}: processor {missing[0]} is not one this process may run on; "
            f"those are {', '.join(map(str, sorted(device.cpus)))}"
        )
    return tuple(dict.fromkeys(cpus))


def loaded_bytes(model: ModelFacts, dtype: str, device: DeviceFacts) -> int:
    """Of the weights, in the memory of the device."""
    if device.kind == "cuda":
        keeps = device.keeps_formats and dtype != "float32"
        return int(TILES_OVER_FILE * model.weight_bytes["stored"]) if keeps else model.weight_bytes[dtype]
    return model.weight_bytes["stored" if device.keeps_formats else dtype]


def _work_bytes(model: ModelFacts, dtype: str, max_num_tokens: int, max_num_seqs: int) -> int:
    """What a GPU computes in at most: the activations of a step, those of captured steps, logits and what is sampled
    from them, and what libraries take for themselves."""
    token_bytes = model.token_numbers * DTYPE_BYTES[dtype]
    logits_bytes = 4 * max_num_seqs * model.vocab_size * 4
    is_quantised = dtype != "float32" and model.weight_bytes.get("stored", 0) < 0.8 * model.weight_bytes[dtype]
    opened_bytes = 2 * model.largest_weight * DTYPE_BYTES[dtype] if is_quantised else 0  # in both, for many tokens
    captured_tokens = max(max_num_seqs, min(max_num_tokens, CAPTURED_TOKENS))
    return (max_num_tokens + captured_tokens) * token_bytes + logits_bytes + opened_bytes + LIBRARY_BYTES


def _context_length(args: EngineArgs, longest: int) -> int:
    """Tokens the model can attend to: what was asked, held against what it was made for."""
    if args.max_model_len is None:
        return longest
    if args.max_model_len > longest:
        raise ConfigError(
            f"--max-model-len {args.max_model_len} exceeds the {longest} tokens the model was made for; use {longest} "
            "or less"
        )
    return args.max_model_len


def block_bytes(block_size: int, kv_layers: Sequence[KVLayer], dtype: str) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in each layer of one group."""
    def head_bytes(size: int) -> int:
        return size + 4 if dtype == "int8" else size * KV_BYTES[dtype]

    layer_bytes = {2 * layer.num_kv_heads * head_bytes(layer.head_size) for layer in kv_layers}
    return block_size * max(layer_bytes) * max(len(group.layer_ids) for group in make_groups(kv_layers))


def _kv_bytes(
    args: EngineArgs, device: DeviceFacts, weight_bytes: int, work_bytes: int, env: Environment
) -> int:
    """Memory for the KV cache, before it is cut to what the requests can use at most."""
    asked, source = args.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    if not asked and device.kind == "cpu":
        asked, source = env.cpu_kv_cache_bytes, "VLLM_CPU_KVCACHE_SPACE"
    if asked:
        left = device.free_bytes - weight_bytes
        if asked > left and device.kind == "cpu":
            raise ConfigError(
                f"{source} asks for {asked / GIB:.1f} GiB, but only {max(left, 0) / GIB:.1f} GiB "
                "remain beside the weights; lower it"
            )
        return asked
    share = 0.25 * (device.free_bytes - weight_bytes)
    if device.kind == "cuda":
        share = args.gpu_memory_utilization * device.free_bytes - weight_bytes - work_bytes
        if share <= 0:
            raise ConfigError(
                f"the weights need {weight_bytes / GIB:.1f} GiB and a step {work_bytes / GIB:.1f} GiB, of "
                f"{device.free_bytes / GIB:.1f} GiB that are free on {device.name} "
                f"{args.gpu_memory_utilization:.0%} may be used: {-share / GIB:.1f} GiB are missing; lower "
                "--max-num-batched-tokens or --max-num-seqs, raise --gpu-memory-utilization, or use a quantised model"
            )
    if share <= 0:
        raise ConfigError(
            f"the weights need {weight_bytes / GIB:.1f} GiB and {device.name} has {device.free_bytes / GIB:.1f} GiB "
            "free; use a smaller model or a quantised one"
        )
    return int(share)


def _fit_context(
    args: EngineArgs, groups: Sequence[KVGroup], num_blocks: int, block_size: int, model_len: int, one_block: int,
    chunk: int, device: DeviceFacts, warnings: list[str],
) -> int:
    """The context length that one request alone can fill with `num_blocks` blocks, in steps of `chunk` tokens."""
    need = 1 + blocks_for(model_len, block_size, groups, chunk)
    if need <= num_blocks:
        return model_len
    need_gib, have_gib = need * one_block / GIB, num_blocks * one_block / GIB
    low, high = 0, model_len  # the longest length that fits, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        if 1 + blocks_for(middle, block_size, groups, chunk) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    if args.max_model_len is not None or low < 1:
        dtype = "fp8" if device.has_float8 else "int8"
        more = "--gpu-memory-utilization" if device.kind == "cuda" else "--kv-cache-memory-bytes"
        raise ConfigError(
            f"one request of {model_len} tokens needs {need_gib:.2f} GiB of KV cache, there is {have_gib:.2f} GiB; "
            f"use --max-model-len {max(low, 1)} or --kv-cache-dtype {dtype}, or give the cache more memory ({more})"
        )
    warnings.append(f"max_model_len {low} instead of {model_len}: the KV cache of {have_gib:.2f} GiB holds no more")
    return low


def blocks_for(num_tokens: int, block_size: int, groups: Sequence[KVGroup], chunk: int) -> int:
    """Blocks that one request of `num_tokens` can hold at once, computed in chunks of at most `chunk` tokens."""
    total = 0
    for group in groups:
        held = num_tokens if group.window is None else min(num_tokens, group.window - 1 + chunk + block_size)
        total += math.ceil(held / block_size)
    return total
