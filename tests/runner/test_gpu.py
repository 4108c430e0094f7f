"""Every architecture in every weight layout on a GPU, held to the same weights in float32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pelton import ops
from pelton.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig, make_groups
from pelton.engine.core import EngineCore
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, TokenLogprobs
from pelton.layers.batch import Batch
from pelton.models import ARCHITECTURES, find_model
from pelton.quant.layout import Dense, LinearWeight
from pelton.runner.kv_cache import KVCache
from pelton.runner.model_runner import ModelRunner
from pelton.types import SamplingParams
from pelton.weights.dummy import LAYOUTS, DummyCheckpoint
from pelton.weights.files import text_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCAB_SIZE = 512
# How far log-probabilities, which are about -7, may be from float32's: mean and most. About twice what plain torch in
# the same dtype shows with these weights; with Gemma's norms after each half, rounding of the residual stream grows.
# With w8a8, twice what its definition shows in float32, which rounds the input of each product.
TOLERANCE = {"float16": (0.008, 0.06), "bfloat16": (0.03, 0.2), "Gemma in bfloat16": (0.1, 1.2),
             "w8a8": (0.06, 0.25), "Gemma in w8a8": (0.25, 2.0)}
PROMPTS = [[(37 * i + 11 * k * k) % VOCAB_SIZE for k in range(3 + 41 * i)] for i in range(5)]


class Copied(DummyCheckpoint):
    """The weights of another checkpoint, as float32 on the CPU."""

    def __init__(self, source: DummyCheckpoint) -> None:
        super().__init__(source.config, torch.float32, torch.device("cpu"))
        self.source = source

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.source.at(self._prefix).tensor(name, shape).float().cpu()

    def linear(
        self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None
    ) -> LinearWeight:
        return Dense(self.source.at(self._prefix).linear(name, shape, rows, columns).dequantize().float().cpu())


def config_of(architecture: str, **changes: int) -> dict[str, Any]:
    return text_config({
        "architectures": [architecture], "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "sliding_window": 32, "query_pre_attn_scalar": 64, "max_position_embeddings": 512,
        **changes,
    })  # fmt: skip


def make_engine(
    checkpoint: DummyCheckpoint, dtype: str, enforce_eager: bool = False, limits: tuple[int, int] = (8, 128),
    num_blocks: int = 200, caching: bool = False, lazy_capture: bool = False,
) -> EngineCore:
    """limits: requests and tokens of a step."""
    config, kind = checkpoint.config, checkpoint.device.type
    architecture = find_model(config)
    kv_layers = architecture.kv_layers(config)
    cache = CacheConfig(64 if kind == "cuda" else 16, num_blocks, make_groups(kv_layers), caching, dtype)
    scheduler = SchedulerConfig(*limits, 1000, 512, True, checkpoint.deterministic)
    device = DeviceConfig(
        kind, 1, enforce_eager, 0, deterministic=checkpoint.deterministic, lazy_capture=lazy_capture,
        apart=checkpoint.deterministic and checkpoint._layout is not None,
    )
    engine = EngineConfig(ModelConfig(dtype, 512), cache, scheduler, device, (), ())
    kv = KVCache(cache, kv_layers, checkpoint.device)
    return EngineCore(Scheduler(scheduler, cache), ModelRunner(architecture.load(checkpoint), kv, engine))


def run(
    core: EngineCore, prompts: list[list[int]], first_id: int = 0, **params: Any
) -> list[tuple[list[int], list[float], list[float]]]:
    """For each prompt, submitted together: the tokens, their log-probabilities, and those of the prompt."""
    for i, prompt in enumerate(prompts, first_id):
        core.submit(EngineRequest(i, prompt, SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0, **params)))
    tokens: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    prompt_scores: list[list[float]] = [[] for _ in prompts]

    def first(entry: TokenLogprobs | None) -> list[float]:
        return [] if entry is None else entry.logprobs[:1]

    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            i = update.request_id - first_id
            tokens[i] += update.token_ids
            scores[i] += [value for entry in update.logprobs or [] for value in first(entry)]
            prompt_scores[i] += [value for entry in update.prompt_logprobs or [] for value in first(entry)]
    core.step()
    return list(zip(tokens, scores, prompt_scores, strict=True))


def close(a: list[float], b: list[float], tolerance: tuple[float, float]) -> None:
    off = (torch.tensor(a) - torch.tensor(b)).abs()
    mean, most = tolerance
    assert off.mean() < mean and off.max() < most, (float(off.mean()), float(off.max()))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_numbers_of_the_cpu(architecture: str, layout: str | None) -> None:
    dtype = "float16" if architecture.startswith("Qwen") else "bfloat16"
    source = DummyCheckpoint(
        config_of(architecture), getattr(torch, dtype), torch.device("cuda"), scale=0.05, layout=layout
    )
    kind = "w8a8" if layout == "w8a8" else dtype
    tolerance = TOLERANCE[f"Gemma in {kind}" if architecture.startswith("Gemma") else kind]
    on_gpu, on_cpu = make_engine(source, dtype), make_engine(Copied(source), "float32")
    found = run(on_gpu, PROMPTS, max_tokens=24, prompt_logprobs=0)
    expected = run(on_cpu, PROMPTS, max_tokens=1, prompt_logprobs=0)
    for (_, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
        close(ours, theirs, tolerance)
    continued = [prompt + tokens for prompt, (tokens, _, _) in zip(PROMPTS, found, strict=True)]
    checked = run(on_cpu, continued, max_tokens=1, prompt_logprobs=0)
    for (_, scores, _), (_, _, theirs) in zip(found, checked, strict=True):
        close(scores, theirs[-24:], tolerance)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_the_same_text_in_float32(architecture: str) -> None:
    source = DummyCheckpoint(config_of(architecture), torch.float32, torch.device("cuda"), scale=0.05)
    found = run(make_engine(source, "float32"), PROMPTS, max_tokens=24)
    assert [tokens for tokens, _, _ in found] == [
        tokens for tokens, _, _ in run(make_engine(Copied(source), "float32"), PROMPTS, max_tokens=24)
    ]


@pytest.mark.parametrize("limits", [(8, 128), (8, 600)])
@pytest.mark.parametrize("layout", [None, "gptq", "fp8", "w8a8"])
def test_captured_and_eager_steps_give_the_same_bits(layout: str | None, limits: tuple[int, int]) -> None:
    source = DummyCheckpoint(config_of("LlamaForCausalLM"), torch.bfloat16, torch.device("cuda"), layout=layout)
    captured, eager = (make_engine(source, "bfloat16", flag, limits) for flag in (False, True))
    for first_id, scored in ((0, None), (10, 0)):
        results = [run(core, PROMPTS, first_id, max_tokens=24, prompt_logprobs=scored) for core in (captured, eager)]
        assert results[0] == results[1]
    assert captured.runner.prompts.num_replays >= -(-sum(map(len, PROMPTS)) // limits[1])
    assert eager.runner.prompts is None


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("LlamaForCausalLM", None), ("LlamaForCausalLM", "w8a8"), ("LlamaForCausalLM", "gptq"),
     ("Gemma3ForCausalLM", None)],
)  # fmt: skip
def test_tokens_of_no_request_reach_no_other(
    architecture: str, layout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fills up a step: attention leaves its rows as it finds them."""
    source = DummyCheckpoint(config_of(architecture), torch.bfloat16, torch.device("cuda"), layout=layout)
    expected = run(make_engine(source, "bfloat16", limits=(8, 600)), PROMPTS, max_tokens=24)
    empty, sizes = torch.empty, set()

    def spoilt(*args: Any, **options: Any) -> Tensor:
        found = empty(*args, **options)
        if not found.is_cuda or found.dtype != torch.bfloat16:
            return found
        sizes.add(found.shape)
        return found.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", spoilt)
    core = make_engine(source, "bfloat16", limits=(8, 600))
    assert run(core, PROMPTS, max_tokens=24) == expected
    assert (448, 4, 64) in sizes  # what attention gives, of the step with all prompts


