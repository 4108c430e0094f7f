"""`pelton bench serve`: load on a running server that speaks the OpenAI completions API, measured from outside.

TTFT: time to the first token. TPOT: time per output token after the first. ITL: time between chunks of a stream.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pelton.cli.bench import add_workload, positive, summarize
from pelton.cli.parser import Parser
from pelton.config import Environment
from pelton.errors import ConfigError

TOKEN_IDS = range(1000, 30_000)  # in every vocabulary of interest, and no control tokens in most
TIMEOUT_S = 600.0


def add_arguments(parser: Parser, kind: str) -> None:
    """Which server, how much load."""
    add_workload(parser)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="[http://127.0.0.1:8000]")
    parser.add_argument("--model", metavar="TEXT", help="the model's name [the server's first]")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key [VLLM_API_KEY]")
    parser.add_argument("--num-prompts", type=positive, default=32, metavar="N", help="requests in all [32]")
    parser.add_argument("--request-rate", type=float, default=float("inf"), metavar="X",
                        help="requests per second, at random (Poisson) intervals [all at once]")
    parser.add_argument("--max-concurrency", type=positive, default=64, metavar="N",
                        help="most requests at a time [64]")


@dataclass
class Timing:
    """One request as its client saw it; times in seconds."""

    ttft: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    url: str
    api_key: str | None

    @contextmanager
    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An open response, closed afterwards. OSError or HTTPException if the server cannot be reached."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url {self.url} is no http or https address")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        with closing(connection):
            connection.request(method, parts.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            with connection.getresponse() as response:
                yield response

    def first_model(self) -> str:
        """The name of the first model it serves. ConfigError if there is no such server."""
        try:
            with self.request("GET", "/v1/models") as response:
                page = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"no server answers at {self.url} ({error}); start one with pelton serve") from error
        if response.status != 200:
            raise ConfigError(f"{self.url}/v1/models answers {response.status}; check --base-url and --api-key")
        try:
            return str(json.loads(page)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.url}/v1/models lists no models; give --model") from error


def measure(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Send the requests, each when it is due, and summarise."""
    if not options.request_rate > 0:
        raise ConfigError(f"--request-rate must be above 0, got {options.request_rate}")
    server = Server(options.base_url, options.api_key or Environment.read().api_key)
    model = options.model or server.first_model()
    rng = random.Random(options.bench_seed)
    bodies = [_body(rng, model, options) for _ in range(options.num_prompts)]
    gaps = [rng.expovariate(options.request_rate) if options.request_rate < float("inf") else 0.0 for _ in bodies]
    start = time.perf_counter()
    with ThreadPoolExecutor(min(options.num_prompts, options.max_concurrency)) as pool:
        futures = []
        for body, gap in zip(bodies, gaps, strict=True):
            time.sleep(gap)
            futures.append(pool.submit(time_request, server, body))
        timings = [future.result() for future in futures]
    return {"model": model, "input_len": options.input_len, "output_len": options.output_len,
            **_figures(timings, time.perf_counter() - start)}


def _body(rng: random.Random, model: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": rng.choices(TOKEN_IDS, k=options.input_len),
        "max_tokens": options.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def time_request(server: Server, body: dict[str, Any]) -> Timing:
    """Stream one completion; what goes wrong is in `error`."""
    timing, start = Timing(), time.perf_counter()
    last = start
    try:
        with server.request("POST", "/v1/completions", body) as response:
            if response.status != 200:
                return Timing(error=f"status {response.status}: {response.read(500).decode(errors='replace')}")
            for event in _events(response):
                now = time.perf_counter()
                if "error" in event:
                    return Timing(error=str(event["error"]))
                if event.get("choices"):
                    if timing.ttft:
                        timing.gaps.append(now - last)
                    else:
                        timing.ttft = now - start
                    last = now
                if event.get("usage"):
                    timing.num_tokens = event["usage"]["completion_tokens"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Timing(error=f"{type(error).__name__}: {error}")
    timing.total = last - start
    return timing if timing.num_tokens else Timing(error="the stream ended without tokens")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response:
        data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if data and data != b"[DONE]":
            yield json.loads(data)


def _figures(timings: list[Timing], seconds: float) -> dict[str, Any]:
    """Times in milliseconds; failed requests count only as failed."""
    good = [timing for timing in timings if timing.error is None]
    num_tokens = sum(timing.num_tokens for timing in good)
    figures: dict[str, Any] = {
        "num_completed": len(good),
        "num_failed": len(timings) - len(good),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": num_tokens / seconds,
    }
    errors = [timing.error for timing in timings if timing.error]
    if errors:
        figures["first_error"] = errors[0]
    distributions = {
        "ttft_ms": [timing.ttft for timing in good],
        "tpot_ms": [(t.total - t.ttft) / (t.num_tokens - 1) for t in good if t.num_tokens > 1],
        "itl_ms": [gap for timing in good for gap in timing.gaps],
        "latency_ms": [timing.total for timing in good],
    }
    return figures | {name: summarize([1e3 * v for v in values]) for name, values in distributions.items() if values}
