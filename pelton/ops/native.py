"""Loads the extension module pelton._cpu, or says why it is not there; pelton then runs on its reference ops."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

native: ModuleType | None = None
"""The module pelton._cpu, or None."""

reason: str = ""
"""Why `native` is None; one line for a person."""

try:
    native = import_module("pelton._cpu")
except ModuleNotFoundError:
    reason = (
        "the fast CPU kernels are missing: pelton was installed without a C++ compiler, or runs from its source "
        "folder; with a compiler, 'pip install --force-reinstall --no-deps .' builds them"
    )
except ImportError as error:
    reason = f"the fast CPU kernels do not load ({error}); 'pip install --force-reinstall --no-deps .' builds them anew"
