"""Quantised weights taken apart: small integers, and the numbers that groups of columns share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Rows of codes q, each group of columns with a scale d and perhaps a minimum m or a zero point z:

    w = d (q - zero), or d q - m, or d (q - z), or d value[q], or with float8 d number(q).

    Where `supers` are given, scales (and minima) are integers, multiples of numbers for more columns.
    """

    bits: int  # of a code: 2, 3, 4, 5, 6 or 8
    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # float32 [N, K / group]; with supers uint8, or int8 where there are no minima
    mins: Tensor | None = None  # like scales
    zeros: Tensor | None = None  # float32 (of integers) [N, K / group], in place of minima
    zero: int = 0
    values: tuple[float, ...] | None = None  # 16, where codes are indices
    supers: Tensor | None = None  # float32 (of float16) [N, K / columns of a super group]
    super_mins: Tensor | None = None
    float8: bool = False  # codes are the bits of float8_e4m3fn

    def weights(self) -> Tensor:
        """W, float32 [N, K]: the definition."""
        d = _multiples(self.scales, self.supers)
        if self.values is not None:
            table = torch.tensor(self.values, dtype=torch.float32, device=self.codes.device)
            w = _by_group(table[self.codes.int()], d)
        elif self.float8:
            w = _by_group(self.codes.view(torch.float8_e4m3fn).float(), d)
        elif self.zeros is not None:
            w = (self.codes.view(*d.shape, -1) - self.zeros.unsqueeze(-1)) * d.unsqueeze(-1)
        elif self.zero:
            w = _by_group(self.codes.float() - self.zero, d)
        else:
            w = _by_group(self.codes.float(), d)
        if self.mins is not None:
            w = w.sub_(_multiples(self.mins, self.super_mins).unsqueeze(-1))
        return w.flatten(1)


def _multiples(scales: Tensor, supers: Tensor | None) -> Tensor:
    """Scales [N, groups] as float32."""
    if supers is None:
        return scales.float()
    per_super = scales.shape[1] // supers.shape[1]
    return supers.repeat_interleave(per_super, dim=1) * scales.float()


def _by_group(q: Tensor, d: Tensor) -> Tensor:
    """q [N, K] times d [N, groups]: [N, groups, columns]."""
    return q.view(q.shape[0], d.shape[1], -1) * d.unsqueeze(-1)
