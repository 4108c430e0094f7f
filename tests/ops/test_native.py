"""The extension module: what it refuses, how it runs and records calls, and its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from pelton.ops.native import native, reason

pytestmark = pytest.mark.skipif(native is None, reason=reason)

ROWS = torch.zeros(4, 64)


def address(offset: int = 0) -> int:
    return ROWS.data_ptr() + offset


CALLS: dict[str, dict[str, Any]] = {  # arguments that work
    "rms_norm": {"out": address(), "x": address(), "weight": address(), "num_rows": 2, "dim": 8, "out_stride": 8,
                 "x_stride": 8, "eps": 1e-5, "accumulate": False},
    "gated": {"out": address(), "x": address(), "num_rows": 1, "dim": 8, "out_stride": 8, "x_stride": 16,
              "gate": "silu"},
    "softcap": {"x": address(), "num_rows": 1, "dim": 8, "stride": 8, "cap": 2.0},
    "gather": {"out": address(), "x": address(), "ids": torch.zeros(1, dtype=torch.int64).data_ptr(), "num_rows": 0,
               "dim": 8, "out_stride": 8, "x_stride": 8, "type": "float32", "scale": 1.0},
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("rms_norm", c) for c in (
            {"out": 0}, {"x": 0}, {"weight": 0}, {"weight": 3}, {"dim": 0}, {"x_stride": 1}, {"out_stride": 1},
            {"eps": -1.0}, {"eps": float("nan")},
        )),
        *(("gated", c) for c in ({"x": 0}, {"dim": 0}, {"x_stride": 15}, {"out_stride": 7}, {"gate": "relu"})),
        *(("softcap", c) for c in ({"x": 0}, {"dim": 0}, {"stride": 7}, {"cap": 0.0}, {"cap": float("nan")})),
        *(("gather", c) for c in ({"ids": 0}, {"dim": 0}, {"x_stride": 7}, {"out_stride": 7}, {"type": "int8"})),
    ],
)
def test_arguments_are_checked(name: str, change: dict[str, Any]) -> None:
    getattr(native, name)(**CALLS[name])
    with pytest.raises(ValueError):
        getattr(native, name)(**CALLS[name] | change)


@pytest.mark.parametrize(
    "arguments",
    [
        ("Q9_9", 16, 32), ("Q4_0", 0, 32), ("Q4_0", 16, 0), ("Q4_0", 16, 48), ("Q4_K", 16, 128), ("F32", 1 << 40, 32),
    ],
)
def test_weights_that_cannot_be(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError):
        native.Weight(*arguments)  # type: ignore[union-attr]


def test_a_weight_takes_only_whole_rows_that_it_has() -> None:
    weight = native.Weight("Q8_0", 20, 32)  # type: ignore[union-attr]
    data = torch.zeros(20 * 34, dtype=torch.uint8)
    weight.fill(0, data.data_ptr(), 20 * 34)
    for first, num_bytes, rows in ((0, 33, []), (1, 20 * 34, []), (21, 0, []), (0, 68, [0]), (0, 68, [0, 2]),
                                   (0, 68, [-1, 0])):
        with pytest.raises(ValueError):
            weight.fill(first, data.data_ptr(), num_bytes, rows)
    with pytest.raises(ValueError):
        weight.set_order([0] * 31)
    with pytest.raises(ValueError):
        weight.set_order([0] * 31 + [32])


@pytest.mark.parametrize("change", [(5, 32), (4, 16), (4, 0), (4, 48)])
def test_codes_that_cannot_be(change: tuple[int, int]) -> None:
    bits, group = change
    with pytest.raises(ValueError):
        native.Weight.codes(bits, group, False, 8, 16, 64)  # type: ignore[union-attr]


def test_a_product_checks_its_rows() -> None:
    weight = native.Weight("F32", 16, 32)  # type: ignore[union-attr]
    x, out = torch.zeros(2, 32), torch.zeros(2, 16)
    good = {"out": out.data_ptr(), "x": x.data_ptr(), "weight": weight, "bias": 0, "num_rows": 2, "out_stride": 16,
            "x_stride": 32, "activations": "fp32", "accumulate": False}
    native.linear(**good)  # type: ignore[union-attr]
    for change in ({"out_stride": 15}, {"x_stride": 31}, {"activations": "int3"}, {"x": 0}, {"out": 2}):
        with pytest.raises(ValueError):
            native.linear(**good | change)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", [{"block_size": 8}, {"block_size": 24}, {"head_size": 3}, {"head_size": 4096}, {"num_kv_heads": 0},
               {"num_blocks": 0}, {"type": "int4"}, {"keys": 0}, {"type": "int8"}],
)  # fmt: skip
def test_caches_that_cannot_be(change: dict[str, Any]) -> None:
    good = {"keys": address(), "values": address(), "key_scales": 0, "value_scales": 0, "num_blocks": 1,
            "block_size": 16, "num_kv_heads": 1, "head_size": 8, "type": "float32"}
    native.Cache.make(**good)  # type: ignore[union-attr]
    with pytest.raises(ValueError):
        native.Cache.make(**good | change)  # type: ignore[union-attr]


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="mmx"):
        native.set_isa("mmx")  # type: ignore[union-attr]


def test_threads_that_cannot_be() -> None:
    for arguments in ((0,), (5000,), (2, [0])):
        with pytest.raises(ValueError):
            native.set_threads(*arguments)  # type: ignore[union-attr]


def test_a_pool_serves_several_callers_and_sizes() -> None:
    """Calls from several threads are computed one after the other; the pool may be replaced between them."""
    x = torch.randn(64, 64)
    expected = torch.nn.functional.silu(x[:, :32]) * x[:, 32:]
    failures: list[str] = []

    def work() -> None:
        for _ in range(200):
            out = torch.empty(64, 32)
            native.gated(out.data_ptr(), x.data_ptr(), 64, 32, 32, 64, "silu")  # type: ignore[union-attr]
            if not torch.allclose(out, expected, atol=1e-5):
                failures.append("wrong numbers")

    for num_threads in (1, 2, 3):
        native.set_threads(num_threads)  # type: ignore[union-attr]
        assert native.num_threads() == num_threads  # type: ignore[union-attr]
        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    native.set_threads(2)  # type: ignore[union-attr]
    assert not failures


def test_the_environment_chooses_the_instruction_set() -> None:
    script = "import pelton._cpu as c; from pelton.runner.device import use_cpu; from pelton.config import *\n" \
             "use_cpu(DeviceConfig('cpu', 1, False, 0), Environment.read().cpu_isa); print(c.isa())"
    command = [sys.executable, "-P", "-c", script]  # -P: the installed package, which has the extension
    done = subprocess.run(command, env={**os.environ, "PELTON_CPU_ISA": "generic"},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "generic"
    done = subprocess.run(command, env={**os.environ, "PELTON_CPU_ISA": "amx"}, capture_output=True, text=True)
    assert "PELTON_CPU_ISA=amx: this processor runs" in done.stderr
