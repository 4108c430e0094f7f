"""The op `sample` for a whole batch: one upload, kernels and vectorised steps, and one wait for the results.

`start_sample` only enqueues work, so that an engine may go on meanwhile; `Pending.fetch` waits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pelton import ops
from pelton.ops.cuda import sampling_kernels as kernels
from pelton.ops.cuda.launch import OVERLAP, on_gpu
from pelton.ops.sampling import Constraint, Draws, SampleRow, Scores, _finalise, sample

MAX_VOCAB: int = kernels.LAST_ID.value  # the keys and sums of the kernels have room for no more
SCORED_AT_ONCE = 1 << 24  # logits whose scores are computed together: ten times as many bytes
PIECE, LISTED, CUTS = kernels.PIECE.value, kernels.LISTED.value, kernels.CUTS.value
PROMPT, ALLOWED = kernels.PROMPT.value, kernels.ALLOWED.value
GOLDEN = 0x9E3779B97F4A7C15  # the step of `sampling.mix`

NO_CONSTRAINT = Constraint()
NO_PENALTIES = 1.0, 0.0, 0.0

Arrays = dict[str, NDArray[Any]]
Best = tuple[Tensor, Tensor]
"""The largest logit of each piece of each row, and its id: two [M, pieces]."""


# --- what is kept of a request ---------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Record:
    """What is made of a SampleRow when it is seen first, and its tokens so far, noted on the device."""

    is_plain: bool
    is_drawn: bool
    is_changed: bool  # whether logits are adjusted in every step
    stream: int  # the seed, mixed once
    top_k: int  # 0: all
    numbers: tuple[float, float, float]  # 1 / temperature, log(min_p), top_p
    factors: tuple[float, float, float]  # repetition, frequency and presence penalty
    notes: Tensor | None  # int32 [V], if penalties or allowed ids need it: the kernels' notes on each token
    address: int  # of the notes, or 0
    num_noted: int = -1  # tokens, of which that is the last; -1: nothing, not even what is allowed
    last_noted: int = -1

    def note(self, row: SampleRow, addresses: list[int], values: list[int]) -> None:
        """Add the addresses of the notes on new tokens, and what is to be noted."""
        if self.notes is None:
            return
        ids = row.token_ids if self.factors != NO_PENALTIES else ()  # else what was sampled changes nothing
        num = self.num_noted
        if num > len(ids) or (num > 0 and ids[num - 1] != self.last_noted):  # one has been replaced
            self.notes.zero_()
            num = -1
        new = list(ids[max(num, 0) :])
        num_prompt = min(len(new), max(0, row.num_prompt - max(num, 0)))
        values += [PROMPT] * num_prompt + [1] * (len(new) - num_prompt)
        if num < 0:
            new += row.allowed_ids
            values += [ALLOWED] * len(row.allowed_ids)
        addresses += [self.address + 4 * token_id for token_id in new]
        self.num_noted, self.last_noted = len(ids), ids[-1] if ids else -1

    def forget(self) -> None:
        """Begin anew: whether the kernels have noted what they were to note is not known."""
        self.num_noted = sys.maxsize


def _record(row: SampleRow, logits: Tensor) -> Record:
    """The record of a row, made once."""
    if isinstance(row.native, Record):
        return row.native
    vocab, is_drawn = logits.shape[1], row.temperature > 0.0
    factors = row.repetition_penalty, row.frequency_penalty, row.presence_penalty
    needs_notes = factors != NO_PENALTIES or len(row.allowed_ids) > 0
    notes = torch.zeros(vocab, dtype=torch.int32, device=logits.device) if needs_notes else None
    row.native = record = Record(
        is_plain=row.is_plain,
        is_drawn=is_drawn,
        is_changed=row.is_changed,
        stream=_finalise(row.seed & (1 << 64) - 1),
        top_k=row.top_k if 0 < row.top_k < vocab else 0,
        numbers=(
            1.0 / row.temperature if is_drawn else 0.0, math.log(row.min_p) if row.min_p > 0 else -math.inf, row.top_p
        ),
        factors=factors,
        notes=notes,
        address=0 if notes is None else notes.data_ptr(),
    )
    return record


# --- between host and device -----------------------------------------------------------------------------------------


def _upload(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """All arrays on the device, in one transfer from pinned memory that nothing waits for."""
    starts = list(accumulate((-(-a.nbytes // 16) * 16 for a in arrays.values()), initial=0))
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays.values(), strict=False):
        host.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=False)
    }


@dataclass(eq=False)
class Pending:
    """A batch that is being sampled."""

    token_ids_on_device: Tensor  # int64 [M], or codes in their place; later work on the device may use them
    results: Tensor  # int64 [M]; where scores are asked for int32, those after the tokens
    wanted: Wanted | None
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, tokens: Tensor, results: Tensor, wanted: Wanted | None = None) -> Pending:
        """Enqueue the transfer of the results, whose place on the device later work may use again."""
        if results.device.type != "cuda":
            return cls(tokens, results.clone(), wanted, None)
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True).copy_(results, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(results.device))
        return cls(tokens, host, wanted, event)

    def fetch(self) -> tuple[list[int], dict[int, Scores]]:
        """Wait for the results of `sample`."""
        if self.event is not None:
            self.event.synchronize()
        num_rows = self.token_ids_on_device.shape[0]
        token_ids: list[int] = self.results[:num_rows].tolist()
        return token_ids, {} if self.wanted is None else self.wanted.read(token_ids, self.results[num_rows:].numpy())


def start_sample(
    logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]
) -> Pending:
    """Enqueue the work of `sample`; waits for nothing."""
    records = [_record(row, logits) for row in rows]
    try:
        return _start(logits, rows, records, constraints)
    except BaseException:
        for record in records:
            record.forget()
        raise


def _start(
    logits: Tensor, rows: Sequence[SampleRow], records: list[Record], constraints: Mapping[int, Constraint]
) -> Pending:
    num_rows, device = logits.shape[0], logits.device
    wanted = Wanted.of(rows, logits.shape[1]) if any(row.num_top >= 0 for row in rows) else None
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    arrays = {} if wanted is None else wanted.arrays()
    is_plain = not constraints and all(record.is_plain for record in records)
    plan = None if is_plain else Plan.of(rows, records, constraints)
    if plan is not None:
        arrays |= plan.arrays(logits.shape[1])
    there = _upload(arrays, device) if arrays else {}
    if num_rows:
        _choose(logits, tokens, plan, there)
    results = tokens if wanted is None else torch.cat((tokens.int(), wanted.start(logits, tokens, there)))
    return Pending.of(tokens, results, wanted)


# --- tokens ----------------------------------------------------------------------------------------------------------


def draws_of(rows: Sequence[SampleRow], logits: Tensor) -> Draws | None:
    """What `choose_` is to be told of the rows of logits [M, V]. None if one asks for more than temperature, min_p,
    top_k and top_p: that is not for `choose_`."""
    if any(row.is_changed or row.num_top >= 0 for row in rows):
        return None
    records = [_record(row, logits) for row in rows]
    drawn = [i for i, record in enumerate(records) if record.is_drawn]
    return _draws(rows, records, drawn, np.full(len(rows), -1))


def choose_(tokens: Tensor, logits: Tensor, wholes: Tensor, factors: Tensor) -> None:
    """The tokens [M] of rows of logits [M, V], or codes, as `sample` chooses them: kernels alone, which read what
    `draws_of` found at the beginning of wholes [M, 3] and factors [M, 4]. A row of -1 in wholes is no draw."""
    _choose(logits, tokens, None, {"draw_wholes": wholes, "draw_factors": factors})


@dataclass(eq=False)
class Plan:
    """What is done to which rows of a batch that is not all plain."""

    rows: Sequence[SampleRow]
    records: list[Record]
    constraints: Mapping[int, Constraint]
    changed: list[int]  # rows whose logits are adjusted here; row changed[a] has slot a
    given: list[int]  # rows whose adjusted logits are given; their slots follow
    drawn: list[int]  # rows that draw

    @classmethod
    def of(cls, rows: Sequence[SampleRow], records: list[Record], constraints: Mapping[int, Constraint]) -> Plan:
        """Sort the rows by what is done to them."""
        plan = cls(rows, records, constraints, [], [], [])
        for i, record in enumerate(records):
            c = constraints.get(i)
            if c is not None and c.forced_id >= 0:
                continue
            if c is not None and c.adjusted is not None:
                plan.given.append(i)
            elif record.is_changed or (c is not None and (c.mask is not None or c.forbidden_ids)):
                plan.changed.append(i)
            if record.is_drawn:
                plan.drawn.append(i)
        return plan

    def arrays(self, vocab: int) -> Arrays:
        """What the kernels are told, but for what changes logits only where there is such."""
        slots = np.full(len(self.rows), -1, dtype=np.int64)
        slots[[*self.changed, *self.given]] = np.arange(len(self.changed) + len(self.given))
        forced = np.full(len(self.rows), -1, dtype=np.int64)
        for i, constraint in self.constraints.items():
            forced[i] = constraint.forced_id
        found: Arrays = {"slots": slots, "forced": forced}
        if self.drawn:
            found["draw_wholes"], found["draw_factors"] = _draws(self.rows, self.records, self.drawn, slots)
        return found | self._changes(vocab) if self.changed else found

    def _changes(self, vocab: int) -> Arrays:
        """What the logits of `changed` are adjusted by."""
        wholes: list[tuple[int, int, bool, int]] = []
        masks: list[bytes] = []
        addresses: list[int] = []
        notes: list[int] = []
        forbidden: list[int] = []
        for slot, i in enumerate(self.changed):
            row, record, constraint = self.rows[i], self.records[i], self.constraints.get(i) or NO_CONSTRAINT
            mask_row = -1 if constraint.mask is None else len(masks)
            wholes.append((i, mask_row, len(row.allowed_ids) > 0, record.address))
            if constraint.mask is not None:
                masks.append(constraint.mask[: -(-vocab // 8)].ljust(-(-vocab // 8), b"\0"))
            if record.notes is not None:
                record.note(row, addresses, notes)
            forbidden += [slot * vocab + token_id for token_id in constraint.forbidden_ids]
        biased = [(i * vocab + token_id, b) for i in self.changed for token_id, b in self.rows[i].bias.items()]
        factors = np.array([self.records[i].factors for i in self.changed], dtype=np.float32)
        found: Arrays = {"wholes": np.array(wholes, dtype=np.int64), "factors": factors}
        if masks:
            found["masks"] = np.frombuffer(bytearray().join(masks), dtype=np.uint8)
        if notes:
            found["addresses"] = np.array(addresses, dtype=np.int64)
            found["notes"] = np.array(notes, dtype=np.int32)
        if forbidden:
            found["forbidden"] = np.array(forbidden, dtype=np.int64)
        if biased:
            found["biased"] = np.array([place for place, _ in biased], dtype=np.int64)
            found["bias"] = np.array([b for _, b in biased], dtype=np.float32)
        return found


def _draws(
    rows: Sequence[SampleRow], records: Sequence[Record], drawn: Sequence[int], slots: NDArray[np.int64]
) -> Draws:
    """What the kernels are told of the rows that draw; a row with a slot, from adjusted logits."""
    records = [records[i] for i in drawn]
    top_k = np.array([record.top_k for record in records], dtype=np.int64)
    numbers = np.array([record.numbers for record in records], dtype=np.float64).reshape(-1, 3)
    counts = [len(rows[i].token_ids) - rows[i].num_prompt for i in drawn]
    return (
        np.column_stack((np.array(drawn, dtype=np.int64), slots[drawn], top_k)),
        np.column_stack((numbers, _uniform([record.stream for record in records], counts))),
    )


def _uniform(streams: Sequence[int], counts: Sequence[int]) -> NDArray[np.float64]:
    """`sampling.uniform`, where seeds have been mixed once."""
    seeds = np.array(streams, dtype=np.uint64)
    z = seeds + (np.array(counts, dtype=np.int64).astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.float64] = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)
    return found


def _best(x: Tensor, finite: bool) -> Best:
    """The largest of each piece of x [M, V], NaN where one is not finite (with `finite`)."""
    num_rows, num_pieces = x.shape[0], triton.cdiv(x.shape[1], PIECE)
    values = torch.empty(num_rows, num_pieces, device=x.device)
    ids = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=x.device)
    kernels.best_kernel[(num_rows, num_pieces)](
        values, ids, x, x.shape[1], x.stride(0), num_pieces, FINITE=finite, num_warps=8, **OVERLAP
    )
    return values, ids


def _choose(logits: Tensor, tokens: Tensor, plan: Plan | None, there: Mapping[str, Tensor]) -> None:
    """Each row's token, or the code why there is none, into tokens [M]."""
    raw = _best(logits, finite=True)
    x, best = logits, raw
    if plan is not None and (plan.changed or plan.given):
        x = _adjust(logits, plan, there)
        best = _best(x, finite=False)
    num_pieces = raw[0].shape[1]
    kernels.settle_kernel[(logits.shape[0],)](
        tokens, *raw, *best, there.get("slots"), there.get("forced"), num_pieces, PLAIN=plan is None,
        PIECES=triton.next_power_of_2(num_pieces), num_warps=1, **OVERLAP,
    )
    if "draw_wholes" in there:
        _draw(logits, raw, x, best, tokens, there["draw_wholes"], there["draw_factors"])


