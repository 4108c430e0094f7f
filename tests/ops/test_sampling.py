"""The op that chooses tokens: its body against transformers and plain Python, its kernel against its body."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pelton.ops import cpu_sampling, sampling
from pelton.ops.native import native
from pelton.ops.sampling import NO_TOKEN_LEFT, NOT_FINITE, Constraint, SampleRow, sample, uniform

HAS_KERNEL = hasattr(native, "sample")
Choices = dict[str, dict[str, Any]]
ISAS = native.supported_isas() if HAS_KERNEL else ["none"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The extension module, switched to one instruction set."""
    if native is None or not HAS_KERNEL:
        pytest.skip("pelton._cpu is not built")
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def make_row(seed: int = 0, tokens: list[int] | None = None, **fields: Any) -> SampleRow:
    if tokens is None:
        return SampleRow(token_ids=[1, 4, 6, 4, 4, 2, 6], num_prompt=2, seed=seed, **fields)
    return SampleRow(token_ids=tokens, num_prompt=0, seed=seed, **fields)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(logits: torch.Tensor, rows: list[SampleRow], constraints: dict[int, Constraint] | None = None) -> list[int]:
    """The tokens that the kernel gives; they and the scores equal the body's."""
    before = logits.clone()
    assert cpu_sampling.accepts(logits, rows, constraints or {})
    tokens, scores = cpu_sampling.sample_native(logits, rows, constraints or {})
    expected_tokens, expected_scores = sample.reference(logits, rows, constraints or {})
    assert tokens == expected_tokens
    assert scores.keys() == expected_scores.keys()
    for i, (token_ids, logprobs, ranks) in scores.items():
        assert (token_ids, ranks) == (expected_scores[i][0], expected_scores[i][2])
        torch.testing.assert_close(logprobs, expected_scores[i][1], atol=2e-5, rtol=2e-6)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return tokens


# --- the body against others' definitions ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    ("fields", "warper"),
    [({"top_k": k}, TopKLogitsWarper(k)) for k in (1, 7, 99)]
    + [({"top_p": p}, TopPLogitsWarper(p)) for p in (0.05, 0.5, 0.9, 0.999)]
    + [({"min_p": p}, MinPLogitsWarper(p)) for p in (0.01, 0.5, 1.0)],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_what_truncation_keeps(fields: dict[str, Any], warper: Any, scale: float) -> None:
    logits = random(100, scale=scale)
    token_ids, weights = sampling._candidates(logits, float(logits.max()), make_row(temperature=1.0, **fields))
    expected = torch.softmax(warper(None, logits[None])[0], dim=-1)
    torch.testing.assert_close(torch.zeros(100).index_add(0, token_ids, weights / weights.sum()), expected)


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    for top_p, kept in ((0.4, 1), (0.5, 2), (0.77, 2), (0.79, 3), (0.99, 3)):  # of three: 0.444, 0.778, 1
        row = make_row(temperature=1.0, top_k=3, top_p=top_p)
        assert sampling._candidates(logits, float(logits.max()), row)[0].tolist() == list(range(kept))


def test_the_order_of_the_draw() -> None:
    """By id; where top_k or top_p applies from the most likely on, ties by id. The uniform number picks the place."""
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])
    by_likelihood = [1, 3, 4, 0, 2]
    weights = logits.double().exp()
    for seed in range(200):
        place = uniform(seed, 0) * float(weights.sum())
        for fields, order in (({}, range(5)), ({"top_p": 1 - 1e-9}, by_likelihood)):
            cumulative = weights[list(order)].cumsum(0)
            expected = list(order)[int((cumulative > place).nonzero()[0])]
            row = make_row(seed=seed, tokens=[], temperature=1.0, **fields)
            assert sample.reference(logits[None], [row], {})[0] == [expected]


def test_uniform() -> None:
    """The generator's published numbers (Steele et al.'s splitmix64 from 0, without our first mixing of the seed)."""
    step, start = 0x9E3779B97F4A7C15, 0
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [sampling._finalise((start + (i + 1) * step) % (1 << 64)) for i in range(3)] == published
    assert sampling.mix(0, 2) == published[2]
    values = torch.tensor([uniform(3, i) for i in range(20000)])
    assert float(values.min()) >= 0 and float(values.max()) < 1
    histogram = torch.histc(values, bins=20, min=0, max=1)
    assert float((histogram - 1000).abs().max()) < 150


