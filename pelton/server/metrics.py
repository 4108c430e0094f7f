"""Prometheus metrics under vLLM's names, those of 0.9 and of 0.33 side by side.

Label values come from fixed sets alone: the served model's name, the engine's number, the reason a request ended.
Gauges and the engine's own counters are read when a scraper asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pelton.engine.scheduler import STEP_SIZES
from pelton.server.backend import Backend, StatsView
from pelton.types import RequestOutput, SamplingParams

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TPOT = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
N = (1, 2, 5, 10, 20)


def token_buckets(largest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`."""
    steps = (factor * 10**power for power in range(len(str(largest))) for factor in (1, 2, 5))
    return [step for step in steps if step <= largest] or [1]


class Metrics:
    """The server's counters, in a registry of their own. Empty until an engine is attached."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families: _Families | None = None

    def attach(self, llm: Backend) -> None:
        """Begin to count for this engine."""
        self.families = _Families(self.registry, (llm.model_names[0], "0"), llm.info.max_model_len)
        self.registry.register(_EngineCollector(llm, (llm.model_names[0], "0")))

    def exposition(self) -> bytes:
        """The text a scraper reads."""
        return generate_latest(self.registry)

    def record(self, params: SamplingParams) -> RequestRecord:
        """Begin to count one prompt."""
        if self.families is None:
            raise RuntimeError("metrics are recorded before an engine is attached")
        return RequestRecord(self.families, params)


class _Families:
    """The histograms and counters of requests."""

    def __init__(self, registry: CollectorRegistry, labels: Sequence[str], max_model_len: int) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry)
            return family.labels(*labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, LABELS, registry=registry).labels(*labels)

        tokens = token_buckets(max_model_len)
        self.ttft = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT)
        self.gaps = [
            histogram("inter_token_latency_seconds", "Seconds between two tokens of a request.", TPOT),
            histogram("time_per_output_token_seconds", "Seconds between two tokens, under its old name.", TPOT),
        ]
        self.tpot = histogram("request_time_per_output_token_seconds", "Mean seconds a token of a request.", TPOT)
        self.e2e = histogram("e2e_request_latency_seconds", "Seconds from arrival to the end of a request.", E2E)
        self.queue = histogram("request_queue_time_seconds", "Seconds a request waited.", E2E)
        self.prefill = histogram("request_prefill_time_seconds", "Seconds from schedule to first token.", E2E)
        self.decode = histogram("request_decode_time_seconds", "Seconds from first to last token.", E2E)
        self.inference = histogram("request_inference_time_seconds", "Seconds from schedule to last token.", E2E)
        self.prompt_sizes = histogram("request_prompt_tokens", "Tokens in a prompt.", tokens)
        self.generation_sizes = histogram("request_generation_tokens", "Tokens generated for a request.", tokens)
        self.max_sizes = histogram("request_max_num_generation_tokens", "Most tokens of one sample.", tokens)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens as asked for.", tokens)
        self.n = histogram("request_params_n", "Samples asked for.", N)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        success = Counter("vllm:request_success", "Samples ended, by reason.", (*LABELS, "finished_reason"),
                          registry=registry)
        self.finished = {reason: success.labels(*labels, reason) for reason in FINISH_REASONS}


class RequestRecord:
    """Counts one prompt's outputs: call `push` for each, in their order, and `close` once."""

    def __init__(self, families: _Families, params: SamplingParams) -> None:
        self.families = families
        self.params = params
        self.arrival = time.monotonic()
        self.first: float | None = None
        self.last = 0.0
        self.num_outputs = 0
        self.num_tokens: dict[int, int] = {}  # by sample
        self.ended: set[int] = set()

    def push(self, output: RequestOutput) -> None:
        """Count one output that holds only what is new."""
        now, families = time.monotonic(), self.families
        self.num_outputs += 1
        num_new = 0
        for one in output.outputs:
            num_new += len(one.token_ids)
            self.num_tokens[one.index] = self.num_tokens.get(one.index, 0) + len(one.token_ids)
            if one.finish_reason is not None and one.index not in self.ended:
                self.ended.add(one.index)
                families.finished.get(one.finish_reason, families.finished["stop"]).inc()
        families.generation_tokens.inc(num_new)
        if self.first is None:
            self._begin(output, now)
        elif num_new:
            for gaps in families.gaps:
                gaps.observe(now - self.last)
        self.last = now
        if output.finished:
            self._end(output, now)

    def close(self, reason: str | None) -> None:
        """The request is over: count samples that have no end yet under `reason` (None: refused, never begun)."""
        for index in range(self.params.n):
            if index not in self.ended:
                self.ended.add(index)
                if reason is not None:
                    self.families.finished[reason].inc()

    def _begin(self, output: RequestOutput, now: float) -> None:
        times, families = output.metrics, self.families
        self.first = times.first_token_time if times is not None and times.first_token_time else now
        families.ttft.observe(max(0.0, self.first - self.arrival))
        families.prompt_tokens.inc(len(output.prompt_token_ids))
        families.prompt_sizes.observe(len(output.prompt_token_ids))
        families.n.observe(self.params.n)
        if self.params.max_tokens is not None:
            families.max_tokens.observe(self.params.max_tokens)

    def _end(self, output: RequestOutput, now: float) -> None:
        families, times, first = self.families, output.metrics, self.first or now
        last = times.last_token_time if times is not None and times.last_token_time else now
        longest = max(self.num_tokens.values(), default=0)
        families.e2e.observe(now - self.arrival)
        families.decode.observe(max(0.0, last - first))
        families.generation_sizes.observe(sum(self.num_tokens.values()))
        families.max_sizes.observe(longest)
        if longest > 1:
            gap = max(0.0, last - first) / (longest - 1)
            families.tpot.observe(gap)
            for family in families.gaps if self.num_outputs == 1 else ():
                for _ in range(longest - 1):  # everything came at once: each gap counts as their mean
                    family.observe(gap)
        if times is not None and times.first_scheduled_time is not None:
            families.queue.observe(max(0.0, times.first_scheduled_time - times.arrival_time))
            families.prefill.observe(max(0.0, first - times.first_scheduled_time))
            families.inference.observe(max(0.0, last - times.first_scheduled_time))


