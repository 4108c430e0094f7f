"""The fields of EngineArgs, SamplingParams and ServerSettings as flags: their types come from the dataclasses, the
help texts from the tables here. A field that is not in a table is no flag."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pelton.cli.ignored import add_ignored
from pelton.cli.parser import Parser
from pelton.config import DEFAULT_MODEL, EngineArgs
from pelton.errors import ConfigError
from pelton.types import SamplingParams

ENGINE_FLAGS = {
    "model": f"a path, a repository (org/name, hf:org/name, modelscope:org/name), or a built-in name [{DEFAULT_MODEL}]",
    "tokenizer": "take the tokenizer from this path instead of the model's",
    "served_model_name": "names the API knows the model by [the model as given]",
    "hub": "where org/name is fetched from: auto, hf, modelscope",
    "revision": "branch, tag or commit of the repository",
    "download_dir": "where fetched models are kept [~/.cache/pelton, Hugging Face's cache]",
    "load_format": "auto, safetensors, gguf; dummy: random weights",
    "quantization": "the checkpoint's format, if you want to name it; it is read from the checkpoint",
    "dtype": "auto, float32, bfloat16, float16",
    "max_model_len": "most tokens of prompt and answer together; 4096, 4k (thousands) or 4K (1024s) [the model's]",
    "device": "auto, cpu, cuda",
    "tensor_parallel_size": "devices of this machine that share the model",
    "disable_custom_all_reduce": "GPUs that share the model sum by NCCL alone, not through each other's memory",
    "trust_remote_code": "accepted; no code of a checkpoint is ever run in this version",
    "enforce_eager": "compute each step op by op instead of replaying it as captured",
    "lazy_capture": "on a GPU: capture each size of step when it is first needed, instead of all at start",
    "seed": "seed for requests that bring none",
    "generation_config": "auto: the checkpoint's sampling defaults; vllm: none; or a folder",
    "chat_template": "a file with a chat template (Jinja), or the template itself",
    "max_logprobs": "most log-probabilities a request may ask for per token",
    "block_size": "tokens in a block of the KV cache; a power of two",
    "enable_prefix_caching": "reuse the KV cache of prompts that begin alike",
    "enable_chunked_prefill": "compute long prompts in parts, between other requests' tokens",
    "max_num_seqs": "most requests computed at once",
    "max_num_batched_tokens": "most tokens computed in one step",
    "max_waiting": "most requests that wait; more are refused",
    "gpu_memory_utilization": "share of a GPU's free memory to use; no effect on a CPU",
    "kv_cache_memory_bytes": "memory for the KV cache, in bytes [what is left]",
    "num_gpu_blocks_override": "number of blocks in the KV cache [as many as fit]",
    "num_threads": "threads to compute with on a CPU [OMP_NUM_THREADS, else the cores]",
    "kv_cache_dtype": "what keys and values are kept in: auto, float32, bfloat16, float16, int8, fp8 (some GPUs)",
    "cpu_activations": "precision of products with quantised weights on a CPU: auto, int8, bf16, fp32",
    "deterministic": "on a GPU: the same answer whatever is computed beside it, a little slower; on a CPU it always is",
}
SAMPLING_FLAGS = {
    "max_tokens": "most tokens to generate",
    "temperature": "0: always the likeliest token; higher: more varied",
    "top_p": "sample from the likeliest tokens that together have this probability",
    "top_k": "sample from this many of the likeliest tokens; 0: all",
    "min_p": "leave out tokens less likely than this share of the likeliest one's probability",
    "seed": "the same seed gives the same answer",
    "stop": "end the answer before one of these texts",
    "min_tokens": "generate at least so many tokens",
    "ignore_eos": "go on after the end-of-text token",
    "repetition_penalty": "above 1: avoid tokens that were used",
    "presence_penalty": "above 0: avoid tokens that the answer has",
    "frequency_penalty": "above 0: avoid tokens the more often the answer has them",
}
SHORT_FLAGS = {"tensor_parallel_size": "-tp"}
COUNT_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_flags(parser: Parser, title: str, record: type, helps: Mapping[str, str], skip: Sequence[str] = ()) -> None:
    """Add the fields of dataclass `record` that `helps` names. The namespace gets only what was typed."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(record)
    for name, text in helps.items():
        if name in skip:
            continue
        flags = [f"--{name.replace('_', '-')}"] + ([SHORT_FLAGS[name]] if name in SHORT_FLAGS else [])
        default = getattr(record, name, None)
        if "[" not in text and default is not None and not isinstance(default, bool):
            text += f" [{default}]"
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"),
                           **_kind(hints[name]))


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's options for a field's type; the first of a union counts, and None stands for nothing typed."""
    choices = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] if _is_union(hint) else [hint]
    if bool in choices:
        return {"action": argparse.BooleanOptionalAction}
    if any(typing.get_origin(kind) in (list, tuple, Sequence, typing.get_origin(Sequence[str])) for kind in choices):
        return {"nargs": "+", "metavar": "TEXT"}
    if int in choices:
        return {"type": parse_count, "metavar": "N"}
    return {"type": choices[0], "metavar": "X" if choices[0] is float else "TEXT"}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def parse_count(text: str) -> int:
    """4096, 4k (4,000), 4K (4,096)."""
    factor = COUNT_SUFFIXES.get(text[-1:], 1)
    try:
        value = float(text[:-1]) * factor if factor != 1 else int(text)
        return int(value)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def add_engine_flags(parser: Parser, skip: Sequence[str] = (), positional: bool = True) -> None:
    """The flags of EngineArgs and, with `positional`, the model as first argument."""
    if positional:
        parser.add_argument("model_tag", metavar="MODEL", nargs="?", help=ENGINE_FLAGS["model"])
    add_flags(parser, "model and engine", EngineArgs, ENGINE_FLAGS, skip)
    add_ignored(parser)


def engine_args(options: argparse.Namespace) -> EngineArgs:
    """The EngineArgs that were typed."""
    given = given_fields(options, ENGINE_FLAGS)
    tag = getattr(options, "model_tag", None)
    if tag is not None:
        if given.get("model", tag) != tag:
            raise ConfigError(f"two models are given, {tag} and --model {given['model']}; leave one out")
        given["model"] = tag
    return EngineArgs(**given)


def sampling_fields(options: argparse.Namespace, flags: Mapping[str, str] = SAMPLING_FLAGS) -> dict[str, Any]:
    """The fields of SamplingParams that were typed, checked."""
    given = given_fields(options, flags)
    SamplingParams(**given)
    return given


def given_fields(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """Those of `names` that were typed."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}
