"""Every architecture gives transformers' logits, whichever way the engine cuts the work up."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pelton.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig, make_groups
from pelton.engine.core import EngineCore
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, TokenLogprobs
from pelton.errors import ModelFormatError
from pelton.models import ARCHITECTURES, find_model
from pelton.runner.kv_cache import KVCache
from pelton.runner.model_runner import ModelRunner
from pelton.types import SamplingParams
from pelton.weights.dummy import DummyCheckpoint
from pelton.weights.files import text_config

PROMPT_LEN, NEW_TOKENS, BLOCK_SIZE = 45, 12, 16  # blocks of 16 are those the CPU's kernels read
TOLERANCE = 1e-4  # float32, between two orders of the same sums


def make_engine(
    pair: Any, chunk: int = 512, num_blocks: int = 400, prefix_caching: bool = True, enforce_eager: bool = False
) -> EngineCore:
    kv_layers = find_model(pair.config).kv_layers(pair.config)
    cache = CacheConfig(BLOCK_SIZE, num_blocks, make_groups(kv_layers), prefix_caching)
    scheduler = SchedulerConfig(8, chunk, 64, 128, True)
    config = EngineConfig(
        ModelConfig("float32", 128), cache, scheduler, DeviceConfig("cpu", 1, enforce_eager, 0), (), ()
    )
    kv = KVCache(cache, kv_layers, torch.device("cpu"))
    for layer in kv.layers:
        layer.key.fill_(torch.nan)  # whoever reads a slot that was not written is found out
        layer.value.fill_(torch.nan)
    return EngineCore(Scheduler(scheduler, cache), ModelRunner(pair.model, kv, config))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (3, 1, 4), (4, 4, 6)])
def test_the_smallest_shapes_run(architecture: str, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    config = text_config({
        "architectures": [architecture], "vocab_size": 3, "hidden_size": 1, "intermediate_size": 1,
        "num_hidden_layers": 2, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim, "sliding_window": 1, "query_pre_attn_scalar": 2,
    })  # fmt: skip
    model = find_model(config).load(DummyCheckpoint(config, torch.float32, torch.device("cpu")))
    tokens, scores, _ = run(make_engine(SimpleNamespace(config=config, model=model)), {1: [0, 1, 2]})[1]
    assert len(tokens) == NEW_TOKENS
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("LlamaForCausalLM", {"num_attention_heads": 100}, "hidden_size 48 is not a multiple of num_attention_heads"),
        ("LlamaForCausalLM", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}, "num_attention_heads 6 .* num_key_value_heads 4"),
        ("Qwen3ForCausalLM", {"num_key_value_heads": 12}, "num_attention_heads 6 .* num_key_value_heads 12"),
        ("Gemma3ForCausalLM", {"head_dim": 7}, "head_dim 7 .* must be even"),
        ("MistralForCausalLM", {"head_dim": 1026}, "head_dim 1026 .* at most 1024"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}, "holds 'chunked_attention'"),
    ],
)
def test_shapes_that_cannot_be(architecture: str, config: dict[str, Any], message: str) -> None:
    base = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 2, "vocab_size": 99}
    with pytest.raises(ModelFormatError, match=message):
        find_model({"architectures": [architecture]}).kv_layers({**base, **config})


@pytest.mark.parametrize("parameters", [{"full_attention": {}}, {"full_attention": {}, "sliding_attention": 3}, [1]])
def test_rope_of_gemma3_that_cannot_be(parameters: Any) -> None:
    config = {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "vocab_size": 3,
              "num_hidden_layers": 1, "rope_parameters": parameters}
    with pytest.raises(ModelFormatError, match="field (sliding_attention|rope_parameters) (is missing|must be)"):
        find_model(config).load(DummyCheckpoint(config, torch.float32, torch.device("cpu")))


def prompt(seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 199, (PROMPT_LEN,), generator=generator).tolist()


def run(
    engine: EngineCore, prompts: dict[int, list[int]], preempt_at: tuple[int, ...] = (), **params: Any
) -> dict[int, Any]:
    """Greedy tokens and logprobs of each prompt; every structure is checked after every step. Before the steps
    `preempt_at` the engine is made to take the blocks of the request that ranks last."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, **params)
    for request_id, token_ids in prompts.items():
        engine.submit(EngineRequest(request_id, token_ids, sampling))
    tokens: dict[int, list[int]] = {i: [] for i in prompts}
    scores: dict[int, list[float]] = {i: [] for i in prompts}
    scored_prompts: dict[int, list[TokenLogprobs | None]] = {}
    for step in itertools.count():
        if not engine.has_work():
            break
        if step in preempt_at:
            engine.scheduler._preempt(engine.scheduler._running[-1])
        for update in engine.step():
            assert update.error is None, update.error
            tokens[update.request_id] += update.token_ids
            scores[update.request_id] += [entry.logprobs[0] for entry in update.logprobs or []]
            if update.prompt_logprobs is not None:
                scored_prompts[update.request_id] = update.prompt_logprobs
        engine.scheduler.check()
    return {i: (tokens[i], torch.tensor(scores[i]), scored_prompts.get(i)) for i in prompts}


