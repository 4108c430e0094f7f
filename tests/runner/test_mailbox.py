"""Tokens on their way from a GPU."""

from __future__ import annotations

import pytest
import torch

from pelton.runner.mailbox import Mailbox

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_tokens_arrive_in_order(device: str) -> None:
    """However many there are, while two more are on their way, and where nobody waits for some."""
    mailbox, tokens = Mailbox(), torch.empty(3000, dtype=torch.int64, device=device)
    waiting = []
    for step in range(20):
        tokens.fill_(step)
        waiting.append((step, mailbox.send(tokens[: 100 * (step % 7) + 1])))
        if len(waiting) > 2:
            sent, fetch = waiting.pop(0)
            if step % 5:
                assert fetch() == [sent] * (100 * (sent % 7) + 1)
