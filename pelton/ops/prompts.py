"""Whether the tokens that are computed are chunks of prompts, with no decodes among them. Kernels that give a token the
same bits in any company ask that: of many rows there are other sums than of few."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


def are_prompts() -> bool:
    """Whether this thread computes chunks of prompts alone."""
    return bool(getattr(_thread, "are_prompts", False))


@contextmanager
def of_prompts(alone: bool) -> Iterator[None]:
    """In this context it does, or there may be others among them."""
    _thread.are_prompts, before = alone, are_prompts()
    try:
        yield
    finally:
        _thread.are_prompts = before
