"""Kernel calls recorded and replayed."""

from __future__ import annotations

import pytest
import torch

from pelton import ops
from pelton.ops.native import native, reason
from pelton.ops.recording import NotRecordable, Recorder

pytestmark = pytest.mark.skipif(native is None, reason=reason)


def test_a_replay_is_the_computation_for_any_number_of_rows() -> None:
    x, weight = torch.randn(8, 64), torch.randn(32)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(ops.silu_and_mul(x), weight, 1e-6)

    with Recorder(8) as recorder:
        out = compute(x)
    assert len(recorder.program) == 2
    for num_rows in (8, 1, 0, 5):
        x.normal_()
        out.zero_()
        native.replay([(recorder.program, num_rows)])  # type: ignore[union-attr]
        assert torch.equal(out[:num_rows], compute(x)[:num_rows])
        assert not out[num_rows:].any()


def test_buffers_are_used_again_once_nothing_refers_to_them() -> None:
    x, weight = torch.randn(4, 16), torch.ones(16)
    with Recorder(4):
        first = ops.rms_norm(x, weight, 0.0)
        view = first[:, 8:]
        address = first.data_ptr()
        del first
        held = ops.rms_norm(x, weight, 0.0)  # the view still needs the first buffer
        assert held.data_ptr() != address
        del view
        assert ops.rms_norm(x, weight, 0.0).data_ptr() == address


def test_what_is_no_kernel_call_is_refused() -> None:
    x = torch.randn(4, 16)
    with pytest.raises(NotRecordable, match="aten.add"), Recorder(4):
        x + 1
    assert torch.equal(x + 1, x.add(1))  # and nothing is left behind


def test_rows_are_those_of_the_program() -> None:
    x, weight = torch.randn(4, 16), torch.ones(16)
    with pytest.raises(ValueError, match="all its rows"), Recorder(8):
        ops.rms_norm(x, weight, 0.0)
    with Recorder(4) as recorder:
        ops.rms_norm(x, weight, 0.0)
    with pytest.raises(ValueError, match="more rows"):
        native.replay([(recorder.program, 5)])  # type: ignore[union-attr]


def test_one_recording_at_a_time() -> None:
    with Recorder(1), pytest.raises(ValueError, match="already"):
        Recorder(1).__enter__()
