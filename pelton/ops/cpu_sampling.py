"""Registers the extension module's sampling for CPU tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pelton.ops.native import native
from pelton.ops.sampling import Constraint, SampleRow, Scores, sample


def sample_native(
    logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]
) -> tuple[list[int], dict[int, Scores]]:
    """`sample` in the extension module, which keeps a record of its own of each row."""
    num_rows, vocab = logits.shape
    records = [row.native or _record(row) for row in rows]
    held = {i: _plain(constraint) for i, constraint in constraints.items()} if constraints else {}
    return native.sample(  # type: ignore[union-attr, no-any-return]
        logits.data_ptr(), num_rows, vocab, max(logits.stride(0), vocab), records, held
    )


def accepts(logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]) -> bool:
    """Whether all logits are rows of float32 on the CPU."""
    num_rows, vocab = logits.shape
    return (
        _is_native(logits) and (num_rows == 1 or logits.stride(0) >= vocab)
        and all(c.adjusted is None or _is_native(c.adjusted) for c in constraints.values())
    )


def _is_native(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.is_cpu and logits.stride(-1) == 1


def _record(row: SampleRow) -> Any:
    """The extension module's record of a row, made once."""
    row.native = native.SampleRow(  # type: ignore[union-attr]
        temperature=row.temperature,
        top_k=row.top_k,
        top_p=row.top_p,
        min_p=row.min_p,
        seed=row.seed,
        repetition_penalty=row.repetition_penalty,
        frequency_penalty=row.frequency_penalty,
        presence_penalty=row.presence_penalty,
        allowed_ids=list(row.allowed_ids),
        bias_ids=list(row.bias),
        bias=list(row.bias.values()),
        token_ids=row.token_ids,
        num_prompt=row.num_prompt,
        num_top=row.num_top,
        score_ids=list(row.score_ids),
    )
    return row.native


def _plain(constraint: Constraint) -> tuple[bytes | None, list[int], int, int]:
    adjusted = 0 if constraint.adjusted is None else constraint.adjusted.data_ptr()
    return constraint.mask, constraint.forbidden_ids, constraint.forced_id, adjusted


def register_kernels() -> None:
    """Make the op use what the extension offers; without it the reference serves."""
    if hasattr(native, "sample"):
        sample.register("cpu-native", sample_native, accepts)
