"""Log-probabilities of tokens, from the model's own logits: before temperature, penalties and masks, as vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pelton.engine.step import TokenLogprobs

NON_FINITE = (
    "the model's logits are not finite (overflow in the compute dtype, or a damaged weight); "
    "use --dtype float32 or check the checkpoint"
)


def token_logprobs(
    logits: Tensor, chosen: Sequence[int], num_top: int, wanted: Sequence[int] | None = None
) -> list[TokenLogprobs]:
    """For each row of logits [M, V]: the chosen token, then the `num_top` most likely (-1: all) or those `wanted`.

    Ranks count from 1: the number of tokens at least as likely, ties going to the lower rank.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    entries = []
    for row, token_id in zip(logprobs, chosen, strict=True):
        if wanted is not None:
            others = torch.tensor(list(wanted), dtype=torch.int64, device=row.device)
        else:
            others = torch.topk(row, len(row) if num_top == -1 else min(num_top, len(row))).indices
        others = others[others != token_id]  # the chosen token is there already
        token_ids = torch.cat((torch.tensor([token_id], device=row.device), others))
        values = row[token_ids]
        if wanted is not None:
            ranks = [int((row > value).sum()) + 1 for value in values]
        else:
            rank = int((row > values[0]).sum()) + 1
            ranks = [rank, *_ranks_beside(rank, len(others))]
        entries.append(TokenLogprobs(token_ids.tolist(), values.tolist(), ranks))
    return entries


def _ranks_beside(rank: int, num_others: int) -> list[int]:
    """Ranks of the most likely tokens once the one at `rank` is taken out: 1, 2, ... without `rank`."""
    return [i for i in range(1, num_others + 2) if i != rank][:num_others]
