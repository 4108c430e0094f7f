"""vLLM's options that pelton has not: accepted where that changes no answer, refused in one line where it would.

Names are spelled as LLM's arguments; the command line derives its flags from them.
"""

from __future__ import annotations

from typing import Any

from pelton.errors import ConfigError

# option -> why it has no effect: switches, then options with a value
SWITCHES = {
    "disable_log_stats": "statistics are at the server's /metrics and not logged",
    "disable_frontend_multiprocessing": "the server's engine always runs in a process of its own",
    "disable_async_output_proc": "output is always processed beside the engine",
    "disable_cascade_attn": "there is one kind of attention",
    "use_v2_block_manager": "there is one block manager",
    "enable_hybrid_kv_cache_manager": "sliding-window layers always keep only their window",
    "disable_hybrid_kv_cache_manager": "sliding-window layers always keep only their window",
    "async_scheduling": "on a GPU each step is scheduled while the one before it runs, where that can be",
    "disable_fastapi_docs": "there are no such pages",
    "use_tqdm_on_load": "the command line shows progress in a terminal anyway",
    "worker_use_ray": "ranks are always processes of this machine",
    "ray_workers_use_nsight": "ranks are always processes of this machine",
}
VALUES = {
    "swap_space": "preempted requests are computed again, not swapped",
    "preemption_mode": "preempted requests are computed again, not swapped",
    "max_seq_len_to_capture": "a captured step serves every length",
    "cuda_graph_sizes": "sizes of captured steps follow from --max-num-seqs",
    "compilation_config": "kernels are compiled when an engine starts, and kept",
    "num_scheduler_steps": "each step is scheduled",
    "scheduler_delay_factor": "a request is scheduled as soon as there is room",
    "scheduling_policy": "requests are always ordered by priority, then by arrival",
    "max_num_partial_prefills": "as many prompts are computed in parts as fit the step",
    "max_long_partial_prefills": "as many prompts are computed in parts as fit the step",
    "long_prefill_token_threshold": "as many prompts are computed in parts as fit the step",
    "prefix_caching_hash_algo": "keys are always SHA-256",
    "max_parallel_loading_workers": "weights are mapped from the file, not read by workers",
    "distributed_executor_backend": "ranks are always processes of this machine",
    "guided_decoding_backend": "llguidance serves every constraint",
    "structured_outputs_config": "llguidance serves every constraint",
    "speculative_config": "tokens are not drafted in this version; answers are the same",
    "code_revision": "no code of a checkpoint is ever run",
    "max_log_len": "prompts are never logged",
}
# option -> the only values it may have: those that ask for what happens here anyway
ONLY = {
    "pipeline_parallel_size": ("1",),
    "data_parallel_size": ("1",),
    "tokenizer_mode": ("auto",),
    "config_format": ("auto",),
    "model_impl": ("auto",),
    "task": ("generate", "auto"),
    "runner": ("generate", "auto"),
    "cpu_offload_gb": ("0", "0.0"),
    "chat_template_content_format": ("auto",),
}
# option -> what it would turn on; it would change answers or requests, so it is refused
NOT_YET = {
    **dict.fromkeys(("enable_auto_tool_choice", "tool_call_parser", "tool_parser_plugin"), "parsing of tool calls"),
    **dict.fromkeys(("enable_reasoning", "reasoning_parser"), "parsing of reasoning"),
    **dict.fromkeys(("enable_lora", "lora_modules", "max_loras", "max_lora_rank", "max_cpu_loras"), "LoRA"),
    **dict.fromkeys(("enable_prompt_adapter", "prompt_adapters"), "prompt adapters"),
    **dict.fromkeys(("limit_mm_per_prompt", "mm_processor_kwargs", "allowed_local_media_path"), "input beside text"),
    **dict.fromkeys(("hf_overrides", "rope_scaling", "rope_theta"), "changing the checkpoint's configuration"),
    **dict.fromkeys(("override_generation_config", "override_pooler_config"), "overriding the checkpoint's defaults"),
    "enable_expert_parallel": "sharing experts among devices",
    "kv_transfer_config": "moving keys and values between engines",
    "enable_sleep_mode": "sleep mode",
    "enable_prompt_embeds": "prompts as embeddings",
    "skip_tokenizer_init": "serving without a tokenizer",
    "disable_sliding_window": "attention without the checkpoint's window",
}


def is_known(name: str) -> bool:
    """Whether vLLM's option `name` is in the tables."""
    return name in SWITCHES or name in VALUES or name in ONLY or name in NOT_YET


def why_no_effect(name: str, value: Any, spelling: str) -> str | None:
    """What to tell about option `name` of the tables, written `spelling` by the person; None: nothing needs telling.

    ConfigError if the option asks for what this version has not.
    """
    if value is None or value is False:
        return None
    if name in NOT_YET:
        raise ConfigError(f"{spelling}: {NOT_YET[name]} is not in this version; leave it out")
    if name in ONLY:
        if str(value) not in ONLY[name]:
            raise ConfigError(f"{spelling} {value} is not in this version; use {ONLY[name][0]}, or leave it out")
        return None
    return f"{spelling} has no effect: {SWITCHES.get(name) or VALUES[name]}"
