"""Loads the extension module pelton._cpu, or says why it is not there; pelton then runs on its reference ops."""

from __future__ import annotations

from types import ModuleType

native: ModuleType | None = None
"""The module pelton._cpu, or None."""

reason: str = ""
"""Why `native` is None; one line for a person."""

try:
    from pelton import _cpu

    native = _cpu
except ImportError as error:
    reason = (
        "pelton was installed without a C++ compiler, or runs from its source folder; install a compiler and run "
        f"'pip install --force-reinstall --no-deps .' for the fast CPU kernels ({error})"
    )
