"""Several ranks, here threads, compute what one does: every architecture, every layout, chunks, and failures."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch

from pelton.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig, make_groups
from pelton.engine.core import EngineCore
from pelton.engine.messages import Finish, Meet, Met
from pelton.engine.ranks import TeamRunner
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest
from pelton.engine.wire import FrameParser, encode
from pelton.engine.worker import work
from pelton.errors import ConfigError, EngineDeadError
from pelton.models import ARCHITECTURES, find_model
from pelton.ops.native import native
from pelton.ops.parallel import ALONE, Ranks
from pelton.runner.kv_cache import KVCache
from pelton.runner.model_runner import ModelRunner
from pelton.types import SamplingParams
from pelton.weights.dummy import LAYOUTS, DummyCheckpoint
from pelton.weights.files import text_config

CPU = torch.device("cpu")
VOCAB_SIZE = 300
TOLERANCE = 1e-4  # of log-probabilities in float32: the ranks' sums have another order
PROMPTS = [[(37 * i + 11 * k * k) % VOCAB_SIZE for k in range(3 + 29 * i)] for i in range(3)]
Build = Callable[..., EngineCore]


def config_of(architecture: str, **fields: Any) -> dict[str, Any]:
    """Shapes that two ranks can share in every layout: 256 columns of down_proj and o_proj for each."""
    return text_config({
        "architectures": [architecture], "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "sliding_window": 24, "query_pre_attn_scalar": 64, "max_position_embeddings": 512, "attention_bias": True,
        "mlp_bias": True, **fields,
    })  # fmt: skip


def make_runner(config: dict[str, Any], ranks: Ranks, layout: str | None) -> tuple[ModelRunner, Scheduler]:
    architecture = find_model(config)
    kv_layers = architecture.kv_layers(config, ranks)
    cache = CacheConfig(16, 200, make_groups(kv_layers), False)
    scheduler = SchedulerConfig(8, 48, 64, 512, True)
    engine = EngineConfig(ModelConfig("float32", 512), cache, scheduler, DeviceConfig("cpu", 1, False, 0), (), ())
    checkpoint = DummyCheckpoint(config, torch.float32, CPU, scale=0.05, layout=layout, ranks=ranks)
    model = architecture.load(checkpoint)
    return ModelRunner(model, KVCache(cache, kv_layers, CPU), engine, None, ranks), Scheduler(scheduler, cache)


class Threads:
    """Stands for ranks.Workers: the other ranks are threads, and messages go through the wire's bytes."""

    def __init__(self, runners: list[ModelRunner]) -> None:
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.orders: list[SimpleQueue[Any]] = [SimpleQueue() for _ in runners]
        self.num_meetings = 0
        self.threads = [
            threading.Thread(target=self._work, args=pair) for pair in zip(runners, self.orders, strict=True)
        ]
        for thread in self.threads:
            thread.start()

    def _work(self, runner: ModelRunner, orders: SimpleQueue[Any]) -> None:
        with contextlib.suppress(IndexError):  # see close
            work(runner, orders, self.answers.put)

    def send(self, order: Any) -> None:
        for orders in self.orders:
            orders.put(*FrameParser().feed(encode(order)))

    def meet(self, place: int, failure: Exception) -> None:
        self.num_meetings += 1
        self.send(Meet())
        with contextlib.suppress(Empty):
            if all(self.answers.get(timeout=20) == Met(place) for _ in self.orders):
                return
        raise EngineDeadError("the ranks are not in step") from failure

    def check(self) -> None:
        """They live."""

    def close(self) -> None:
        for _ in range(2):  # a step is finished that was never begun, and nobody asks for a meeting
            self.send(Finish(-1))
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def team(in_ranks: Any) -> Iterator[Build]:
    """Makes engines of several ranks."""
    made: list[Threads] = []

    def make(config: dict[str, Any], size: int, layout: str | None = None) -> EngineCore:
        (first, scheduler), *others = in_ranks(size, lambda ranks: make_runner(config, ranks, layout))
        made.append(Threads([runner for runner, _ in others]))
        return EngineCore(scheduler, TeamRunner(first, made[-1]))  # type: ignore[arg-type]

    yield make
    for workers in made:
        workers.close()