def _adjust(logits: Tensor, plan: Plan, there: Mapping[str, Tensor]) -> Tensor:
    """Adjusted logits [slots, V]."""
    vocab, num_changed = logits.shape[1], len(plan.changed)
    out = torch.empty(num_changed + len(plan.given), vocab, device=logits.device)
    if "notes" in there:
        count = there["notes"].shape[0]
        kernels.note_kernel[(triton.cdiv(count, 1024),)](there["addresses"], there["notes"], count, BLOCK=1024)
    x = logits
    if "biased" in there:
        x = torch.empty(logits.shape, device=logits.device).copy_(logits)
        x.view(-1).index_add_(0, there["biased"], there["bias"])
    if num_changed:
        masks = there.get("masks")
        kernels.adjust_kernel[(num_changed, triton.cdiv(vocab, PIECE))](
            out, x, there["wholes"], there["factors"], masks, vocab, x.stride(0), -(-vocab // 8), num_warps=8
        )
    if "forbidden" in there:
        out.view(-1).index_fill_(0, there["forbidden"], -torch.inf)
    for slot, i in enumerate(plan.given, start=num_changed):
        if (adjusted := plan.constraints[i].adjusted) is not None:
            out[slot].copy_(adjusted)
    return out


def _draw(
    logits: Tensor, raw: Best, x: Tensor, best: Best, tokens: Tensor, wholes: Tensor, factors: Tensor
) -> None:
    """The tokens of the rows that draw, from logits as they came, or from adjusted ones x [slots, V]."""
    num_draws, num_pieces, vocab, device = wholes.shape[0], raw[0].shape[1], logits.shape[1], logits.device
    weights = torch.empty(num_draws, num_pieces, dtype=torch.int64, device=device)
    cut_weights = torch.empty(num_draws, num_pieces, CUTS, dtype=torch.int64, device=device)
    cut_counts = torch.empty(num_draws, num_pieces, CUTS, dtype=torch.int32, device=device)
    list_x = torch.empty(num_draws, LISTED, device=device)
    list_ids = torch.empty(num_draws, LISTED, dtype=torch.int32, device=device)
    sizes = torch.empty(num_draws, dtype=torch.int32, device=device)
    given = wholes, factors, logits, *raw, x, *best, vocab, logits.stride(0), num_pieces
    pieces = triton.next_power_of_2(num_pieces)
    grid = num_draws, num_pieces
    kernels.weigh_kernel[grid](
        weights, cut_weights, cut_counts, *given, PIECES=pieces, BLOCK=256, num_warps=4, **OVERLAP
    )
    kernels.list_kernel[grid](
        list_x, list_ids, sizes, weights, cut_weights, cut_counts, *given, PIECES=pieces, BLOCK=1024, num_warps=4,
        **OVERLAP,
    )
    kernels.draw_kernel[(num_draws,)](
        tokens, list_x, list_ids, sizes, weights, *given, PIECES=pieces, BLOCK=512, num_warps=8, **OVERLAP
    )


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Wanted:
    """The rows of a batch that want scores, and of what tokens besides the most likely ones."""

    rows: Sequence[SampleRow]
    scored: list[int]  # S rows
    num_top: int  # most that one of them wants
    starts: list[int]  # each row's tokens, the chosen one first, among all E

    @classmethod
    def of(cls, rows: Sequence[SampleRow], vocab: int) -> Wanted:
        """Gather what a batch's rows want."""
        scored = [i for i, row in enumerate(rows) if row.num_top >= 0]
        starts = list(accumulate((1 + len(rows[i].score_ids) for i in scored), initial=0))
        return cls(rows, scored, min(vocab, max(rows[i].num_top for i in scored)), starts)

    def arrays(self) -> Arrays:
        """The rows, and the row and id of each token; -1 stands for the chosen one."""
        token_ids = [token_id for i in self.scored for token_id in (-1, *self.rows[i].score_ids)]
        return {
            "scored": np.array(self.scored, dtype=np.int64),
            "scored_rows": np.repeat(np.array(self.scored, dtype=np.int64), np.diff(self.starts)),
            "scored_ids": np.array(token_ids, dtype=np.int64),
        }

    def start(self, logits: Tensor, tokens: Tensor, there: Mapping[str, Tensor]) -> Tensor:
        """Ranks [E], log-probabilities [E], the most likely tokens [S, num_top] and theirs: one int32 tensor."""
        rows, vocab = there["scored_rows"], logits.shape[1]
        ids = torch.where(there["scored_ids"] < 0, tokens[rows], there["scored_ids"]).clamp_(min=0)
        ranks = torch.ones(len(rows), dtype=torch.int32, device=logits.device)
        kernels.rank_kernel[(len(rows), triton.cdiv(vocab, PIECE))](
            ranks, logits, rows, ids, vocab, logits.stride(0), num_warps=8
        )
        parts: list[list[Tensor]] = [[], [], []]
        num_at_once = max(1, SCORED_AT_ONCE // vocab)
        for begin in range(0, len(self.scored), num_at_once):
            end = min(begin + num_at_once, len(self.scored))
            few = there["scored"][begin:end]
            rows_of_few = logits[few]
            if vocab % 4:  # torch reads four at a time, and where a row begins would change the order of its sum
                rows_of_few = F.pad(rows_of_few, (0, -vocab % 4), value=-torch.inf)
            logprobs = torch.log_softmax(rows_of_few, dim=-1)
            mine = slice(self.starts[begin], self.starts[end])
            local = torch.searchsorted(few, rows[mine])  # rows ascend
            parts[0].append(logprobs[local, ids[mine]])
            top = self._top(logits, few)
            parts[1].append(top.flatten())
            parts[2].append(logprobs.gather(1, top).flatten())
        chosen, top_ids, top_logprobs = (torch.cat(part) for part in parts)
        return torch.cat((ranks, chosen.view(torch.int32), top_ids.int(), top_logprobs.view(torch.int32)))

    def _top(self, logits: Tensor, few: Tensor) -> Tensor:
        """The most likely tokens of some rows: int64 [few, num_top]."""
        num_rows, vocab = len(few), logits.shape[1]
        keys = torch.empty(num_rows, vocab if self.num_top else 0, dtype=torch.int64, device=logits.device)
        if self.num_top:
            kernels.key_kernel[(num_rows, triton.cdiv(vocab, PIECE))](
                keys, logits, few, vocab, logits.stride(0), num_warps=8
            )
        return MAX_VOCAB - (keys.topk(self.num_top).values & MAX_VOCAB)

    def read(self, token_ids: list[int], numbers: NDArray[np.int32]) -> dict[int, Scores]:
        """Each row's scores from what `start` made."""
        num, num_tops = self.starts[-1], len(self.scored) * self.num_top
        parts = np.split(numbers, [num, 2 * num, 2 * num + num_tops])
        ranks, logprobs = parts[0].tolist(), parts[1].view(np.float32).tolist()
        shape = len(self.scored), self.num_top
        top_ids, top_logprobs = parts[2].reshape(shape), parts[3].view(np.float32).reshape(shape)
        scores = {}
        for s, i in enumerate(self.scored):
            if token_ids[i] >= 0:
                mine, num_top = slice(self.starts[s], self.starts[s + 1]), min(self.rows[i].num_top, self.num_top)
                top = list(zip(top_ids[s, :num_top].tolist(), top_logprobs[s, :num_top].tolist(), strict=True))
                asked = zip((token_ids[i], *self.rows[i].score_ids), logprobs[mine], ranks[mine], strict=True)
                scores[i] = _arrange(list(asked), top)
        return scores


def _arrange(asked: list[tuple[int, float, int]], top: list[tuple[int, float]]) -> Scores:
    """The chosen token, then the most likely ones, then the others asked for; none of them twice the chosen one."""
    (token_id, _, rank), *others = asked
    beside = [(i, logprob) for i, logprob in top if i != token_id]
    places = (place for place in range(1, len(beside) + 2) if place != rank)  # 1, 2, ... without the chosen one's
    ranked = [(i, logprob, place) for (i, logprob), place in zip(beside, places, strict=False)]
    ids, logprobs, ranks = zip(asked[0], *ranked, *(other for other in others if other[0] != token_id), strict=True)
    return list(ids), list(logprobs), list(ranks)


# --- the op ----------------------------------------------------------------------------------------------------------


def sample_on_gpu(
    logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]
) -> tuple[list[int], dict[int, Scores]]:
    """`sample`, which waits for the device once."""
    return start_sample(logits, rows, constraints).fetch()


def accepts(logits: Tensor, rows: Sequence[SampleRow], constraints: Mapping[int, Constraint]) -> bool:
    """Whether all logits are rows of float32 on the GPU."""
    given = [c.adjusted for c in constraints.values() if c.adjusted is not None]
    return (
        on_gpu(logits, *given) and all(x.dtype == torch.float32 and x.stride(-1) == 1 for x in (logits, *given))
        and 0 < logits.shape[1] <= MAX_VOCAB
    )


def register(add: Callable[[ops.Op[..., Any], Callable[..., Any], Callable[..., bool]], None]) -> None:
    """Give the kernel to `add(op, run, accepts)`."""
    add(sample, sample_on_gpu, accepts)