def test_no_request_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled at start: for requests alone, a few and many, and for prompts, captured or not."""
    source = DummyCheckpoint(config_of("LlamaForCausalLM"), torch.bfloat16, torch.device("cuda"))
    core = make_engine(source, "bfloat16", limits=(200, 2048), num_blocks=1000)
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["repr"]))
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS * 40):
        run(core, prompts, max_tokens=8)
    assert not [name for name in compiled if "_decode_kernel" in name or "_chunk_kernel" in name]


def test_no_deterministic_request_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short chunks and long, of scored prompts, and of a head of quantised weights that are opened."""
    from triton import knobs

    from pelton.ops.cuda import program, tiles

    tiles._function.cache_clear()
    core = make_engine(deterministic("LlamaForCausalLM", "gguf", Headed), "bfloat16", limits=(8, 2048), num_blocks=1000)
    compiled, cubin = list[str](), program._cubin
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["repr"]))
    monkeypatch.setattr(program, "_cubin", lambda text, name, flags: compiled.append(name) or cubin(text, name, flags))
    short = [PROMPTS[4][:5], PROMPTS[4][5:12]]
    for i, prompts in enumerate((PROMPTS[:1], PROMPTS, PROMPTS * 3, short, [*short, *PROMPTS])):
        for scored in (None, 0):
            run(core, prompts, 100 * i + 50 * (scored is None), max_tokens=8, prompt_logprobs=scored)
    assert not [name for name in compiled if name.endswith(".cu") or name.startswith(("_kernel", "_decode", "_chunk"))]


