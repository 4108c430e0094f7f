"""Every error pelton raises on purpose. Each message is one line for a person: the cause, then the remedy.

PeltonError
├── ConfigError          a flag, an argument or an environment variable cannot work (also a ValueError)
├── DeviceError          the GPU, its driver or its compiler fails
│   ├── OutOfMemoryError  its memory does not hold what was to be computed; less may fit
│   └── DeviceLostError   it will not answer this process again
├── ModelNotFoundError   a model name leads to no files
├── ModelFormatError     a checkpoint is malformed or not supported; names the field
├── RequestError         a client asked for something that cannot be done (also a ValueError; HTTP 400)
│   └── PromptTooLongError
├── OverloadedError      the queue is full or the server drains; try again later (HTTP 503)
├── RequestFailedError   the engine had to end this one request (HTTP 500)
└── EngineDeadError      the engine process is gone (HTTP 503)
"""

from __future__ import annotations


class PeltonError(Exception):
    """Base of all errors of pelton; `str(error)` is fit to be shown to a person."""


class ConfigError(PeltonError, ValueError):
    """A flag, an argument or an environment variable that cannot work."""


class DeviceError(PeltonError):
    """A GPU that cannot be used: its driver, its compiler or its memory fails."""


class OutOfMemoryError(DeviceError):
    """The GPU's memory does not hold what was to be computed. Nothing else is wrong with it."""


class DeviceLostError(DeviceError):
    """A GPU that fails whatever this process asks of it, as after an illegal memory access."""


class ModelNotFoundError(PeltonError):
    """A model name that leads to no files."""


class ModelFormatError(PeltonError):
    """A checkpoint file that is malformed, truncated or of a kind pelton does not read."""


class RequestError(PeltonError, ValueError):
    """A request that cannot be served as asked.

    `param` names the field of the request that is at fault, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """Prompt and completion do not fit the model's context."""


class OverloadedError(PeltonError):
    """No room for more work now; `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailedError(PeltonError):
    """The engine ended this request, and only this one, with an error."""


class EngineDeadError(PeltonError):
    """The engine process is gone; requests that were in flight are lost."""
