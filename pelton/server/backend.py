"""What the server needs of an engine. AsyncLLM is one; the tests bring another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from pelton.types import Prompt, RequestOutput, SamplingParams


class TokenizerView(Protocol):
    """Token ids and their text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_tokens(self) -> Mapping[str, int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class PromptsView(Protocol):
    """Text to token ids."""

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The checkpoint's own sampling defaults, under SamplingParams' names."""
        ...

    def encode(
        self, prompt: Prompt, params: SamplingParams | None = None, *, add_special_tokens: bool = True
    ) -> list[int]: ...
    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> list[int]: ...


class InfoView(Protocol):
    """Facts about the engine."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def num_kv_tokens(self) -> int: ...
    @property
    def kernels(self) -> str: ...


class StatsView(Protocol):
    """What the scheduler counts."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage(self) -> float: ...
    @property
    def num_prefix_queries(self) -> int: ...
    @property
    def num_prefix_hits(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def step_sizes(self) -> Sequence[int]:
        """Steps by their number of tokens: see engine.scheduler.STEP_SIZES."""
        ...


class Backend(Protocol):
    """AsyncLLM's interface, as far as the server uses it."""

    @property
    def model_names(self) -> Sequence[str]: ...
    @property
    def tokenizer(self) -> TokenizerView: ...
    @property
    def prompts(self) -> PromptsView: ...
    @property
    def info(self) -> InfoView: ...
    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests now."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs, or is being started again."""
        ...

    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop last turned."""
        ...

    def stats(self) -> StatsView: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        clip: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt, shortened to fit the context if `clip`. Closing the iterator aborts the request
        within one step."""
        ...

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Let running requests finish for `drain_s` seconds, end the others with an error, and stop."""
        ...