def test_only_compiling_launches_nothing() -> None:
    from pelton.ops.cuda import launch, rows  # they need Triton

    x, gain = torch.randn(3, 1000, device="cuda"), torch.full((1000,), 2.0, device="cuda")
    out = torch.zeros_like(x)
    rows._norm_kernel.device_caches.clear()
    with launch.only_compiling():
        rows._normalise(out, x, gain, 0.0, add=False)
    assert not out.any()
    rows._normalise(out, x, gain, 0.0, add=False)
    assert (out - ops.rms_norm.reference(x, gain, 0.0)).abs().max() < 1e-5


def test_steps_begun_ahead_change_nothing() -> None:
    """Requests that end at different times, sampled with temperature: alone and together, ahead or not."""
    source = DummyCheckpoint(config_of("LlamaForCausalLM"), torch.float32, torch.device("cuda"))
    core, plain = make_engine(source, "float32"), make_engine(source, "float32")
    plain.runner.start = lambda plan: None  # type: ignore[method-assign]
    results = [draw(engine, [{"temperature": 0.8, "top_p": 0.9}]) for engine in (core, plain)]
    assert results[0] == results[1]


def draw(core: EngineCore, kinds: list[dict[str, Any]], first_id: int = 0) -> list[list[int]]:
    """The tokens of each prompt, which end at different times, sampled by what `kinds` say in turn."""
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(seed=i, max_tokens=5 + 7 * i, ignore_eos=True, **kinds[i % len(kinds)])
        core.submit(EngineRequest(first_id + i, prompt, params))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens[update.request_id - first_id] += update.token_ids
    return tokens