# --- the kernel against the body ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 16, 100, 255, 256, 257, 1000, 4099])
def test_choices(isa: str, choices: Choices, vocab: int) -> None:
    logits = random(1, vocab).expand(len(choices), vocab).contiguous()
    for seed in range(12):
        check(logits, [make_row(seed=seed, **fields) for fields in choices.values()])


@pytest.mark.parametrize("vocab", [7, 100, 1031])
def test_changes(isa: str, changes: Choices, vocab: int) -> None:
    for i, fields in enumerate(changes.values()):
        for choice in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
            check(random(3, vocab, seed=i), [make_row(seed=seed, **fields, **choice) for seed in range(3)])


def test_ties_go_to_the_lower_id(isa: str, choice: dict[str, Any]) -> None:
    logits = random(20, 301).round()
    check(logits, [make_row(seed=seed, num_top=10, **choice) for seed in range(20)])
    equal = torch.full((20, 301), -2.5)
    check(equal, [make_row(seed=seed, num_top=3, **choice) for seed in range(20)])


def test_few_tokens_with_any_probability(isa: str, choices: Choices) -> None:
    logits = torch.full((len(choices), 500), -1e30)
    logits[:, [3, 250, 499]] = torch.tensor([1.0, 2.0, 0.5])
    rows = [make_row(seed=5, **fields) for name, fields in choices.items()]
    tokens = check(logits, rows)
    assert all(t in (3, 250, 499) for t, name in zip(tokens, choices, strict=True) if name != "extremely-hot")


@pytest.mark.parametrize("vocab", [1, 2])
def test_tiny_vocabularies(isa: str, choices: Choices, vocab: int) -> None:
    check(random(len(choices), vocab), [make_row(tokens=[0], num_top=1, **fields) for fields in choices.values()])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_any_number_of_threads(isa: str, num_threads: int, num_rows: int) -> None:
    assert native is not None
    before = native.num_threads()
    native.set_threads(num_threads)
    try:
        logits = random(num_rows, 1000).round()
        logits[-1, 901] = logits[-1, 17] = 50.0
        assert check(logits, [make_row(num_top=2) for _ in range(num_rows)])[-1] == 17
        logits[-1, 999] = math.inf
        assert check(logits, [make_row() for _ in range(num_rows)])[-1] == NOT_FINITE
    finally:
        native.set_threads(before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 65, 511, 512, 528, 529])
def test_not_finite(isa: str, bad: float, place: int) -> None:
    logits = random(4, 530)
    logits[2, place] = bad
    rows = [make_row(num_top=0), make_row(), make_row(temperature=1.0, num_top=3), make_row(temperature=1.0)]
    forced = {2: Constraint(forced_id=5)}
    for constraints in ({}, forced):
        assert [t == NOT_FINITE for t in check(logits, rows, constraints)] == [False, False, True, False]


def test_large_finite_logits(isa: str, choices: Choices) -> None:
    """The largest float is finite, and neither sums nor differences spoil it."""
    logits = torch.tensor([[3.4e38, -3.4e38, 3.4e38, 1.0]]).repeat(len(choices), 25)
    assert min(check(logits, [make_row(**fields) for fields in choices.values()])) >= 0


def test_constraints(isa: str) -> None:
    logits = random(6, 77)
    best = int(logits[0].argmax())
    allowed = torch.arange(77) % 3 == 1
    mask = bytes(sum(int(bit) << j for j, bit in enumerate(allowed[i : i + 8])) for i in range(0, 77, 8))
    adjusted = logits[3].clone()
    adjusted[[8, 9]] = torch.tensor([-math.inf, math.inf])
    constraints = {
        0: Constraint(forbidden_ids=[best, 2, best]), 1: Constraint(mask=mask), 2: Constraint(forced_id=76),
        3: Constraint(adjusted=adjusted), 4: Constraint(mask=mask, forbidden_ids=[1, 4]),
    }
    for temperature in (0.0, 1.0):
        rows = [make_row(seed=i, temperature=temperature, presence_penalty=0.5, num_top=2) for i in range(6)]
        tokens = check(logits, rows, constraints)
        assert tokens[0] != best and tokens[1] % 3 == 1 and tokens[2] == 76 and tokens[3] == 9
        assert tokens[4] % 3 == 1 and tokens[4] not in (1, 4)


