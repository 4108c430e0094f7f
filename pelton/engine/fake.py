"""A runner without a model, for tests of everything above it: its next token is a hash of the tokens it can see
through the KV blocks, so one wrong block changes the output, and is reported."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from zlib import crc32

from pelton.config import CacheConfig
from pelton.engine.block_pool import NULL_BLOCK
from pelton.engine.step import Chunk, EngineRequest, StepPlan, StepResult, TokenLogprobs

Entry = tuple[int, int, int]
"""What a slot of the fake cache holds: (group, position, token id)."""


@dataclass(slots=True)
class _State:
    spec: EngineRequest
    token_ids: list[int]
    tables: list[list[int]]
    entries: list[list[Entry]]  # for each group, what the slot of each position must hold


@dataclass
class FakeRunner:
    """Implements core.Runner. Tests set `scripts`, `errors` and `raises`, and look at `faults`."""

    cache: CacheConfig
    vocab_size: int = 1000
    scripts: dict[int, list[int]] = field(default_factory=dict)  # request id -> the tokens it is to generate
    errors: dict[int, str] = field(default_factory=dict)  # request id -> the error its next chunk ends with
    raises: set[int] = field(default_factory=set)  # requests whose chunks raise
    faults: list[str] = field(default_factory=list)  # what was wrong with the blocks: empty, if all is well

    def __post_init__(self) -> None:
        self._requests: dict[int, _State] = {}
        self._failed: set[int] = set()
        self._slots: list[Entry | None] = [None] * (self.cache.num_blocks * self.cache.block_size)

    @property
    def request_ids(self) -> set[int]:
        """The requests that the runner keeps state for."""
        return set(self._requests)

    def num_prompt(self, request_id: int) -> int:
        """Tokens of a request's prompt."""
        return len(self._requests[request_id].spec.prompt_token_ids)

    def tables_of(self, request_id: int) -> list[list[int]]:
        """A request's block tables, as it has been told them."""
        return self._requests[request_id].tables

    def run(self, plan: StepPlan) -> StepResult:
        """Write all chunks into the cache, then read each request's context back, as a layer does."""
        self.take_over(plan)
        for chunk in plan.chunks:
            self._write(chunk)
        result = StepResult(plan.step_id)
        for chunk in plan.chunks:
            self._compute(chunk, result)
        return result

    def take_over(self, plan: StepPlan) -> None:
        """Which requests are new, and which are gone."""
        for request_id in plan.gone:
            self._requests.pop(request_id, None)
        for spec in plan.new:
            groups = self.cache.groups
            state = _State(spec, list(spec.prompt_token_ids), [[] for _ in groups], [[] for _ in groups])
            self._requests.setdefault(spec.request_id, state)

    def spoil(self, plan: StepPlan) -> None:
        """A step that was begun, and those begun behind it, when it fails: what it has written is of no use."""
        self.take_over(plan)
        size = self.cache.block_size
        for chunk in plan.chunks:
            for group, table in enumerate(self.tables_of(chunk.request_id)):
                table[chunk.table_start :] = chunk.blocks[group]
                for position in range(chunk.start, chunk.start + chunk.num_tokens):
                    self._slots[table[position // size] * size + position % size] = None

    def _write(self, chunk: Chunk) -> None:
        state, size = self._requests[chunk.request_id], self.cache.block_size
        end = chunk.start + chunk.num_tokens
        if chunk.request_id in self._failed:  # planned before that was known: computed in vain
            state.token_ids += [-1] * (end - len(state.token_ids))
        if end > len(state.token_ids):
            self.faults.append(f"request {chunk.request_id}: {end} tokens planned, {len(state.token_ids)} known")
        for group, (table, entries) in enumerate(zip(state.tables, state.entries, strict=True)):
            table[chunk.table_start :] = chunk.blocks[group]
            entries.extend((group, p, state.token_ids[p]) for p in range(len(entries), len(state.token_ids)))
            for position in range(chunk.start, end):
                block_id = table[position // size]
                if block_id == NULL_BLOCK:
                    self.faults.append(f"request {chunk.request_id} writes into the null block at {position}")
                self._slots[block_id * size + position % size] = entries[position]

    def _read(self, chunk: Chunk, group: int) -> list[int]:
        """The tokens that the chunk's queries see in one group."""
        state, size = self._requests[chunk.request_id], self.cache.block_size
        window, end = self.cache.groups[group].window, chunk.start + chunk.num_tokens
        first = 0 if window is None else max(0, chunk.start - window + 1)
        seen: list[Entry | None] = []
        for block_id in state.tables[group][first // size : -(-end // size)]:
            seen += self._slots[block_id * size : (block_id + 1) * size]
        seen = seen[first % size : first % size + end - first]
        if seen != state.entries[group][first:end]:
            self.faults.append(f"request {chunk.request_id}, group {group}: positions {first}..{end - 1} hold {seen}")
        last_first = 0 if window is None else max(0, end - window)
        return [-1 if entry is None else entry[2] for entry in seen[last_first - first :]]

    def _compute(self, chunk: Chunk, result: StepResult) -> None:
        request_id, state = chunk.request_id, self._requests[chunk.request_id]
        params, num_prompt = state.spec.params, len(state.spec.prompt_token_ids)
        seen = [self._read(chunk, group) for group in range(len(self.cache.groups))]
        if request_id in self.raises:
            self._failed.add(request_id)
            raise RuntimeError(f"injected failure of request {request_id}")
        if request_id in self.errors:
            result.errors[request_id] = self.errors[request_id]
            self._failed.add(request_id)
            return
        end = chunk.start + chunk.num_tokens
        if params.prompt_logprobs is not None:
            positions = range(chunk.start + 1, min(end, num_prompt - 1) + 1)
            result.prompt_logprobs[request_id] = [_logprobs(state.token_ids[p], p) for p in positions]
        if chunk.sample:
            token_id = self._next_token(state, end - num_prompt, seen)
            state.token_ids[end:] = [token_id]
            for entries in state.entries:
                del entries[end:]
            result.token_ids[request_id] = token_id
            if params.wants_logprobs:
                result.logprobs[request_id] = _logprobs(token_id, end)

    def _next_token(self, state: _State, index: int, seen: list[list[int]]) -> int:
        script = self.scripts.get(state.spec.request_id, [])
        if index < len(script):
            return script[index]
        value = state.spec.params.seed or 0
        for tokens in seen:
            value = crc32(array("q", tokens).tobytes(), value)
        return value % self.vocab_size


def _logprobs(token_id: int, position: int) -> TokenLogprobs:
    """Made up, but a function of the token and its position, so that a test can tell what belongs where."""
    return TokenLogprobs([token_id], [-float(position)], [1])