@pytest.mark.parametrize(
    ("kinds", "is_captured"),
    [
        ([{"temperature": 0.0}], {True}),
        ([{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 2.0, "top_k": 20},
          {"temperature": 0.0}, {"temperature": 1.5, "min_p": 0.01, "top_k": 90, "top_p": 0.95}], {True}),
        ([{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 1}, {"temperature": 1.0}, {"temperature": 1.0},
          {"temperature": 1.0, "top_k": 5}], {False, True}),  # until the second one has ended
        ([{"temperature": 1.0, "logit_bias": {3: 2.0}}], {False}),
    ],
    ids=("greedy", "drawn", "mixed", "changed"),
)  # fmt: skip
def test_sampling_in_captured_steps(kinds: list[dict[str, Any]], is_captured: set[bool]) -> None:
    """The tokens are those of steps that are sampled after their graphs, and of eager ones."""
    source = deterministic("LlamaForCausalLM", None)
    captured, after = (make_engine(source, "bfloat16", limits=(8, 600)) for _ in range(2))
    eager = make_engine(source, "bfloat16", enforce_eager=True, limits=(8, 600))
    found: set[bool] = set()
    draws = captured.runner.sampler.draws

    def spy(*args: Any) -> Any:
        told = draws(*args)
        found.add(told is not None)
        return told

    captured.runner.sampler.draws, after.runner.sampler.draws = spy, lambda *args: None
    for first_id in (0, 10):
        tokens = draw(captured, kinds, first_id)
        assert tokens == draw(after, kinds, first_id) == draw(eager, kinds, first_id)
        assert [len(row) for row in tokens] == [5, 12, 19, 26, 33]
    assert found == is_captured


def test_long_prompts_are_computed_at_once_or_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = DummyCheckpoint(config_of("LlamaForCausalLM"), torch.bfloat16, torch.device("cuda"), scale=0.05)
    prompts = [PROMPTS[3], PROMPTS[4][:100]]
    in_chunks = run(make_engine(source, "bfloat16"), prompts, max_tokens=1, prompt_logprobs=0)
    monkeypatch.setattr("pelton.runner.graph.CAPTURED_TOKENS", 32)
    monkeypatch.setattr("pelton.runner.model_runner.LONG_PROMPT", 33)
    at_once = [run(make_engine(source, "bfloat16"), [prompt], max_tokens=1, prompt_logprobs=0)[0] for prompt in prompts]
    for (_, _, ours), (_, _, theirs) in zip(at_once, in_chunks, strict=True):
        close(ours, theirs, TOLERANCE["bfloat16"])


class Headed(DummyCheckpoint):
    """Its head is quantised, too."""

    def linear(
        self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None
    ) -> LinearWeight:
        if self.full_name(name) != "lm_head.weight" or self._layout is None:
            return super().linear(name, shape, rows, columns)
        return LAYOUTS[self._layout](shape, self._scale, self._generator(name))


def deterministic(
    architecture: str, layout: str | None, kind: type[DummyCheckpoint] = DummyCheckpoint, vocab_size: int = 1543
) -> DummyCheckpoint:
    """Large enough for sums in parts, with rows of logits that begin anywhere."""
    config = config_of(architecture, vocab_size=vocab_size, hidden_size=1024, intermediate_size=2048)
    cuda = torch.device("cuda")
    return kind(config, torch.bfloat16, cuda, scale=0.03, layout=layout, deterministic=True)


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("LlamaForCausalLM", None), ("Gemma2ForCausalLM", None), ("Gemma3ForCausalLM", None), ("Qwen2ForCausalLM", None),
     ("LlamaForCausalLM", "gptq"), ("LlamaForCausalLM", "gguf"), ("LlamaForCausalLM", "compressed-tensors"),
     ("LlamaForCausalLM", "fp8"), ("LlamaForCausalLM", "w8a8")],
)  # fmt: skip
def test_deterministic_requests_do_not_depend_on_their_company(architecture: str, layout: str | None) -> None:
    check_company(deterministic(architecture, layout))


@pytest.mark.parametrize("vocab_size", [1543, 1552])
def test_nor_with_a_quantised_head(vocab_size: int) -> None:
    """Which is opened for prompts, or multiplied as it is."""
    check_company(deterministic("LlamaForCausalLM", "gguf", Headed, vocab_size))


