"""What the operator of a server can set: where it listens, who may call, and how much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from pelton.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for or take. Sizes in bytes, times in seconds."""

    body_bytes: int = 32 << 20
    header_bytes: int = 32 << 10  # all headers together
    num_headers: int = 100
    target_bytes: int = 8 << 10  # path and query
    json_depth: int = 64
    num_prompts: int = 128
    n: int = 64
    num_stop: int = 16
    stop_chars: int = 256
    num_logit_bias: int = 1024
    num_logprobs: int = 20  # -1: no limit
    num_bad_words: int = 128
    num_tools: int = 128
    num_messages: int = 4096
    label_chars: int = 512  # user, cache_salt, request_id and the like
    header_s: float = 10.0  # to receive the request line and the headers
    receive_s: float = 30.0  # to receive the body
    write_s: float = 30.0  # a reader who takes nothing for so long is cut off
    request_s: float = 3600.0  # from the first byte of a request to its last token

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < (-1 if limit.name == "num_logprobs" else 0):
                raise ConfigError(f"the limit {limit.name} must not be negative, got {getattr(self, limit.name)}")


@dataclass(frozen=True)
class ServerSettings:
    """The server's options; `pelton serve --help` shows them under vLLM's names."""

    host: str = "127.0.0.1"  # "0.0.0.0" lets other machines in
    port: int = 8000  # 0 takes a free one
    api_keys: tuple[str, ...] = ()  # any of them opens the door; none: everyone may call
    root_path: str = ""  # the prefix a proxy in front of the server puts before each path
    allowed_origins: tuple[str, ...] = ()  # CORS; none: browsers on other origins are kept out
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0  # ssl.CERT_NONE
    uvicorn_log_level: str = "warning"
    access_log: bool = False  # one line for each HTTP request
    log_requests: bool = True  # one line for each generation: sizes, times and how it ended, never its text
    response_role: str = "assistant"
    return_tokens_as_token_ids: bool = False  # "token_id:123" in place of a token's text in logprobs
    enable_prompt_tokens_details: bool = False  # usage tells how many prompt tokens came from the prefix cache
    trust_request_chat_template: bool = False  # a client may send a chat template
    drain_s: float = 30.0  # after SIGTERM, the time for running requests to finish
    live_s: float = 120.0  # an engine that was not heard of for so long is stuck; longer than any step may take
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [0, 65535], got {self.port}")
        if not all(key.strip() for key in self.api_keys):
            raise ConfigError("--api-key is empty; give a key, or leave the flag out to serve everyone")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path must start with / and not end with it, got {self.root_path!r}")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ConfigError("--ssl-keyfile and --ssl-certfile go together; give both")
        if self.drain_s < 0 or self.live_s <= 0:
            raise ConfigError("the grace time must not be negative, and the time without a heartbeat positive")

    @property
    def scheme(self) -> str:
        """"http" or "https"."""
        return "https" if self.ssl_certfile else "http"
