"""`pelton bench`: what is sent, what is computed, and a server that fails some requests."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pelton.cli.bench import summarize
from pelton.cli.main import main
from pelton.types import RequestOutput


def test_summarize_uses_nearest_ranks() -> None:
    assert summarize([float(i) for i in range(1, 101)]) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert summarize([3.0]) == {"mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0}


def test_latency(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "m.gguf", "--batch-size", "3", "--num-iters", "2", "--input-len", "7", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["batch_size"], result["input_len"], result["num_iters"]) == (3, 7, 2)
    assert set(result["latency_s"]) == {"mean", "p50", "p90", "p99"}
    assert len(fake_llm.seen) == 3  # one to warm up
    prompts, params = fake_llm.seen[0]
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [7, 7, 7]
    assert params.ignore_eos
    assert params.max_tokens == 64


def test_throughput_table(fake_llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "m.gguf", "--num-prompts", "5"]) == 0
    assert "output tokens per s" in capsys.readouterr().out


def test_nothing_is_measured_where_a_request_fails(
    fake_llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [RequestOutput("0", None, [1], [], True, error="the model's logits are not finite")]
    monkeypatch.setattr(fake_llm, "generate", lambda *given, **options: outputs)
    assert main(["bench", "latency", "m.gguf"]) == 2
    assert "nothing was measured: the model's logits are not finite" in capsys.readouterr().err


class Server(http.server.BaseHTTPRequestHandler):
    """Streams three chunks; every prompt that begins with an odd token fails."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chunks: list[dict[str, Any]] = [{"choices": [{"text": "a"}]}] * 3
        chunks += [{"choices": [], "usage": {"completion_tokens": 3}}]
        if body["prompt"][0] % 2:
            chunks = [{"error": {"message": "no"}}]
        self.reply(b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n")

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_serve(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", "--base_url", url, "--num-prompts", "20", "--request-rate", "1000", "--json"]
    assert main(argv) == 1  # some requests failed
    result = json.loads(capsys.readouterr().out)
    assert result["num_completed"] + result["num_failed"] == 20
    assert 0 < result["num_failed"] < 20
    assert result["first_error"] == "{'message': 'no'}"
    assert {"ttft_ms", "tpot_ms", "itl_ms", "latency_ms"} < result.keys()
    assert result["output_tokens_per_s"] == pytest.approx(3 * result["num_completed"] / result["seconds"])