def check_company(source: DummyCheckpoint) -> None:
    """Every second request is looked at: how it is computed alone, and among others, in chunks."""
    core = make_engine(source, "bfloat16", limits=(256, 600), num_blocks=4000)
    alone = [run(core, [prompt], i, max_tokens=24, prompt_logprobs=0)[0] for i, prompt in enumerate(PROMPTS)]
    first_id = len(PROMPTS)
    for size in (2, 7, 32, 44, 128, 256):
        others = [[(i * k + 5) % VOCAB_SIZE for k in range(1 + 13 * i % 60)] for i in range(size)]
        prompts = [PROMPTS[i // 2 % 5] if i % 2 == 0 else others[i] for i in range(size)]
        for scored in (None, 0):  # steps are begun ahead, or not
            found = run(core, prompts, first_id, max_tokens=24, prompt_logprobs=scored)
            first_id += size
            for i in range(0, size, 2):
                tokens, scores, prompt_scores = alone[i // 2 % 5]
                assert found[i] == (tokens, scores, prompt_scores if scored == 0 else []), (size, i)


@pytest.mark.parametrize("layout", [None, "gptq"])
def test_deterministic_requests_do_not_depend_on_the_cache(layout: str | None) -> None:
    """Prompts that are found, an answer that is part of a prompt, and requests that were preempted."""
    source = deterministic("LlamaForCausalLM", layout)
    core = make_engine(source, "bfloat16", limits=(32, 600), caching=True)
    small = make_engine(source, "bfloat16", limits=(32, 600), num_blocks=13)
    alone = [run(small, [prompt], i, max_tokens=60)[0] for i, prompt in enumerate(PROMPTS)]
    turns = [prompt + tokens + PROMPTS[2] for prompt, (tokens, _, _) in zip(PROMPTS, alone, strict=True)]
    answers = [run(small, [turn], 10 + i, max_tokens=60)[0] for i, turn in enumerate(turns)]
    assert small.scheduler.stats().num_preemptions == 0
    for i in range(2):
        assert run(core, PROMPTS, 10 * i, max_tokens=60) == alone
    assert run(core, turns, 20, max_tokens=60) == answers
    assert core.scheduler.stats().num_prefix_hits > 0
    assert run(small, PROMPTS * 4, 20, max_tokens=60) == alone * 4
    assert small.scheduler.stats().num_preemptions > 0


def test_steps_captured_when_they_are_needed() -> None:
    """Memory also runs out while some of them are captured: the same bits, and each size is there in the end."""
    source = deterministic("LlamaForCausalLM", "gptq")
    at_start = make_engine(source, "bfloat16", limits=(8, 600))
    lazy = make_engine(source, "bfloat16", limits=(8, 600), lazy_capture=True)
    graphs, model, failures = lazy.runner.graph, lazy.runner.model, [True, True]
    of_prompts = lazy.runner.prompts._captured
    assert [*graphs._captured] == [8] and [*at_start.runner.graph._captured] == [8, 4, 2, 1]
    assert [*of_prompts] == [600] and [*at_start.runner.prompts._captured][:3] == [600, 576, 512]
    logits, forward, failures_of_prompts = model.logits, model.forward, [True]

    def fail(failures: list[bool]) -> None:
        if failures and torch.cuda.is_current_stream_capturing():
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def flaky(hidden: Tensor, out: Tensor | None = None) -> Tensor:
        found = logits(hidden, out)
        fail(failures if hidden.shape[0] > 1 else [])
        return found

    def flaky_forward(batch: Batch) -> Tensor:
        hidden = forward(batch)
        fail(failures_of_prompts if len(batch.token_ids) > max(16, len(batch.context_lens)) else [])
        return hidden

    model.logits, model.forward = flaky, flaky_forward
    for first_id, prompts in ((0, PROMPTS[:2]), (10, PROMPTS), (20, PROMPTS[:1]), (30, PROMPTS[1:5]), (40, PROMPTS)):
        stream = torch.cuda.current_stream()
        assert run(lazy, prompts, first_id, max_tokens=24) == run(at_start, prompts, first_id, max_tokens=24)
        assert torch.cuda.current_stream() == stream
    assert not failures and not failures_of_prompts and sorted(graphs._captured) == [1, 2, 4, 8]
    assert len(of_prompts) > 2
