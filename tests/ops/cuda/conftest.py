"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")


def mend_interpreter() -> None:
    """What Triton 3.6's interpreter lacks: products of bfloat16, whose bits it multiplies, and integers from arrays of
    one number, which numpy refuses from 2.4 on. It looks for overflows in half of its time; we do without."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        numbers = (x.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(numbers, tl.float32)

    def dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *args)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor = dot, patch
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if not torch.cuda.is_available():
    mend_interpreter()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
