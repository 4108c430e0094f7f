"""The op that chooses tokens, on a GPU, against its body."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pelton.ops import sampling as reference
from pelton.ops.cuda import sampling
from pelton.ops.cuda import sampling_kernels as kernels
from pelton.ops.sampling import NO_TOKEN_LEFT, NOT_FINITE, Constraint, SampleRow, sample

pytestmark = pytest.mark.filterwarnings(  # numpy's, in the interpreter
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value encountered:RuntimeWarning",
)

SEARCHED = ("top_k", "top_p", "min_p-top_k", "top_p-flat", "top_k-large", "top_p-nearly-1")
Choices = dict[str, dict[str, Any]]


def make_row(seed: int = 0, **fields: Any) -> SampleRow:
    return SampleRow(token_ids=[1, 4, 6, 4, 4, 2, 6], num_prompt=2, seed=seed, **fields)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(
    device: torch.device, logits: torch.Tensor, rows: list[SampleRow],
    constraints: dict[int, Constraint] | None = None,
) -> list[int]:
    """The tokens that the kernel gives; they and the scores equal the body's."""
    there = logits.to(device)
    given = {i: Constraint(mask=c.mask, forbidden_ids=c.forbidden_ids, forced_id=c.forced_id,
                           adjusted=None if c.adjusted is None else c.adjusted.to(device))
             for i, c in (constraints or {}).items()}
    assert sampling.accepts(there, rows, given)
    tokens, scores = sampling.sample_on_gpu(there, rows, given)
    expected, expected_scores = sample.reference(logits, rows, constraints or {})
    assert tokens == expected
    assert scores.keys() == expected_scores.keys()
    for i, (token_ids, logprobs, ranks) in scores.items():
        assert (token_ids, ranks) == (expected_scores[i][0], expected_scores[i][2])
        torch.testing.assert_close(logprobs, expected_scores[i][1], atol=2e-5, rtol=2e-6)
    assert torch.equal(there.cpu().nan_to_num(), logits.nan_to_num())
    return tokens


@pytest.mark.parametrize("vocab", [1, 100, 4500])
def test_choices(device: torch.device, choices: Choices, vocab: int) -> None:
    logits = random(1, vocab).expand(len(choices), vocab).contiguous()
    check(device, logits, [make_row(seed=seed, num_top=1, **f) for seed, f in enumerate(choices.values())])


def test_draws_of_many_seeds(device: torch.device, choices: Choices) -> None:
    """Nearly all draws are the body's: only rounding at a border may part them, and never leaves the candidates."""
    num_seeds, num_equal, names = 200 if device.type == "cuda" else 8, 0, ("plain", "top_k", "top_p", "all-three")
    logits = random(1, 300, scale=2.0).expand(num_seeds, -1).contiguous()
    for name in names:
        rows = [make_row(seed=seed, **choices[name]) for seed in range(num_seeds)]
        tokens, _ = sampling.sample_on_gpu(logits.to(device), rows, {})
        expected, _ = sample.reference(logits, rows, {})
        num_equal += sum(a == b for a, b in zip(tokens, expected, strict=True))
        allowed, weights = reference._candidates(logits[0], float(logits[0].max()), rows[0])
        assert {*tokens} <= {*allowed[weights > 0].tolist()}
    assert num_equal >= 0.99 * num_seeds * len(names)


def test_ties_go_to_the_lower_id(device: torch.device, choices: Choices) -> None:
    rows = [make_row(seed=i, num_top=10, **choices[name]) for i, name in enumerate(("greedy", "hot", *SEARCHED[:4]))]
    zeros = torch.zeros(len(rows), 50)
    zeros[:, ::2] = -0.0
    for logits in (random(len(rows), 301).round(), torch.full((len(rows), 301), -2.5), zeros):
        check(device, logits, rows)


