"""Each sampling parameter does what it says, and a request's draws are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pelton.engine.step import EngineRequest
from pelton.runner.logprobs import NON_FINITE
from pelton.runner.requests import RequestState
from pelton.runner.sampler import Sampler
from pelton.types import SamplingParams

VOCAB = 50


def state(prompt: list[int] | None = None, output: list[int] | None = None, request_id: int = 1,
          request: dict[str, Any] | None = None, **params: Any) -> RequestState:
    made = RequestState(
        EngineRequest(request_id, prompt or [1, 2, 3], SamplingParams(**params), (0,), **(request or {})), num_groups=1
    )
    made.token_ids += output or []
    return made


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(states: list[RequestState], rows: list[torch.Tensor]) -> list[Any]:
    return Sampler(0)(states, torch.stack(rows))


def draws(n: int, row: torch.Tensor, **params: Any) -> list[int]:
    """n independent draws, by seed."""
    return [draw([state(seed=i, **params)], [row.clone()])[0][0] for i in range(n)]


def test_greedy_takes_the_most_likely() -> None:
    assert draw([state(temperature=0)], [logits()])[0] == (int(logits().argmax()), None)


def test_temperature_one_follows_the_distribution() -> None:
    row = torch.full((VOCAB,), -torch.inf)
    row[[3, 4, 5]] = torch.tensor([0.5, 0.3, 0.2]).log()
    row[row == -torch.inf] = -1e4
    got = draws(3000, row)
    for token_id, share in ((3, 0.5), (4, 0.3), (5, 0.2)):
        assert abs(got.count(token_id) / 3000 - share) < 0.03


def test_top_k_top_p_min_p_keep_the_right_tokens() -> None:
    row = torch.full((VOCAB,), -1e4)
    row[:5] = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    assert set(draws(200, row, top_k=2)) == {0, 1}
    assert set(draws(200, row, top_p=0.75)) == {0, 1, 2}  # 0.4 + 0.3 < 0.75: the third one crosses the line
    assert set(draws(200, row, top_p=0.01)) == {0}
    assert set(draws(20, row, top_p=1e-320)) == {0}
    assert set(draws(200, row, min_p=0.6)) == {0, 1}
    assert set(draws(200, row, top_k=3, top_p=0.7)) == {0, 1}  # of the three: 0.44, 0.33, 0.22


def test_seed_decides_alone() -> None:
    """The same draw in any company, at any place in the batch."""
    mine = {"temperature": 1.0, "seed": 7}
    alone = draw([state(**mine)], [logits(5)])[0]
    others = [state(request_id=9, temperature=1.0), state(request_id=8, temperature=0.0, repetition_penalty=2.0)]
    assert draw([*others, state(request_id=3, **mine)], [logits(1), logits(2), logits(5)])[2] == alone
    steps = {draw([state(output=[4] * i, **mine)], [logits(5)])[0][0] for i in range(40)}
    assert len(steps) > 10  # each step draws anew


def test_repetition_penalty_covers_prompt_and_output() -> None:
    row = torch.zeros(VOCAB)
    row[2], row[10], row[20] = 4.0, 3.9, 2.5
    assert draw([state(output=[10], temperature=0, repetition_penalty=2.0)], [row])[0][0] == 20


def test_frequency_and_presence_cover_output_only() -> None:
    row = torch.zeros(VOCAB)
    row[2], row[10], row[20] = 4.0, 4.5, 3.0
    assert draw([state(output=[10, 10], temperature=0, frequency_penalty=0.5)], [row.clone()])[0][0] == 2
    assert draw([state(output=[10], temperature=0, presence_penalty=1.0)], [row.clone()])[0][0] == 2


def test_masks_and_bias() -> None:
    row = logits()
    best = int(row.argmax())
    assert draw([state(temperature=0, allowed_token_ids=[11, 12])], [row.clone()])[0][0] in (11, 12)
    assert draw([state(temperature=0, logit_bias={7: 100.0})], [row.clone()])[0][0] == 7
    banned = {"bad_words_token_ids": ((best,),)}
    assert draw([state(temperature=0, request=banned)], [row.clone()])[0][0] != best
    pair = {"bad_words_token_ids": ((30, best),)}
    assert draw([state(temperature=0, request=pair)], [row.clone()])[0][0] == best
    assert draw([state(temperature=0, output=[30], request=pair)], [row.clone()])[0][0] != best
    prompt_only = state(prompt=[1, 30], temperature=0, request=pair)  # bad words are words of the output
    assert draw([prompt_only], [row.clone()])[0][0] == best


def test_min_tokens_holds_back_the_end() -> None:
    row = logits()
    row[0], row[9] = 50.0, 40.0
    assert draw([state(temperature=0, min_tokens=1, stop_token_ids=[9])], [row.clone()])[0][0] not in (0, 9)
    assert draw([state(temperature=0, output=[5], min_tokens=1, stop_token_ids=[9])], [row.clone()])[0][0] == 0


def test_thinking_budget_ends_thinking() -> None:
    request = {"think_token_ids": (40, 41)}
    for output, forced in (([40, 5], False), ([40, 5, 6], True), ([40, 5, 6, 41], False), ([5, 6, 7], False)):
        made = state(output=output, temperature=0, thinking_token_budget=2, request=request)
        assert (draw([made], [logits()])[0][0] == 41) is forced


def test_logits_processors_in_both_signatures() -> None:
    def two(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        row[13] = 99.0
        return row

    def three(prompt_ids: list[int], output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        assert prompt_ids == [1, 2, 3]
        return torch.where(torch.arange(VOCAB) == 14, 100.0, row)

    assert draw([state(temperature=0, logits_processors=[two])], [logits()])[0][0] == 13
    assert draw([state(temperature=0, logits_processors=[two, three])], [logits()])[0][0] == 14


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_end_one_request(bad: float) -> None:
    poisoned = logits(1)
    poisoned[17] = bad
    got = draw([state(temperature=0), state(temperature=0), state(temperature=1)], [logits(), poisoned, logits(2)])
    assert got[1] == NON_FINITE
    assert got[0] == (int(logits().argmax()), None) and isinstance(got[2], tuple)


def test_contradicting_constraints_are_an_error() -> None:
    made = state(temperature=0, allowed_token_ids=[5], request={"bad_words_token_ids": ((5,),)})
    assert "no token is left" in draw([made], [logits()])[0]


def test_logprobs_are_the_models_own() -> None:
    """Before temperature and penalties; the chosen token first, then the most likely, with ranks."""
    row = logits()
    expected = torch.log_softmax(row, dim=-1)
    order = row.argsort(descending=True).tolist()
    made = state(temperature=0, logprobs=3, logit_bias={order[1]: 100.0})
    token_id, entry = draw([made], [row.clone()])[0]
    assert token_id == order[1]
    assert entry.token_ids == [order[1], order[0], order[2]] and entry.ranks == [2, 1, 3]
    torch.testing.assert_close(torch.tensor(entry.logprobs), expected[entry.token_ids])
    far = state(temperature=0, logprobs=2, logit_bias={order[30]: 100.0})
    assert draw([far], [row.clone()])[0][1].ranks == [31, 1, 2]
    every = draw([state(temperature=0, logprobs=-1)], [row.clone()])[0][1]
    assert sorted(every.token_ids) == list(range(VOCAB)) and every.ranks == list(range(1, VOCAB + 1))
    chosen = draw([state(temperature=0, logprob_token_ids=[3, 4])], [row.clone()])[0][1]
    assert chosen.token_ids == [order[0], 3, 4] and chosen.ranks[1] == order.index(3) + 1