def test_no_token_left(isa: str) -> None:
    logits = random(4, 20)
    rows = [make_row(allowed_ids=[5]), make_row(temperature=1.0), make_row(temperature=1.0), make_row(num_top=4)]
    constraints = {
        0: Constraint(forbidden_ids=[5]), 1: Constraint(mask=bytes(3)), 2: Constraint(forbidden_ids=list(range(20))),
        3: Constraint(adjusted=torch.full((20,), -math.inf)),
    }
    assert check(logits, rows, constraints) == [NO_TOKEN_LEFT] * 4


def test_scores(isa: str) -> None:
    logits = random(7, 203)
    top = logits.argsort(dim=-1, descending=True)
    rows = [
        make_row(num_top=0), make_row(num_top=5), make_row(num_top=203), make_row(num_top=1000),
        make_row(num_top=0, score_ids=[9, 0, 202, 9]), make_row(num_top=3, bias={int(top[5, 9]): 100.0}), make_row(),
    ]
    _, scores = cpu_sampling.sample_native(logits, rows, {})
    assert [len(scores[i][0]) for i in range(6)] == [1, 5, 203, 203, 5, 4]
    assert scores[5][2] == [10, 1, 2, 3]
    check(logits, rows)


def test_history_follows_the_request(isa: str) -> None:
    """Penalties know each new token, and one that has been replaced; the draw's index is the number of tokens."""
    tokens = [1, 2, 3]
    fields = {"frequency_penalty": 0.8, "repetition_penalty": 1.1, "temperature": 0.7}
    row = SampleRow(token_ids=tokens, num_prompt=3, seed=4, **fields)
    for step in range(30):
        tokens.append(check(random(1, 40, seed=step), [row])[0])
        if step % 7 == 0:
            tokens[-1] = 39


def test_rows_of_a_larger_tensor(isa: str) -> None:
    wide = random(5, 130)
    check(wide[:, :100], [make_row(seed=i, temperature=1.0) for i in range(5)])
    check(wide[:, 3:98], [make_row(seed=i, temperature=1.0, top_p=0.5) for i in range(5)])
    assert not cpu_sampling.accepts(wide.T, [], {}) and not cpu_sampling.accepts(wide.double(), [], {})
    assert not cpu_sampling.accepts(wide[:1].expand(5, 130), [], {})


def test_arguments_are_checked(isa: str) -> None:
    assert native is not None
    logits = random(2, 40)

    def call(rows: list[Any], constraints: dict[int, Any], **changes: Any) -> None:
        given = {"logits": logits.data_ptr(), "num_rows": 2, "vocab": 40, "stride": 40} | changes
        assert native is not None
        native.sample(**given, rows=[cpu_sampling._record(row) for row in rows], constraints=constraints)

    fine, nothing = make_row(), (None, [], -1, 0)
    call([fine, fine], {1: nothing})
    for changes in ({"logits": 0}, {"logits": 3}, {"vocab": 0}, {"vocab": 41}, {"stride": 39}, {"num_rows": 3}):
        with pytest.raises(ValueError):
            call([fine, fine], {}, **changes)
    for fields in ({"allowed_ids": [40]}, {"bias": {40: 1.0}}, {"score_ids": [40], "num_top": 0}, {"allowed_ids": [-1]},
                   {"tokens": [40], "presence_penalty": 1.0}, {"temperature": -1.0}, {"temperature": math.nan},
                   {"temperature": 1e31}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}, {"repetition_penalty": 0.0}):
        with pytest.raises(ValueError):
            call([fine, make_row(**fields)], {})
    for constraint in ((None, [40], -1, 0), (None, [-1], -1, 0), (None, [], 40, 0), (None, [], -2, 0),
                       (bytes(4), [], -1, 0), (None, [], -1, 2), (None, [])):
        with pytest.raises(ValueError):
            call([fine, fine], {0: constraint})
    with pytest.raises(ValueError):
        call([fine, fine], {2: nothing})
    shrunk = make_row()
    call([fine, shrunk], {})
    shrunk.token_ids.clear()
    with pytest.raises(ValueError):
        native.sample(logits.data_ptr(), 2, 40, 40, [fine.native, shrunk.native], {})


def test_the_op_takes_the_kernel(isa: str) -> None:
    assert [kernel.run for kernel in sample.kernels] == [cpu_sampling.sample_native]
