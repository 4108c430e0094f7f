"""Kernels in CUDA C++: what is kept of them, and what can fail."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, PropertyMock

import pytest
import torch
import triton

from pelton.errors import DeviceError, OutOfMemoryError
from pelton.ops import gpu
from pelton.ops.cuda import launch, program


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


def test_two_threads_keep_the_same_program(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    meet, write = threading.Barrier(2, timeout=60), Path.write_bytes

    def write_with_another(path: Path, data: bytes) -> int:
        meet.wait()  # none has been kept yet
        written = write(path, data)
        meet.wait()
        return written

    monkeypatch.setattr(Path, "write_bytes", write_with_another)
    with ThreadPoolExecutor(2) as executor:
        images = list(executor.map(lambda _: program._cubin("text", "x.cu", []), range(2)))
    assert images == [b"machine code"] * 2 and len(compiled) == 2 and not caplog.text
    assert [kept.suffix for kept in program.KEPT.iterdir()] == [".cubin"]


@pytest.mark.parametrize("status", [0, 6])
def test_the_compiler_forgets_every_program(status: int) -> None:
    done: list[str] = []

    class Compiler:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: done.append(name) or (status if name == "nvrtcCompileProgram" else 0)

    with pytest.raises(DeviceError, match="x.cu does not compile for this GPU") if status else nullcontext():
        program._compile(Compiler(), "text", "x.cu", ["-D"])  # type: ignore[arg-type]
    assert done[0] == "nvrtcCreateProgram" and done[-1] == "nvrtcDestroyProgram"


class Args(ctypes.Structure):
    _fields_ = [("M", ctypes.c_int)]


class Driver:
    """Notes what is launched."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.called.append(name) or 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(program, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    return driver


def load(*bits: int) -> list[program.Function]:
    return [program.load("open_codes.cu", "open_codes", {"BITS": n}, torch.device("cuda", 0)) for n in bits]


def test_many_are_compiled_at_once_and_launched_later(
    compiled: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet, compile_it = threading.Barrier(2, timeout=60), program._compile

    def compile_with_others(*args: Any) -> bytes:
        meet.wait()  # until another is being compiled too
        return compile_it(*args)

    monkeypatch.setattr(program, "_compile", compile_with_others)
    args = Args()
    with ThreadPoolExecutor(2) as executor, program.compiling_by(executor):
        functions = load(2, 4)
        for function in functions:
            function.launch((1, 1), 32, args)
    assert len(compiled) == 2 and not driver.called
    functions[0].launch((1, 1), 32, args)
    functions[0].launch((1, 1), 32, args, shared_bytes=9)
    loaded = ["cuModuleLoadData", "cuModuleGetFunction"]
    assert driver.called == [*loaded, "cuLaunchKernelEx", "cuFuncSetAttribute", "cuLaunchKernelEx"]


def fail(nvrtc: Any, text: str, source: str, options: Sequence[str]) -> bytes:
    """In place of `_compile`."""
    if "-DBITS=4" in options:
        raise DeviceError("4 bits do not compile")
    return b"machine code"


def test_a_kernel_that_does_not_compile_is_said_when_all_are_compiled(
    compiled: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_compile", fail)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(DeviceError, match="4 bits do not compile"), program.compiling_by(executor):
            load(2, 4, 5)
        assert len(list(program.KEPT.iterdir())) == 2
        with pytest.raises(KeyError), program.compiling_by(executor):  # what fails first is said
            load(4)
            raise KeyError
    load(2)[0].launch((1, 1), 32, Args())
    assert driver.called[-1] == "cuLaunchKernelEx"


def test_a_kernel_that_does_not_compile_is_said_at_its_launch(
    compiled: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_compile", fail)
    with pytest.raises(DeviceError, match="4 bits do not compile"):
        load(4)[0].launch((1, 1), 32, Args())


@pytest.mark.parametrize("of_triton", [False, True])
def test_after_a_kernel_that_does_not_compile_others_can_be(
    compiled: list[str], driver: Driver, monkeypatch: pytest.MonkeyPatch, of_triton: bool
) -> None:
    """In Triton's mode too, which it lets nobody enter twice."""
    from triton.runtime._async_compile import active_mode

    def compile_kernel() -> str:
        raise RuntimeError("Triton's kernel fails")

    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)
    monkeypatch.setattr(program, "_compile", fail)
    made: list[Any] = []
    kernel = MagicMock()
    run = PropertyMock()
    type(kernel).run = run
    why = "Triton's kernel fails" if of_triton else "4 bits do not compile"
    with pytest.raises(DeviceError, match=why), launch.only_compiling():
        mode = active_mode.get()
        others = [made.append] * (len(signature(triton.AsyncCompileMode.submit).parameters) - 3)
        mode.submit("good", lambda: kernel, *others)
        if of_triton:
            mode.submit("bad", compile_kernel, *others)
        else:
            load(4)
    assert kernel in made
    run.assert_called_once()  # it is made ready to be launched
    with launch.only_compiling():
        load(2)


def test_another_thread_waits_for_a_kernel_that_is_being_compiled(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing is launched; what Triton keeps of it launches later too, or says why not."""
    from triton.runtime._async_compile import active_mode

    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)
    kernel, ready = MagicMock(), threading.Event()

    def compile_kernel() -> MagicMock:
        ready.wait(60)
        return kernel

    with ThreadPoolExecutor(1) as executor, launch.only_compiling():
        mode = active_mode.get()
        others = [lambda *given: None] * (len(signature(triton.AsyncCompileMode.submit).parameters) - 3)
        unready = mode.submit("good", compile_kernel, *others)
        unready.run("here")
        there = executor.submit(lambda: unready.run("there"))
        ready.set()
    there.result(60)
    unready.run("later")
    assert [call.args for call in kernel.run.call_args_list] == [("there",), ("later",)]
    with pytest.raises(DeviceError), launch.only_compiling():
        unready = active_mode.get().submit("bad", lambda: 1 / 0, *others)
    with pytest.raises(ZeroDivisionError):
        unready.run("later")


def test_two_threads_load_a_function_once(driver: Driver) -> None:
    meet, used = threading.Barrier(2), []

    def image() -> bytes:
        used.append(None)
        with suppress(threading.BrokenBarrierError):
            meet.wait(0.1)  # long enough for another, if it may
        return b"machine code"

    function = program.Function("f", torch.device("cuda", 0), image)
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda _: function.launch((1, 1), 32, Args()), range(2)))
    assert len(used) == 1 and driver.called.count("cuModuleLoadData") == 1
    assert driver.called.count("cuLaunchKernelEx") == 2


def test_two_threads_give_a_function_the_most_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    more, given = threading.Event(), []

    def set_attribute(handle: Any, attribute: int, value: int) -> int:
        if value == 1:
            more.wait(0.1)  # until the other thread has more, if it may
        given.append(value)
        more.set()
        return 0

    monkeypatch.setattr(driver, "cuFuncSetAttribute", set_attribute, raising=False)
    function = program.Function("f", torch.device("cuda", 0), lambda: b"machine code")
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lambda n: function.launch((1, 1), 32, Args(), shared_bytes=n), (1, 2)))
    assert given[-1] == 2


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

    monkeypatch.setattr(program, "driver", lambda: SimpleNamespace(cuGetErrorString=get_error))
    program.check(0, "launch")
    with pytest.raises(kind, match="^launch failed on the GPU: a reason$"):
        program.check(status, "launch")