def test_whole_rows_are_searched_where_lists_do_not_hold_enough(
    device: torch.device, choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [random(6, 40_000, scale=1e-3)]
    if device.type == "cpu":  # the interpreter reads it at each launch, and is slow
        monkeypatch.setattr(kernels, "LISTED", kernels.tl.constexpr(16))
        many = [random(6, 1000).round(decimals=1), random(6, 300, scale=1e-3)]
    for logits in many:
        check(device, logits, [make_row(seed=seed, **choices[name]) for seed, name in enumerate(SEARCHED)])


@pytest.mark.parametrize("choice", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_changes(device: torch.device, changes: Choices, choice: dict[str, Any]) -> None:
    for vocab in (7, 1031):
        check(device, random(len(changes), vocab), [make_row(i, **f, **choice) for i, f in enumerate(changes.values())])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(device: torch.device, bad: float) -> None:
    for place in (0, 511, 4099):
        logits = random(4, 4100)
        logits[2, place] = bad
        rows = [make_row(num_top=0), make_row(), make_row(temperature=1.0, num_top=3), make_row(temperature=1.0)]
        for constraints in ({}, {2: Constraint(forced_id=5)}, {2: Constraint(forbidden_ids=[place])}):
            assert [t == NOT_FINITE for t in check(device, logits, rows, constraints)] == [False, False, True, False]
        assert check(device, logits, [make_row() for _ in range(4)])[2] == NOT_FINITE


def test_large_finite_logits(device: torch.device, choices: Choices) -> None:
    """The largest float is finite, and neither sums nor differences spoil it."""
    names = ("greedy", "plain", "extremely-hot", "extremely-cold", "top_k", "min_p-top_p")
    logits = torch.tensor([[3.4e38, -3.4e38, 3.4e38, 1.0]]).repeat(len(names), 25)
    assert min(check(device, logits, [make_row(**choices[name]) for name in names])) >= 0


def test_constraints(device: torch.device) -> None:
    logits = random(6, 77)
    best = int(logits[0].argmax())
    allowed = torch.arange(77) % 3 == 1
    mask = bytes(sum(int(bit) << j for j, bit in enumerate(allowed[i : i + 8])) for i in range(0, 77, 8))
    adjusted = logits[3].clone()
    adjusted[[8, 9]] = torch.tensor([-math.inf, math.inf])
    constraints = {
        0: Constraint(forbidden_ids=[best, 2, best]), 1: Constraint(mask=mask + bytes(3)),
        2: Constraint(forced_id=76), 3: Constraint(adjusted=adjusted),
        4: Constraint(mask=mask, forbidden_ids=[1, 4]),
    }
    for temperature in (0.0, 1.0):
        rows = [make_row(seed=i, temperature=temperature, presence_penalty=0.5, num_top=2) for i in range(6)]
        tokens = check(device, logits, rows, constraints)
        assert tokens[0] != best and tokens[1] % 3 == 1 and tokens[2] == 76 and tokens[3] == 9
        assert tokens[4] % 3 == 1 and tokens[4] not in (1, 4)


def test_no_token_left(device: torch.device) -> None:
    rows = [make_row(allowed_ids=[5]), make_row(temperature=1.0), make_row(temperature=1.0, top_p=0.5), make_row()]
    constraints = {
        0: Constraint(forbidden_ids=[5]), 1: Constraint(mask=bytes(3)), 2: Constraint(forbidden_ids=list(range(20))),
        3: Constraint(adjusted=torch.full((20,), -math.inf)),
    }
    assert check(device, random(4, 20), rows, constraints) == [NO_TOKEN_LEFT] * 4


def test_scores(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random(7, 203)
    top = logits.argsort(dim=-1, descending=True)
    rows = [
        make_row(num_top=0), make_row(num_top=5), make_row(num_top=203), make_row(num_top=1000),
        make_row(num_top=0, score_ids=[9, 0, 202, 9]), make_row(num_top=3, bias={int(top[5, 9]): 100.0}), make_row(),
    ]
    check(device, logits, rows)
    monkeypatch.setattr(sampling, "SCORED_AT_ONCE", 500)  # two rows
    check(device, logits, rows)
    _, scores = sampling.sample_on_gpu(logits.to(device), rows, {})
    assert [len(scores[i][0]) for i in range(6)] == [1, 5, 203, 203, 5, 4]
    assert scores[5][2] == [10, 1, 2, 3]


def test_history_follows_the_request(device: torch.device) -> None:
    """Penalties know each new token, and one that has been replaced; the draw's index is the number of tokens."""
    tokens = [1, 2, 3]
    fields = {"frequency_penalty": 0.8, "repetition_penalty": 1.1, "temperature": 0.7, "allowed_ids": range(35)}
    row = SampleRow(token_ids=tokens, num_prompt=3, seed=4, **fields)
    for step in range(30):
        tokens.append(check(device, random(1, 40, seed=step), [row])[0])
        if step % 7 == 0:
            tokens[-1] = 39


def test_rows_do_not_depend_on_their_company(device: torch.device, choices: Choices) -> None:
    logits = random(5, 900).to(device)
    rows = [make_row(seed=i, **choices[name]) for i, name in enumerate(("greedy", "hot", *SEARCHED[:3]))]
    together, _ = sampling.sample_on_gpu(logits, rows, {})
    assert together == [sampling.sample_on_gpu(logits[i : i + 1], [row], {})[0][0] for i, row in enumerate(rows)]


def test_rows_of_a_larger_tensor(device: torch.device) -> None:
    wide = random(5, 130)
    check(device, wide[:, :100], [make_row(seed=i, temperature=1.0, num_top=2) for i in range(5)])
    check(device, wide[:, 3:98], [make_row(seed=i, temperature=1.0, top_p=0.5, bias={1: 9.0}) for i in range(5)])
    there = wide.to(device)
    assert not sampling.accepts(there.T, [], {}) and not sampling.accepts(there.double(), [], {})


def test_pending(device: torch.device) -> None:
    """Tokens are on the device before they are fetched."""
    logits = random(3, 50).to(device)
    pending = sampling.start_sample(logits, [make_row(num_top=1) for _ in range(3)], {})
    assert pending.token_ids_on_device.dtype == torch.int64
    assert pending.fetch()[0] == pending.token_ids_on_device.tolist() == logits.argmax(dim=-1).tolist()
    assert sampling.sample_on_gpu(logits[:0], [], {}) == ([], {})


def test_captured(device: torch.device, choices: Choices) -> None:
    """Through memory of fixed places, larger than needed and left over from other batches: the tokens of the batch."""
    rows = [make_row(seed=seed, **fields) for seed, fields in enumerate(choices.values())]
    most = len(rows) + 3
    logits = torch.zeros(most, 4100 if device.type == "cuda" else 200, device=device)
    tokens, wholes = (torch.full(shape, -1, device=device) for shape in ((most,), (most, 3)))
    factors = torch.full((most, 4), math.nan, dtype=torch.float64, device=device)
    few, greedy = rows[2:5], [make_row(), make_row()]
    for step, batch in enumerate((rows, few, greedy, few + greedy, rows[::-1])):
        num = len(batch)
        logits[:num] = random(num, logits.shape[1], seed=step).to(device)
        draws = sampling.draws_of(batch, logits)
        assert draws is not None
        num_draws = len(draws[0])
        assert num_draws == sum(row.temperature > 0 for row in batch)
        wholes[:num_draws], factors[:num_draws] = (torch.from_numpy(x).to(device) for x in draws)
        wholes[num_draws:] = -1
        sampling.choose_(tokens, logits, wholes, factors)
        assert tokens[:num].tolist() == sampling.sample_on_gpu(logits[:num], batch, {})[0]
        assert sampling.Pending.of(tokens[:num], tokens[:num]).fetch() == (tokens[:num].tolist(), {})


@pytest.mark.parametrize(
    "more", [{"bias": {1: 2.0}}, {"allowed_ids": [3]}, {"num_top": 0}, {"repetition_penalty": 1.1},
             {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}], ids=str,
)  # fmt: skip
def test_what_is_not_captured(device: torch.device, more: dict[str, Any]) -> None:
    logits = random(2, 9).to(device)
    assert sampling.draws_of([make_row(), make_row(temperature=1.0, **more)], logits) is None


# --- notes on tokens ------------------------------------------------------------------------------------------------


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many notes go to the device with each batch."""
    counts: list[int] = []
    upload = sampling._upload

    def spy(arrays: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
        counts.append(len(arrays.get("notes", ())))
        return upload(arrays, device)

    monkeypatch.setattr(sampling, "_upload", spy)
    return counts


def test_each_token_is_noted_once(device: torch.device, noted: list[int]) -> None:
    tokens = [1, 2, 3]
    row = SampleRow(token_ids=tokens, num_prompt=3, frequency_penalty=0.8, allowed_ids=range(35))
    for step in range(5):
        tokens.append(check(device, random(1, 40, seed=step), [row])[0])
    assert noted == [3 + 35, 1, 1, 1, 1]


def test_what_is_allowed_is_noted_once_although_tokens_are_not_known_yet(
    device: torch.device, noted: list[int]
) -> None:
    """While a step runs, a token that it samples has a zero in its place in the next one."""
    tokens = [1, 2, 3]
    row = SampleRow(token_ids=tokens, num_prompt=3, seed=4, temperature=0.7, allowed_ids=range(35))
    for step in range(5):
        if step:
            tokens.append(0)
        token_id = check(device, random(1, 40, seed=step), [row])[0]
        tokens[3:] = [7] * step
        assert token_id < 35
    assert noted == [35, 0, 0, 0, 0]


def test_a_batch_that_failed_is_noted_again(
    device: torch.device, noted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether memory runs out before the notes are written or after."""
    tokens = [1, 2, 3]
    row = SampleRow(token_ids=tokens, num_prompt=3, frequency_penalty=0.8, repetition_penalty=1.3, temperature=0.7)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for step, name in enumerate(("_adjust", "_draw", "_draw", "_adjust")):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, name, fail)
            with pytest.raises(torch.OutOfMemoryError):
                sampling.start_sample(random(1, 8, seed=step).to(device), [row], {})
        tokens.append(check(device, random(1, 8, seed=step), [row])[0])
    assert noted == [3, 3, 1, 4, 1, 5, 1, 6]