class _EngineCollector(Collector):
    """Reads the engine's figures when a scraper asks. Each figure goes out under all of its names."""

    GAUGES = (
        ("num_requests_running", "Requests being computed.", "num_running"),
        ("num_requests_waiting", "Requests that wait.", "num_waiting"),
        ("num_requests_swapped", "Requests swapped out: never any here.", None),
        ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", "kv_usage"),
        ("gpu_cache_usage_perc", "Share of the KV cache in use, 0 to 1 (old name).", "kv_usage"),
        ("cpu_cache_usage_perc", "Share of swapped KV cache: never any here.", None),
    )
    COUNTERS = (
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "num_prefix_queries"),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "num_prefix_hits"),
        ("gpu_prefix_cache_queries", "As prefix_cache_queries (old name).", "num_prefix_queries"),
        ("gpu_prefix_cache_hits", "As prefix_cache_hits (old name).", "num_prefix_hits"),
        ("num_preemptions", "Times a running request was put back.", "num_preemptions"),
    )

    def __init__(self, llm: Backend, labels: Sequence[str]) -> None:
        self.llm = llm
        self.labels = labels

    def describe(self) -> Iterable[Metric]:
        """The names, so that registering does not ask the engine."""
        return self._families(None)

    def collect(self) -> Iterable[Metric]:
        """The figures."""
        return self._families(self.llm.stats())

    def _families(self, stats: StatsView | None) -> Iterator[Metric]:
        for kind, table in ((GaugeMetricFamily, self.GAUGES), (CounterMetricFamily, self.COUNTERS)):
            for name, text, field in table:
                family = kind(f"vllm:{name}", text, labels=LABELS)
                if stats is not None:
                    family.add_metric(self.labels, float(getattr(stats, field)) if field else 0.0)
                yield family
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens computed in a step.", labels=LABELS)
        if stats is not None:
            bounds = [*(str(float(size)) for size in STEP_SIZES), "+Inf"]
            buckets = list(zip(bounds, accumulate(stats.step_sizes), strict=True))
            steps.add_metric(self.labels, buckets, sum_value=float(stats.num_tokens))
        yield steps
