"""Kernels in CUDA C++: what is kept of them, and what can fail."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pelton.errors import DeviceError, OutOfMemoryError
from pelton.ops import gpu
from pelton.ops.cuda import program


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The sources that are compiled, by a compiler that is none."""
    sources: list[str] = []

    def compile_it(nvrtc: Any, text: str, source: str, options: Sequence[str]) -> bytes:
        sources.append(source)
        return b"machine code"

    monkeypatch.setattr(program, "_compile", compile_it)
    monkeypatch.setattr(program, "_nvrtc", lambda: SimpleNamespace(nvrtcVersion=lambda *parts: 0))
    monkeypatch.setattr(program, "KEPT", tmp_path / "kernels")
    return sources


def test_what_was_compiled_is_kept(compiled: list[str]) -> None:
    assert [program._cubin("text", "x.cu", ["-D"]) for _ in range(2)] == [b"machine code"] * 2
    assert program._cubin("other text", "x.cu", ["-D"]) == b"machine code"
    assert compiled == ["x.cu", "x.cu"]


@pytest.mark.parametrize("name", ["file", "n" * 300], ids=["a file", "a name that the system refuses"])
def test_a_home_that_cannot_be_used(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(program, "KEPT", tmp_path / name / "kernels")
    with caplog.at_level(logging.WARNING):
        assert [program._cubin("text", "x.cu", []) for _ in range(2)] == [b"machine code"] * 2
    assert compiled == ["x.cu", "x.cu"] and "cannot be kept" in caplog.text


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "nvrtc", lambda: None)
    with pytest.raises(DeviceError, match="libnvrtc of the package nvidia-cuda-nvrtc.* is missing; install it"):
        program._cubin("text", "x.cu", [])


@pytest.mark.parametrize(("status", "kind"), [(2, OutOfMemoryError), (700, DeviceError)])
def test_what_the_driver_refuses(monkeypatch: pytest.MonkeyPatch, status: int, kind: type[DeviceError]) -> None:
    def get_error(status: int, text: Any) -> None:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"a reason"

    monkeypatch.setattr(program, "_driver", lambda: SimpleNamespace(cuGetErrorString=get_error))
    program._check(0, "launch")
    with pytest.raises(kind, match="^launch failed on the GPU: a reason$"):
        program._check(status, "launch")