def test_logits_equal_transformers(pair: Any) -> None:
    token_ids = prompt()
    got = run(make_engine(pair), {1: token_ids}, prompt_logprobs=0)[1]
    with torch.no_grad():
        expected_tokens = pair.reference.generate(
            torch.tensor([token_ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        logprobs = torch.log_softmax(pair.reference(expected_tokens[None]).logits[0].float(), dim=-1)
    expected = logprobs[:-1].gather(1, expected_tokens[1:, None])[:, 0]
    assert got[0] == expected_tokens[PROMPT_LEN:].tolist()
    scored = torch.tensor([entry.logprobs[0] for entry in got[2][1:]] + got[1].tolist())
    torch.testing.assert_close(scored, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture
def whole(pair: Any) -> tuple[list[int], torch.Tensor]:
    """The prompt in one chunk, alone: what every other way must give."""
    tokens, scores, _ = run(make_engine(pair), {1: prompt()})[1]
    return tokens, scores


def assert_same(got: tuple[list[int], torch.Tensor, Any], whole: tuple[list[int], torch.Tensor]) -> None:
    assert got[0] == whole[0]
    torch.testing.assert_close(got[1], whole[1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_equals_whole(pair: Any, whole: Any, chunk: int) -> None:
    assert_same(run(make_engine(pair, chunk=chunk), {1: prompt()})[1], whole)


def test_prefix_hit_equals_miss(pair: Any, whole: Any) -> None:
    engine = make_engine(pair)
    run(engine, {1: prompt()})
    assert_same(run(engine, {2: prompt()})[2], whole)
    assert engine.scheduler.stats().num_prefix_hits > 0


def test_preempted_equals_not(pair: Any, whole: Any) -> None:
    """In the middle of the prompt, and twice between generated tokens; once with a prefix to find again."""
    for prefix_caching in (False, True):
        engine = make_engine(pair, chunk=32, prefix_caching=prefix_caching)
        results = run(engine, {1: prompt(5), 2: prompt()}, preempt_at=(2, 7, 9))
        assert engine.scheduler.stats().num_preemptions == 3
        assert_same(results[2], whole)


def test_in_a_batch_equals_alone(pair: Any, whole: Any) -> None:
    assert_same(run(make_engine(pair, chunk=40), {i: prompt(i) for i in (3, 1, 0, 2)})[0], whole)


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_an_eager_step_ends_with_the_rows_that_are_wanted(
    pair: Any, whole: Any, prompt_logprobs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is sampled, or all where the prompt is scored."""
    sizes, forward = [], pair.model.forward

    def noted(batch: Any) -> torch.Tensor:
        hidden = forward(batch)
        sizes.append((len(batch.token_ids), len(hidden)))
        return hidden

    monkeypatch.setattr(pair.model, "forward", noted)
    engine = make_engine(pair, chunk=16, enforce_eager=True)
    assert_same(run(engine, {1: prompt()}, prompt_logprobs=prompt_logprobs)[1], whole)
    assert sizes[:4] == [(n, n if prompt_logprobs == 0 else 1) for n in (16, 16, 13, 1)]