def alone(config: dict[str, Any], layout: str | None = None) -> EngineCore:
    runner, scheduler = make_runner(config, ALONE, layout)
    return EngineCore(scheduler, runner)


def run(core: EngineCore, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[Any]:
    """For each prompt, submitted together, and for what was submitted before: the tokens, log-probabilities of the
    prompt and of these, and why it failed."""
    params = {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 0, "max_tokens": 8, "ignore_eos": True, **params}
    for i, prompt in enumerate(prompts):
        core.submit(EngineRequest(i, prompt, SamplingParams(**params)))
    found: dict[int, Any] = {}
    while core.has_work():
        for update in core.step():
            tokens, scores, _ = found.get(update.request_id, ([], [], None))
            tokens += update.token_ids
            entries = [*(update.prompt_logprobs or []), *(update.logprobs or [])]
            scores += [entry.logprobs[0] for entry in entries if entry is not None]
            found[update.request_id] = tokens, scores, update.error
    core.step()
    return [found[i] for i in sorted(found)]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for (tokens, scores, error), (expected_tokens, expected_scores, _) in zip(found, expected, strict=True):
        assert error is None and tokens == expected_tokens and len(scores) == len(expected_scores) > len(tokens)
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected_scores), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_two_ranks_compute_what_one_does(team: Build, architecture: str) -> None:
    config = config_of(architecture)
    assert_same(run(team(config, 2)), run(alone(config)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])
def test_every_layout_is_shared(team: Build, architecture: str, layout: str) -> None:
    if layout == "w8a8" and native is None:
        pytest.skip("input that is rounded: see below")
    config = config_of(architecture)
    assert_same(run(team(config, 2, layout)), run(alone(config, layout)))


