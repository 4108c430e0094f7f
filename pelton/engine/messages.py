"""What passes between a door and an engine that runs in another thread or process.

    door -> engine   Start (first, and once), then EngineRequest and Abort, in the end Close
    engine -> door   Progress while it loads; Ready or Failed; then one Report for each turn of its loop; Failed
                     where that breaks down for a known reason

And between the ranks of one engine (ranks.py):

    rank 0 -> rank   Start (first, and once), then Run, Begin and Finish as rank 0 does, and Meet after a failure
    rank -> rank 0   Met at each place where all meet; Failed

All are plain data, so that `wire` can carry them between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pelton.config import EngineArgs
from pelton.engine.scheduler import SchedulerStats
from pelton.engine.step import EngineRequest, StepPlan, Update
from pelton.errors import PeltonError


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a door needs to know of an engine."""

    max_model_len: int  # tokens, prompt and completion together
    num_kv_tokens: int  # tokens whose keys and values fit the cache, at the least
    kernels: str = ""  # which op is served by which kernel
    notes: tuple[str, ...] = ()  # one line for each choice a person may wonder about
    warnings: tuple[str, ...] = ()  # what is less than the model or the person may expect


@dataclass(frozen=True, slots=True)
class Start:
    """Build the engine."""

    args: EngineArgs


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Close:
    """Leave the loop after the current step."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far loading has come, in bytes of weights."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine takes requests."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine cannot start, or not go on."""

    error: PeltonError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that the engine did not take."""

    request_id: int
    error: PeltonError


@dataclass(frozen=True, slots=True)
class Report:
    """One turn of the engine's loop; that it comes at all is the heartbeat."""

    stats: SchedulerStats
    updates: list[Update] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """Run a step."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Begin:
    """Begin a step."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class Finish:
    """Finish a step that was begun. Those begun before it and not finished have failed on rank 0."""

    step_id: int


@dataclass(frozen=True, slots=True)
class Meet:
    """Say when all orders so far are done, or have failed."""


@dataclass(frozen=True, slots=True)
class Met:
    """A rank is where it is to meet the others."""

    place: int = 0  # how often it has met them in its steps, see ModelRunner.place


Command = Start | EngineRequest | Abort | Refusal | Close
"""To the engine. A Refusal stands for a request that could not be read; it is answered with itself."""

Message = Progress | Ready | Failed | Report
"""From the engine."""

Order = Start | Run | Begin | Finish | Meet
"""From rank 0 to the others."""

Answer = Met | Failed
"""From another rank to rank 0."""
