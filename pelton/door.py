"""What LLM and AsyncLLM share: their options, and the text side of a model. No torch."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

from pelton import vllm_options
from pelton.config import EngineArgs
from pelton.engine.messages import EngineInfo
from pelton.errors import ConfigError
from pelton.text.chat_template import load_chat_template
from pelton.text.prompt import Prompts, default_sampling_params
from pelton.text.tokenizer import load_tokenizer
from pelton.types import OnProgress, Prompt
from pelton.weights import hub
from pelton.weights.fields import read_json
from pelton.weights.files import ModelFiles

logger = logging.getLogger(__name__)

BUILDER = "pelton.build:build_engine"


def args_from_keywords(options: Mapping[str, Any]) -> EngineArgs:
    """EngineArgs from keyword arguments, vLLM's others among them; ConfigError for a name that is unknown."""
    known = [field.name for field in fields(EngineArgs)]
    given = {}
    for name, value in options.items():
        if name in known:
            given[name] = value
        elif vllm_options.is_known(name):
            if (line := vllm_options.why_no_effect(name, value, name)) is not None:
                logger.info("%s", line)
        else:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"there is no argument {name}; {hint}")
    return EngineArgs(**given)


def log_choices(info: EngineInfo) -> None:
    """Tell what was decided while the engine was built; what a person has to know is a warning."""
    logger.debug("kernels: %s", info.kernels)
    for note in info.notes:
        logger.info("%s", note)
    for warning in info.warnings:
        logger.warning("%s", warning)


def fetch(args: EngineArgs, on_progress: OnProgress | None = None) -> EngineArgs:
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