def test_input_that_each_rank_rounds_by_itself(team: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """w8a8 by its definition, as on a GPU: log-probabilities of a prompt, which are about -6."""
    monkeypatch.setattr("pelton.weights.checkpoint.pack", lambda weight, *options: weight)
    config = config_of("LlamaForCausalLM")
    (_, found, error), (_, expected, _) = (run(core, PROMPTS[2:], max_tokens=1)[0] for core in (
        team(config, 2, "w8a8"), alone(config, "w8a8")))  # fmt: skip
    off = (torch.tensor(found[:-1]) - torch.tensor(expected[:-1])).abs()
    assert error is None and len(off) == len(PROMPTS[2]) - 1
    assert 0 < off.mean() < 0.04 and off.max() < 0.15


@pytest.mark.parametrize(
    ("size", "fields"),
    [(4, {}), (2, {"vocab_size": 299}), (2, {"tie_word_embeddings": True}), (3, {"num_attention_heads": 6,
      "num_key_value_heads": 1, "intermediate_size": 48})],
    ids=["fewer key heads than ranks", "a vocabulary that does not divide", "a head tied to the embedding", "three"],
)  # fmt: skip
def test_other_ways_to_share(team: Build, size: int, fields: dict[str, Any]) -> None:
    config = config_of("LlamaForCausalLM", **fields)
    prompts = [[token_id % 299 for token_id in prompt] for prompt in PROMPTS]
    assert_same(run(team(config, size), prompts), run(alone(config), prompts))


def test_a_rank_keeps_its_share_only() -> None:
    config = config_of("LlamaForCausalLM", attention_bias=False)
    runners = [make_runner(config, Ranks(rank, 2), None)[0] for rank in range(2)]
    for runner in runners:
        block = runner.model.blocks[0]  # type: ignore[attr-defined]
        shapes = [weight.shape for weight in (block.attn.qkv.weight, block.attn.out.weight, block.mlp.gate_up.weight,
                                              block.mlp.down.weight, runner.model.lm_head.weight)]  # fmt: skip
        assert shapes == [(512, 256), (256, 256), (512, 256), (256, 256), (150, 256)]
        assert runner.kv.layers[0].key.shape[2] == 1
    first, second = (runner.model.blocks[0].mlp.down for runner in runners)  # type: ignore[attr-defined]
    assert first.bias is not None and second.bias is None


@pytest.mark.parametrize(
    ("size", "fields", "message"),
    [
        (3, {}, "4 heads and 2 key and value heads cannot be shared evenly; use one of 1, 2, 4"),
        (8, {}, "use one of 1, 2, 4"),
        (2, {"num_attention_heads": 6, "num_key_value_heads": 3}, "use one of 1, 3, 6"),
        (2, {"intermediate_size": 513}, r"outputs of model.layers.0.mlp.gate_proj, .*up_proj, 513; use a size"),
        (4, {"intermediate_size": 2}, r"inputs of model.layers.0.mlp.down_proj, 2; use a size"),
    ],
)
def test_sizes_that_cannot_be(size: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make_runner(config_of("LlamaForCausalLM", **fields), Ranks(0, size), None)
    assert "--tensor-parallel-size" in str(refused.value) and "\n" not in str(refused.value)


# --- what only rank 0 knows, and what fails ---------------------------------------------------------------------------


def test_functions_of_a_request_stay_on_rank_0(team: Build) -> None:
    config = config_of("LlamaForCausalLM")

    def only_seven(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(logits)) == 7, logits, -torch.inf)

    found = run(team(config, 2), logits_processors=[only_seven], extra_args={"any": object()})
    assert [tokens for tokens, _, _ in found] == [[7] * 8] * 3


def test_seeds_and_penalties_are_rank_0s(team: Build) -> None:
    config, params = config_of("Qwen2ForCausalLM"), {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}
    assert_same(run(team(config, 2), **params), run(alone(config), **params))


def test_a_request_that_fails_in_sampling_fails_alone(team: Build) -> None:
    config = config_of("LlamaForCausalLM")
    core, expected = team(config, 2), run(alone(config))

    def fail(prompt_ids: list[int], token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    bad = SamplingParams(temperature=0.0, logits_processors=[fail])
    core.submit(EngineRequest(3, [1, 2, 3], bad))
    *found, (_, _, error) = run(core)
    assert "mine" in error
    assert_same(found, expected)


def test_a_step_that_fails_on_all_ranks_is_halved(team: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank refuses a prompt of 61 tokens' last chunk, in the middle of its forward pass."""
    config = config_of("LlamaForCausalLM")
    expected = run(alone(config))
    core = team(config, 2)
    forward = find_model(config).forward

    def failing(self: Any, batch: Any) -> torch.Tensor:
        if 60 in batch.positions:
            raise RuntimeError("a kernel failed")
        return forward(self, batch)

    monkeypatch.setattr(find_model(config), "forward", failing)
    found = run(core)
    assert core.runner.workers.num_meetings > 0  # type: ignore[attr-defined]
    assert "a kernel failed" in found[2][2]
    assert_same(found[:2], expected[:2])


def test_steps_that_do_not_fit_change_no_output(team: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all ranks, in the middle of what they compute: steps are halved, a prompt's chunk too, and the next are
    smaller."""
    config = config_of("LlamaForCausalLM")
    expected = run(alone(config))
    core = team(config, 2)
    logits = find_model(config).logits

    def limited(self: Any, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits(self, hidden, out)

    monkeypatch.setattr(find_model(config), "logits", limited)
    assert_same(run(core), expected)
    assert core.runner.workers.num_meetings > 3  # type: ignore[attr-defined]
    core.scheduler.check()


def test_samples_that_do_not_fit_change_no_output(team: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out on rank 0 alone, where it alone works."""
    config = config_of("LlamaForCausalLM")
    core = team(config, 2)
    leader = core.runner.runner.sampler  # type: ignore[attr-defined]
    sampler = leader._sampler

    def limited(states: Any, logits: torch.Tensor) -> Any:
        if len(states) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sampler(states, logits)

    monkeypatch.setattr(leader, "_sampler", limited)
    assert_same(run(core), run(alone(config)))
    assert core.runner.workers.num_meetings > 0  # type: ignore[attr-defined]
    core.scheduler.check()
