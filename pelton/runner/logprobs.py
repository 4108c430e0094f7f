"""Log-probabilities of a prompt's tokens, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pelton.engine.step import TokenLogprobs
from pelton.ops.sampling import Constraint, SampleRow, sample

NON_FINITE = (
    "the model's logits are not finite (overflow in the compute dtype, or a damaged weight); "
    "use --dtype float32 or check the checkpoint"
)


def token_logprobs(logits: Tensor, chosen: Sequence[int], num_top: int) -> list[TokenLogprobs] | None:
    """For each row of logits [M, V]: the chosen token, then the `num_top` most likely (-1: all) without it.

    None if the logits are not finite. Ranks count from 1: the number of tokens that are more likely, plus one.
    """
    row = SampleRow(token_ids=[], num_prompt=0, num_top=logits.shape[1] if num_top == -1 else num_top)
    forced = {i: Constraint(forced_id=token_id) for i, token_id in enumerate(chosen)}
    _, scores = sample(logits, [row] * len(chosen), forced)
    return [TokenLogprobs(*scores[i]) for i in range(len(chosen))] if len(scores) == len(chosen) else None
