"""`pelton bench quality`: its figures against transformers and torch, and what it refuses."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pelton.cli.bench_quality import Comparison, cut, documentation, write_logprobs
from pelton.cli.main import main
from pelton.errors import ConfigError
from pelton.text.tokenizer import load_tokenizer
from pelton.weights.files import open_model

WINDOWS = ["--num-windows", "3", "--window", "40"]


@pytest.fixture(scope="module")
def model_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as transformers writes it; its tokens are bytes."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_path / name, folder / name)
    return folder


def quality(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, float]:
    assert main(["bench", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_float32_is_its_own_measure(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quality(capsys, "quality", str(model_path), *WINDOWS, "--dtype", "float32", "--cpu-activations", "fp32")
    assert result["num_tokens"] == 3 * 39
    assert result["kl_divergence_nats"] == {"mean": 0, "p50": 0, "p90": 0, "p99": 0}
    assert result["same_likeliest_token"] == 1
    assert result["perplexity"] == result["perplexity_in_float32"]


def test_perplexity_is_that_of_transformers(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 120)))
    (tmp_path / "text.txt").write_text(text)
    argv = [str(model_path), *WINDOWS, "--dtype", "bfloat16", "--text", str(tmp_path / "text.txt")]
    result = quality(capsys, "--quality", *argv)
    windows = torch.tensor(cut(text, load_tokenizer(open_model(model_path)), 3, 40))
    assert windows.shape == (3, 40)
    with torch.no_grad():
        loss = transformers.LlamaForCausalLM.from_pretrained(model_path)(windows, labels=windows).loss
    assert result["perplexity_in_float32"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert result["perplexity"] == pytest.approx(result["perplexity_in_float32"], rel=0.05)
    assert 0 < result["kl_divergence_nats"]["mean"] < result["kl_divergence_nats"]["p99"] < 0.01
    assert result["same_likeliest_token"] > 0.9


def test_comparison_equals_torch() -> None:
    expected, given = torch.randn(2, 70, 50) * 3
    with tempfile.TemporaryFile() as file:
        write_logprobs(file, expected)
        file.seek(0)
        comparison = Comparison(file)
        comparison.add(given[:9])  # the rows need not come in the same portions
        comparison.add(given[9:])
    logs = expected.log_softmax(-1), given.log_softmax(-1)
    kl = torch.nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(comparison.divergences, kl, rtol=1e-5)
    assert comparison.agree == (expected.argmax(-1) == given.argmax(-1)).tolist()


def test_the_text_has_to_be_long_enough(tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("short")
    assert main(["bench", "quality", str(model_path), *WINDOWS, "--text", str(tmp_path / "text.txt")]) == 2
    assert "the text has 5 tokens, too few for 3 windows of 40" in capsys.readouterr().err


class Words:
    """A tokenizer whose tokens are numbers in a text, and which begins a text with 0."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [int(word) for word in text.split()]


def test_windows_are_spread_and_begin_a_text() -> None:
    assert cut("1 2 3 4 5 6 7 8 9", Words(), 2, 4) == [[0, 1, 2, 3], [0, 5, 6, 7]]
    with pytest.raises(ConfigError, match="--window 2 is too short to predict anything; use 3 or more"):
        cut("1 2 3 4", Words(), 1, 2)


def test_documentation_is_prose() -> None:
    text = documentation()
    assert len(text) > 50_000
    assert "  " not in text
    assert all(paragraph.endswith(".") for paragraph in text.split("\n\n"))
