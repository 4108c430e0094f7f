"""How torch is told by what to multiply, on a GPU that is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pelton.ops.cuda import blas

GPU = torch.device("cuda", 0)


class Chosen:
    """torch's choice, and all that it has been."""

    def __init__(self) -> None:
        self.library = "default"
        self.all: list[str] = []

    def __call__(self, library: str | None = None) -> str:
        if library is not None:
            self.library = library
            self.all.append(library)
        return self.library


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    chosen = Chosen()
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", chosen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    blas._say_nothing.cache_clear()
    blas._say_nothing()
    chosen.all.clear()
    yield chosen
    blas._say_nothing.cache_clear()


def test_few_rows_are_multiplied_by_cublaslt(chosen: Chosen) -> None:
    for num_rows in (1, blas.MAX_ROWS):
        with blas.for_rows(num_rows, GPU):
            assert chosen.library == "cublaslt"
        assert chosen.library == "default"


@pytest.mark.parametrize(
    ("num_rows", "device", "capability"),
    [(blas.MAX_ROWS + 1, GPU, (9, 0)), (1, torch.device("cpu"), (9, 0)), (1, GPU, (8, 9))],
    ids=["many rows", "a CPU", "an older GPU"],
)
def test_others_are_left_alone(
    chosen: Chosen, monkeypatch: pytest.MonkeyPatch, num_rows: int, device: torch.device, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with blas.for_rows(num_rows, device):
        pass
    assert not chosen.all


def test_what_fails_puts_the_choice_back(chosen: Chosen) -> None:
    with pytest.raises(RuntimeError, match="no memory"), blas.for_rows(1, GPU):
        raise RuntimeError("no memory")
    assert chosen.all == ["cublaslt", "default"]


def test_one_within_another(chosen: Chosen) -> None:
    with blas.for_rows(1, GPU):
        with blas.for_rows(2, GPU):
            pass
        assert chosen.library == "cublaslt"
    assert chosen.library == "default"


def test_two_threads_put_back_what_was_before_both(chosen: Chosen) -> None:
    entered, left = threading.Event(), threading.Event()

    def multiply() -> None:
        with blas.for_rows(1, GPU):
            entered.set()
            left.wait(60)

    other = threading.Thread(target=multiply)
    with blas.for_rows(1, GPU):
        other.start()
        was_beside = entered.wait(0.1)
    left.set()
    other.join(60)
    assert not was_beside and entered.is_set() and chosen.library == "default"


def num_open() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_what_torch_says_is_not_seen(
    chosen: Chosen, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda *given: os.write(2, b"experimental\n"))
    before = num_open()
    blas._say_nothing.cache_clear()
    blas._say_nothing()
    os.write(2, b"what follows\n")
    assert capfd.readouterr().err == "what follows\n" and num_open() == before


def test_a_system_without_a_place_for_what_is_not_seen(chosen: Chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "devnull", "/dev/there/is/none")
    before = num_open()
    blas._say_nothing.cache_clear()
    blas._say_nothing()
    assert num_open() == before and not chosen.all
