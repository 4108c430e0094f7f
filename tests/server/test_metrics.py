"""Prometheus names that dashboards and routers read, and labels that cannot grow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pelton.server.settings import Limits

NAMES = [
    "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "e2e_request_latency_seconds_count",
    "time_to_first_token_seconds_bucket", "time_per_output_token_seconds_bucket", "prompt_tokens_total",
    "inter_token_latency_seconds_bucket", "request_time_per_output_token_seconds_bucket", "generation_tokens_total",
    "num_requests_running", "num_requests_waiting", "num_requests_swapped", "gpu_cache_usage_perc",
    "kv_cache_usage_perc", "cpu_cache_usage_perc", "request_success_total", "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket", "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum", "request_max_num_generation_tokens_sum", "gpu_prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
    "request_params_n_bucket", "iteration_tokens_total_bucket", "iteration_tokens_total_sum",
]  # fmt: skip


def scrape(live: Any) -> str:
    with live.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def value(text: str, name: str, **labels: str) -> float:
    for line in text.splitlines():
        if line.startswith(name + "{") and all(f'{key}="{wanted}"' in line for key, wanted in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{name} {labels} is missing")


def test_names_and_counts(start: Callable[..., Any]) -> None:
    live = start()
    live.post("/v1/completions", {"prompt": "abc", "max_tokens": 10})
    live.events("/v1/completions", {"prompt": ["abc", "d"], "max_tokens": 10, "stream": True, "n": 2})
    text = scrape(live)
    for name in NAMES:
        assert value(text, f"vllm:{name}", model_name="fake", engine="0") >= 0
    assert value(text, "vllm:prompt_tokens_total") == 4 + 4 + 2
    assert value(text, "vllm:generation_tokens_total") == 10 + 2 * 20
    assert value(text, "vllm:request_success_total", finished_reason="length") == 5
    assert value(text, "vllm:e2e_request_latency_seconds_count") == 3
    assert value(text, "vllm:inter_token_latency_seconds_count") == 9 + 9 + 9
    assert value(text, "vllm:kv_cache_usage_perc") == value(text, "vllm:gpu_cache_usage_perc") == 0.25
    assert value(text, "vllm:prefix_cache_hits_total") == 4
    assert value(text, "vllm:iteration_tokens_total_bucket", le="8.0") == 5
    assert value(text, "vllm:iteration_tokens_total_count") == 6
    assert value(text, "vllm:iteration_tokens_total_sum") == 60


def test_how_requests_ended(start: Callable[..., Any], fake_llm: Any) -> None:
    live = start(fake_llm(fail_after=3), limits=Limits(request_s=0.3))
    live.post("/v1/completions", {"prompt": "a", "n": 2})
    live.post("/v1/completions", {"prompt": "x" * 600})
    live.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
    live.llm.step_s = 1.0
    live.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
    text = scrape(live)
    ends = {reason: value(text, "vllm:request_success_total", finished_reason=reason)
            for reason in ("stop", "length", "error", "abort")}  # fmt: skip
    assert ends == {"stop": 0, "length": 1, "error": 2, "abort": 1}


def test_labels_come_from_fixed_sets(start: Callable[..., Any]) -> None:
    live = start()
    before = scrape(live)
    with live.http() as http:
        for i in range(50):
            http.request(f"FOO{i}", f"/path{i}")
            http.post("/v1/completions", json={"model": f"m{i}", "prompt": "x", "user": f"u{i}"})
            http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "user": f"u{i}"})
    assert scrape(live).count("\n") == before.count("\n")
    assert set(re.findall(r'model_name="([^"]*)"', before)) == {"fake"}


def test_while_the_model_loads(start: Callable[..., Any]) -> None:
    assert scrape(start(loading=True)).strip() == ""
