"""Chat templates: from a list of messages to the text a model was trained on. Rendering is sandboxed and bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pelton.errors import ConfigError, ModelFormatError, RequestError
from pelton.text.sandbox import SandboxedTemplates, TemplateLimitError, TemplateRefusal, metered
from pelton.text.tokenizer import Tokenizer, read_tokenizer_config
from pelton.weights.fields import read_json
from pelton.weights.files import ModelFiles

MAX_SOURCE = 256 << 10  # characters; the longest templates in use have about 20,000
_FINAL_MESSAGE_END = "\ue000end of the final message\ue001"

_environment = SandboxedTemplates()


class ChatTemplate:
    """A compiled template. `tools_source`, if there is one, is used for requests that bring tools."""

    def __init__(self, source: str, variables: Mapping[str, str], tools_source: str | None = None) -> None:
        """variables: "bos_token" and so on, as the template names them. Raises ModelFormatError."""
        self.source = source
        self._variables = dict(variables)
        self._template = _compile(source)
        self._tools_template = self._template if tools_source is None else _compile(tools_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text. Messages are plain data (see `messages.normalise_messages`).

        add_generation_prompt: end with the beginning of the assistant's turn. continue_final_message: leave the last
        message open, so that the model continues it. Raises RequestError with the template's own words if it refuses.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
                "continue_final_message",
            )
        if continue_final_message:
            messages = _mark_end(messages)
        template = self._tools_template if tools else self._template
        context = {
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        text = _render(template, context)
        return _cut_at_mark(text) if continue_final_message else text


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise ModelFormatError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
    try:
        return _environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFormatError(f"the chat template is wrong in line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:  # from compiling what Jinja made of it
        raise ModelFormatError(f"the chat template is nested too deeply: {_one_line(error)}") from None
    except Exception as error:  # a template can make Jinja's parser fail in many ways
        raise ModelFormatError(f"the chat template cannot be compiled: {_one_line(error)}") from None


def _render(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    try:
        with metered():
            return template.render(context)
    except TemplateLimitError as error:
        raise RequestError(f"the chat template was stopped: {error}", "messages") from None
    except TemplateRefusal as error:
        raise RequestError(f"the chat template refuses these messages: {_one_line(error)}", "messages") from None
    except Exception as error:  # whatever a template does wrong: it belongs to this request
        raise RequestError(f"the chat template fails on these messages: {_one_line(error)}", "messages") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _mark_end(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = messages[-1]
    if not isinstance(last.get("content"), str):
        raise RequestError("continue_final_message needs a final message with content", "continue_final_message")
    # The space shows whether the template trims what it is given.
    return [*messages[:-1], {**last, "content": last["content"] + _FINAL_MESSAGE_END + " "}]


def _cut_at_mark(text: str) -> str:
    before, mark, after = text.rpartition(_FINAL_MESSAGE_END)
    if not mark:
        raise RequestError(
            "the chat template does not show the final message's text, so it cannot be continued",
            "continue_final_message",
        )
    return before if after.startswith(" ") else before.rstrip()


# --- loading ------------------------------------------------------------------------------------------------------


def load_chat_template(files: ModelFiles, tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate | None:
    """The model's chat template, or the one `override` (`--chat-template`) names or is; None if there is none.

    Raises ConfigError if `override` is neither a file nor a template, ModelFormatError for a template that is wrong.
    """
    if override is not None:
        return ChatTemplate(_read_override(override), tokenizer.named_tokens)
    found = _from_gguf(files.gguf.metadata) if files.gguf is not None else _from_folder(files)
    if not found:
        return None
    default = found.get("default") or next(iter(found.values()))
    return ChatTemplate(default, tokenizer.named_tokens, found.get("tool_use"))


def _read_override(override: str) -> str:
    if "{" in override or "\n" in override:
        return override
    path = Path(override).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {override} is neither a template nor a readable file: {error}") from None


def _from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: tokenizer.chat_template is the default, tokenizer.chat_template.NAME are others."""
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": source
        for key, source in metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    return _check_texts(found, prefix)


def _from_folder(files: ModelFiles) -> dict[str, str]:
    """chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    path = files.optional("chat_template.jinja")
    if path is not None:
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except ValueError as error:
            raise ModelFormatError(f"{path.name} is not UTF-8 text: {error}") from None
    path = files.optional("chat_template.json")
    config = read_json(path) if path is not None else read_tokenizer_config(files.root)
    value = config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {str(entry.get("name")): entry.get("template") for entry in value}
    found = value if isinstance(value, dict) else {} if value is None else {"default": value}
    return _check_texts(found, "chat_template")


def _check_texts(found: Mapping[str, Any], field: str) -> dict[str, str]:
    if not all(isinstance(source, str) for source in found.values()):
        raise ModelFormatError(f"{field} must be text, or a list of named templates")
    return {name: source for name, source in found.items() if source.strip()}
