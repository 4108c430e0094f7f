"""What the handlers share: the engine once it is there, the settings, the counters, and the state of the door."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pelton.errors import EngineDeadError, OverloadedError
from pelton.server.backend import Backend
from pelton.server.errors import StatusError
from pelton.server.metrics import Metrics
from pelton.server.settings import ServerSettings


class Service:
    """One server. `llm` is None while the model loads."""

    def __init__(self, settings: ServerSettings, llm: Backend | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = False
        self.num_active = 0  # generations, prompts of one request counted once
        self.llm: Backend | None = None
        if llm is not None:
            self.attach(llm)

    def attach(self, llm: Backend) -> None:
        """The model is loaded: open the door."""
        self.llm = llm
        self.metrics.attach(llm)

    def backend(self) -> Backend:
        """The engine, for a new request. OverloadedError or EngineDeadError if it cannot be taken now."""
        if self.draining:
            raise OverloadedError("the server is shutting down; try another one", retry_after=5)
        if self.llm is None:
            raise OverloadedError("the model is still loading; try again soon", retry_after=5)
        if not self.llm.is_ready:
            raise EngineDeadError("the engine is not running; if it is being restarted, try again soon")
        return self.llm

    @property
    def is_healthy(self) -> bool:
        """Whether the engine works."""
        return self.llm is not None and self.llm.is_ready and not self._is_stuck

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return not self.draining and self.is_healthy

    @property
    def is_live(self) -> bool:
        """Whether waiting can help: the engine's loop turns, or is on its way."""
        return self.draining or self.llm is None or (self.llm.is_alive and not self._is_stuck)

    @property
    def _is_stuck(self) -> bool:
        return self.llm is not None and self.llm.is_ready and self.llm.heartbeat_age() > self.settings.live_s

    @contextmanager
    def active(self) -> Iterator[None]:
        """Counts one generation while it runs."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    def check_model(self, model: str | None) -> str:
        """The name to answer under. StatusError 404 if `model` is not served here."""
        names = self.backend().model_names
        if model is not None and model not in names:
            raise StatusError(404, f"The model `{model[:256]}` does not exist.", "model")
        return model or names[0]
