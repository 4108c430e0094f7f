"""What the runner remembers of each request between steps. Keyed by request id, never by a recycled slot."""

from __future__ import annotations

from pelton.engine.step import Chunk, EngineRequest, StepPlan
from pelton.ops.sampling import SampleRow
from pelton.runner.grammar import GrammarState


class RequestState:
    """The tokens of one request and where its keys and values are."""

    def __init__(self, request: EngineRequest, num_groups: int) -> None:
        self.request = request
        self.num_prompt = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)  # the prompt, then what was sampled
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]  # block ids, for each KV group
        self.row: SampleRow | None = None  # made by the sampler
        self.grammar: GrammarState | None = None  # made by the sampler when the request has a grammar
        self.is_constrained, self.needs_results = request.is_constrained, request.needs_results

    @property
    def output_ids(self) -> list[int]:
        """What was sampled so far."""
        return self.token_ids[self.num_prompt :]

    def apply(self, chunk: Chunk) -> None:
        """Take over the chunk's block ids, and forget what was sampled after it; doing so twice changes nothing."""
        for table, blocks in zip(self.tables, chunk.blocks, strict=True):
            table[chunk.table_start :] = blocks
        if chunk.sample:  # a step that was begun and then failed may have noted a token, or what stands for one
            del self.token_ids[chunk.start + chunk.num_tokens :]

    def append(self, chunk: Chunk, token_id: int) -> None:
        """Note the token sampled after the chunk."""
        self.token_ids[chunk.start + chunk.num_tokens :] = [token_id]


class RequestTable:
    """All requests the runner knows."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.states: dict[int, RequestState] = {}

    def update(self, plan: StepPlan) -> list[RequestState]:
        """Apply a plan's news; returns the state of each chunk's request."""
        for request_id in plan.gone:
            self.states.pop(request_id, None)
        for request in plan.new:
            if request.request_id not in self.states:
                self.states[request.request_id] = RequestState(request, self.num_groups)
        states = [self.states[chunk.request_id] for chunk in plan.chunks]
        for state, chunk in zip(states, plan.chunks, strict=True):
            state.apply(chunk)
        return states
