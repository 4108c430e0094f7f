"""What LLM and AsyncLLM share: their options, and the text side of a model. No torch."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

from pelton.config import EngineArgs
from pelton.errors import ConfigError
from pelton.text.chat_template import load_chat_template
from pelton.text.prompt import Prompts, default_sampling_params
from pelton.text.tokenizer import load_tokenizer
from pelton.types import Prompt
from pelton.weights import hub
from pelton.weights.fields import read_json
from pelton.weights.files import ModelFiles

logger = logging.getLogger(__name__)

BUILDER = "pelton.build:build_engine"

# Arguments of vLLM's LLM that have no effect here -> why. None of them would change what a model answers.
IGNORED = {
    "swap_space": "preempted requests are computed again, not swapped",
    "disable_log_stats": "statistics are not logged",
    "max_seq_len_to_capture": "graphs are captured as they are needed",
    "disable_custom_all_reduce": "there is one device",
    "disable_async_output_proc": "output is always processed beside the engine",
    "distributed_executor_backend": "there is one device",
    "compilation_config": "nothing is compiled at run time",
    "use_tqdm_on_load": "loading is quick",
    "async_scheduling": "LLM schedules each step",
}


def engine_args(options: Mapping[str, Any]) -> EngineArgs:
    """EngineArgs from keyword arguments; ConfigError for a name that is unknown."""
    known = [field.name for field in fields(EngineArgs)]
    given = {}
    for name, value in options.items():
        if name in known:
            given[name] = value
        elif name in IGNORED:
            logger.info("%s has no effect: %s", name, IGNORED[name])
        else:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"there is no argument {name}; {hint}")
    return EngineArgs(**given)


def fetch(args: EngineArgs, on_progress: hub.Progress | None = None) -> EngineArgs:
    """`args` with the model's path on this machine, served under the name it was asked for by."""
    path = hub.resolve(
        args.model, hub=args.hub, revision=args.revision, download_dir=args.download_dir, on_progress=on_progress
    )
    return replace(args, model=str(path), served_model_name=args.served_model_name or [args.model])


def load_text(args: EngineArgs, files: ModelFiles) -> Callable[[int], Prompts]:
    """Tokenizer, chat template and sampling defaults of a model: its Prompts, but for the context's length."""
    tokenizer = load_tokenizer(files, args.tokenizer)
    return partial(
        Prompts,
        tokenizer,
        load_chat_template(files, tokenizer, args.chat_template),
        generation_defaults=default_sampling_params(_generation_config(args, files)),
        vocab_size=files.config.get("vocab_size"),
        max_logprobs=args.max_logprobs,
    )


def _generation_config(args: EngineArgs, files: ModelFiles) -> dict[str, Any]:
    if args.generation_config == "auto":
        return files.generation_config
    if args.generation_config == "vllm":
        return {}
    path = Path(args.generation_config) / "generation_config.json"
    if not path.is_file():
        raise ConfigError(f"--generation-config {args.generation_config} holds no generation_config.json; use auto, "
                          "vllm or a folder with that file")
    return read_json(path)


class ChatOptions(TypedDict, total=False):
    """What `chat` takes beside the messages."""

    chat_template: str | None  # Jinja source of another template
    add_generation_prompt: bool  # default True
    continue_final_message: bool  # continue the last message instead of answering it
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None  # variables of the template


def chat_prompt(prompts: Prompts, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> Prompt:
    """Messages put through the chat template, as a prompt with its text and its token ids."""
    given: dict[str, Any] = {**options, "template_kwargs": options.get("chat_template_kwargs")}
    given.pop("chat_template_kwargs", None)
    if given.get("continue_final_message"):
        given["add_generation_prompt"] = False
    text, token_ids = prompts.chat_prompt(messages, **given)
    return cast(Prompt, {"prompt": text, "prompt_token_ids": token_ids})


def text_of(prompt: Prompt) -> str | None:
    """The prompt as text, if it came with one."""
    if isinstance(prompt, str):
        return prompt
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
    return text if isinstance(text, str) else None
