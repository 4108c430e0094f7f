"""Attention over the paged cache, for prefill chunks and decodes in one batch.

A tile is some tokens of a request with the query heads that share a key head: one row for each token and head. It walks
over spans of keys with a running maximum and sum (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691), in
base 2. There are two kinds:

Chunks: tiles of many tokens, each walking over all that its tokens see.

Decodes, and requests with few new tokens: tiles of one token. What it sees is cut into parts, which begin at multiples
of their length, are summed alone and joined in order. A part has PART keys; twice as many if there were more than
MAX_PARTS / 8 parts, as joining many costs more than reading larger ones; and then doubled until MAX_PARTS suffice. The
parts of all decodes stand in one row, which is divided evenly among a fixed number of programs. Where all parts of a
token fall to one program, it joins them; else they go through memory, and the last of its programs to come there joins
them with the same arithmetic. So a token's numbers depend on its own context, never on its company. (Computed in a
larger chunk, they may differ in the last bits.)

In a step of decodes alone this kernel also normalises and rotates what is new and writes it to the cache, with the
arithmetic of the kernel that does so in other steps: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pelton import ops
from pelton.config import FEW_TOKENS
from pelton.ops.cuda.launch import (
    OVERLAP,
    ask_for,
    counters,
    has_float8,
    let_next_begin,
    num_processors,
    on_gpu,
    shared_memory,
    wait_for_inputs,
    wait_for_previous,
)
from pelton.ops.cuda.rows import LOG2_E, accepts_rope_and_store, norm_factor, rotate, scale_of, to_cache

PART = 64  # keys, a power of two
MAX_PARTS = 64
MAX_PROGRAMS = 2  # for each of a GPU's processors
MANY_REQUESTS = 129  # from so many on there is one more, and in steps with prompts
MAX_HEAD_SIZE = 256
MAX_GROUP = 64  # query heads that share a key head
MAX_GROUP_SIZE = 8192  # numbers of their queries

QUERIES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*QUERIES, torch.float8_e4m3fn, torch.int8)


class Tiling(NamedTuple):
    """How tiles are computed."""

    rows: int
    keys: int  # of a span
    num_warps: int
    num_stages: int  # 2n + 1, where n spans are under way: to look up their blocks is a stage too
    max_registers: int | None = None  # of a thread


@cache
def decode_tiling(
    head_size: int, group: int, dtype: torch.dtype, is_many: bool = False, is_lone: bool = False
) -> Tiling:
    """For a dtype of queries. Bound by memory. is_many: for more programs; is_lone: for those of one request, with one
    or two spans each. In both less is under way. What is computed is the same."""
    rows, stages = max(16, triton.next_power_of_2(group)), 3 if is_many or is_lone else 5
    if dtype == torch.float32:
        return Tiling(rows, 32 if head_size <= 128 else 16, 4 if rows <= 16 else 8, 3)
    if rows > 16:
        return Tiling(rows, 32, 8, 3)
    if head_size > 128:
        return Tiling(rows, 32, 4, stages)
    return Tiling(rows, 64, 4, stages, max_registers=None if is_lone else 168)  # room for three programs


@cache
def chunk_tiling(head_size: int, group: int, dtype: torch.dtype, shared_memory: int) -> Tiling:
    """For a dtype of queries, and bytes of shared memory that a program may have. Bound by products."""
    if dtype == torch.float32:
        return Tiling(max(32, triton.next_power_of_2(group)), 32 if head_size <= 128 else 16, 8, 3)
    if head_size <= 128:  # two programs beside each other: each begins and ends while the other multiplies
        return Tiling(64, 64, 4, 5)
    return Tiling(128, 64, 8, 3) if shared_memory >= 150 << 10 else Tiling(64, 32, 4, 3)


class Store(NamedTuple):
    """A tensor of the cache, [B, S, G, D] or [B, S, G], with its strides."""

    numbers: Any
    block: int
    slot: int
    head: int


def _store(numbers: Tensor) -> Store:
    return Store(numbers, *numbers.stride()[:3])


class Shape(NamedTuple):
    """What is compiled in, each a constexpr."""

    WINDOW: Any  # or None
    NUM_KV_HEADS: Any
    GROUP: Any
    HEAD_SIZE: Any
    WIDTH: Any  # HEAD_SIZE, rounded up to a power of two
    BLOCK_SIZE: Any


class Inputs(NamedTuple):
    """What all kernels are given."""

    out: Any  # [T, H, D]
    query: Any  # [T, H, D]
    query_token: int  # strides
    query_head: int
    key: Store
    value: Store
    key_scale: Store | None
    value_scale: Store | None
    block_table: Any  # [R, blocks]
    table_request: int
    query_starts: Any  # [R + 1]
    context_lens: Any  # [R]
    span_ends: Any  # [T], or None
    scale: float
    softcap: float | None
    shape: Shape


class NewTokens(NamedTuple):
    """What decodes bring along whose rows are as they came from the product, [T, (H + 2G) D]: queries, which `Inputs`
    names, then keys, then values."""

    cos: Any  # [T, D / 2]
    cos_token: int  # stride
    sin: Any  # [T, D / 2]
    sin_token: int
    slots: Any  # [T]
    q_norm: Any  # [D], or None, as the other
    k_norm: Any
    eps: float


class Sums(NamedTuple):
    """Of each row over some keys: the greatest score, and relative to it the exponentials and the weighted values."""

    maximum: Any  # [rows]
    total: Any  # [rows]
    weighted: Any  # [rows, D]


# --- a span of keys --------------------------------------------------------------------------------------------------


@triton.jit
def _find_keys(store, block, slot, g, KEYS: tl.constexpr):
    """Where a span lies: a pointer, and offsets [KEYS] from it. slot: of each key; or of the first, if the span lies in
    one block: then offsets are the same in every span. block: likewise, or one for all."""
    if slot.type.is_block():
        first, offsets = store.numbers, block * store.block + (slot * store.slot + g * store.head)
    else:
        first = store.numbers + (block * store.block + (slot * store.slot + g * store.head))
        offsets = tl.arange(0, KEYS) * store.slot
    return first, offsets


@triton.jit
def _load_rows(x, store, block, slot, g, there, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [KEYS, WIDTH] in the query's dtype; zeros where there are none, and nothing else is read."""
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    first, offsets = _find_keys(store, block, slot, g, KEYS)
    pointers = first + (offsets[:, None] + column)
    if MASKED:
        rows = tl.load(pointers, mask=there[:, None] & (column < x.shape.HEAD_SIZE), other=0.0)
    elif x.shape.WIDTH != x.shape.HEAD_SIZE:
        rows = tl.load(pointers, mask=column < x.shape.HEAD_SIZE, other=0.0)
    else:
        rows = tl.load(pointers)
    if store.numbers.dtype.element_ty == tl.int8:
        rows = rows.to(tl.float32)
    return rows.to(x.query.dtype.element_ty)


@triton.jit
def _load_scales(store, block, slot, g, there, KEYS: tl.constexpr):
    """Scales of keys or values, [1, KEYS]."""
    first, offsets = _find_keys(store, block, slot, g, KEYS)
    return tl.load(first + offsets, mask=there, other=0.0)[None, :]


@triton.jit
def _add_span(
    x, sums, query, r, g, begin, first_key, last_key, first, last, KEYS: tl.constexpr, MASKED: tl.constexpr
):
    """Add keys begin to begin + KEYS of request r at key head g to the sums of query [rows, WIDTH].

    Keys are read from first_key to last_key; a row sees those from first to last (numbers, or [rows, 1]). Without
    MASKED all rows see the whole span.
    """
    at = begin + tl.arange(0, KEYS)
    there = (at >= first_key) & (at <= last_key)
    blocks = x.block_table + r.to(tl.int64) * x.table_request
    slot = at % x.shape.BLOCK_SIZE
    if x.shape.BLOCK_SIZE % KEYS == 0:  # the span lies in one block
        block = tl.load(blocks + begin // x.shape.BLOCK_SIZE).to(tl.int64)
        if x.shape.WIDTH <= 128:  # for larger heads one pointer takes registers that are not there
            slot = begin - begin // x.shape.BLOCK_SIZE * x.shape.BLOCK_SIZE
    else:
        block = tl.load(blocks + at // x.shape.BLOCK_SIZE, mask=there, other=0).to(tl.int64)

    key = _load_rows(x, x.key, block, slot, g, there, KEYS, MASKED)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")  # [rows, KEYS]
    if x.key_scale is not None:
        scores *= _load_scales(x.key_scale, block, slot, g, there, KEYS)
    if x.softcap is not None:  # tanh(s) = 1 - 2 / (e^2s + 1), right at both infinities too
        scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E * x.scale / x.softcap)) + 1.0)
        factor = x.softcap * LOG2_E
    else:
        factor = x.scale * LOG2_E
    if MASKED:
        scores = tl.where((at[None, :] >= first) & (at[None, :] <= last), scores, float("-inf"))

    maximum = tl.maximum(sums.maximum, tl.max(scores, 1) * factor)
    # a row may not have seen a key yet
    shift = tl.where(maximum == float("-inf"), 0.0, maximum) if MASKED else maximum
    weights = tl.exp2(scores * factor - shift[:, None])
    decay = tl.exp2(sums.maximum - shift)
    total = sums.total * decay + tl.sum(weights, 1)
    if x.value_scale is not None:
        weights *= _load_scales(x.value_scale, block, slot, g, there, KEYS)
    value = _load_rows(x, x.value, block, slot, g, there, KEYS, MASKED)
    weighted = tl.dot(weights.to(value.dtype), value, sums.weighted * decay[:, None], input_precision="ieee")
    return Sums(maximum, total, weighted)


@triton.jit
def _ask_for_rows(x, store, r, g, begin, end, KEYS: tl.constexpr):
    """Have keys or values of request r from begin to begin + KEYS, or to end, brought into the L2 cache."""
    BYTES: tl.constexpr = store.numbers.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = (x.shape.WIDTH * BYTES + 127) // 128
    at = begin + tl.arange(0, KEYS)
    there = at < end
    blocks = x.block_table + r.to(tl.int64) * x.table_request
    block = tl.load(blocks + at // x.shape.BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    offsets = block * store.block + (at % x.shape.BLOCK_SIZE * store.slot + g * store.head)
    line = tl.arange(0, LINES)[None, :] * (128 // BYTES)
    pointers = store.numbers + offsets[:, None] + line
    ask_for(pointers, tl.broadcast_to(there[:, None] & (line < x.shape.HEAD_SIZE), pointers.shape))


@triton.jit
def _no_sums(x, ROWS: tl.constexpr):
    """Of no keys."""
    zeros = tl.zeros([ROWS], tl.float32)
    return Sums(zeros - float("inf"), zeros, tl.zeros([ROWS, x.shape.WIDTH], tl.float32))


@triton.jit
def _load_query(x, token, head, column, inside):
    """Rows of the query; token: a number or [rows]; column: [1, WIDTH]; inside: [rows, WIDTH]."""
    offsets = token.to(tl.int64) * x.query_token + head * x.query_head
    return tl.load(x.query + offsets[:, None] + column, mask=inside, other=0.0)


@triton.jit
def _store_out(x, sums, token, head, there):
    """The quotients, to their rows of the output."""
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    offsets = (token.to(tl.int64) * (x.shape.NUM_KV_HEADS * x.shape.GROUP) + head) * x.shape.HEAD_SIZE
    rows = (sums.weighted / sums.total[:, None]).to(x.out.dtype.element_ty)
    tl.store(x.out + offsets[:, None] + column, rows, mask=there[:, None] & (column < x.shape.HEAD_SIZE))


# --- who computes what -----------------------------------------------------------------------------------------------


@triton.jit
def _load_requests(x, num_requests, REQUESTS: tl.constexpr):
    """New tokens and context length of each request, [REQUESTS] each."""
    r = tl.arange(0, REQUESTS)
    here = r < num_requests
    begin = tl.load(x.query_starts + r, mask=here, other=0)
    end = tl.load(x.query_starts + r + 1, mask=here, other=0)
    return (end - begin).to(tl.int32), tl.load(x.context_lens + r, mask=here, other=0).to(tl.int32)


@triton.jit
def _locate(at, ends):
    """Things stand in a row, those of each request up to ends [REQUESTS]: whose `at` is, and where that one's begin."""
    before = ends <= at
    return tl.sum(before.to(tl.int32), 0), tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def _first_seen(x, position):
    """The first key that a token sees."""
    return position * 0 if x.shape.WINDOW is None else tl.maximum(position - (x.shape.WINDOW - 1), 0)


# --- chunks ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_requests"])
def _chunk_kernel(
    x, num_requests, FEW_TOKENS: tl.constexpr, REQUESTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """One tile a program, of a request with more than FEW_TOKENS tokens. Tiles begin at multiples of their length, so
    that a token's numbers do not depend on where its chunk begins."""
    wait_for_inputs()
    TOKENS: tl.constexpr = ROWS // x.shape.GROUP
    lengths, contexts = _load_requests(x, num_requests, REQUESTS)
    tiles = tl.cdiv(contexts, TOKENS) - (contexts - lengths) // TOKENS
    ends = tl.cumsum(tl.where(lengths > FEW_TOKENS, tiles, 0), 0)
    tile = tl.max(ends, 0) - 1 - tl.program_id(0) // x.shape.NUM_KV_HEADS  # the last first: they see the most keys
    if tile < 0:
        return
    r, first_tile = _locate(tile, ends)
    g = tl.program_id(0) % x.shape.NUM_KV_HEADS
    begin, end = tl.load(x.query_starts + r).to(tl.int32), tl.load(x.query_starts + r + 1).to(tl.int32)
    context_len = tl.load(x.context_lens + r).to(tl.int32)
    new = context_len - (end - begin)  # position of the first new token
    position = (new // TOKENS + tile - first_tile) * TOKENS  # of the tile's first token, which may be an old one
    last_position = position + TOKENS - 1

    row = tl.arange(0, ROWS)
    token, head = begin + position - new + row // x.shape.GROUP, g * x.shape.GROUP + row % x.shape.GROUP
    there = (row < TOKENS * x.shape.GROUP) & (token >= begin) & (token < end)
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    query = _load_query(x, token, head, column, there[:, None] & (column < x.shape.HEAD_SIZE))
    last = position + row // x.shape.GROUP
    first = _first_seen(x, last)[:, None]
    if x.span_ends is not None:
        span_end = tl.load(x.span_ends + token, mask=there, other=0).to(tl.int32)
        last = tl.maximum(last, tl.minimum(span_end, context_len - 1))
    last_key = tl.max(tl.where(there, last, 0), 0)
    last = last[:, None]
    first_key = _first_seen(x, tl.maximum(position, new))

    # All rows see all keys of the spans between these.
    start = first_key // KEYS * KEYS
    full_end = tl.maximum((position + 1) // KEYS * KEYS, start)
    full_begin = tl.minimum(tl.cdiv(_first_seen(x, last_position), KEYS) * KEYS, full_end)
    sums = _no_sums(x, ROWS)
    if x.shape.WINDOW is not None:
        for at in range(start, full_begin, KEYS):
            sums = _add_span(x, sums, query, r, g, at, first_key, last_key, first, last, KEYS, True)
    for at in range(full_begin, full_end, KEYS):
        sums = _add_span(x, sums, query, r, g, at, first_key, last_key, first, last, KEYS, False)
    for at in range(full_end, last_key + 1, KEYS):
        sums = _add_span(x, sums, query, r, g, at, first_key, last_key, first, last, KEYS, True)
    _store_out(x, sums, token, head, there)


# --- decodes ---------------------------------------------------------------------------------------------------------
#
# Work is counted in units of PART keys. In the row of all work, each token and key head of a request has the units that
# any token of the request sees; usually it is one token. A program computes the parts that begin in its share of it.


class Place(NamedTuple):
    """A token and key head in the row of all work."""

    r: Any
    token: Any
    g: Any
    first: Any  # key that the token sees
    last: Any
    log_keys: Any  # log2 of the keys of a part
    log_step: Any  # and of its units
    origin: Any  # part i begins at unit origin + (i << log_step)
    begin: Any  # of the units
    end: Any


@triton.jit
def _log_keys(num_keys, LOG_PART: tl.constexpr, MAX_PARTS: tl.constexpr):
    """log2 of how many keys a part has where a token sees num_keys."""
    log_keys = LOG_PART + (num_keys > (MAX_PARTS // 8 << LOG_PART)).to(tl.int32)
    for i in tl.static_range(1, 11):
        log_keys += (num_keys > (MAX_PARTS << LOG_PART + i)).to(tl.int32)
    return log_keys


@triton.jit
def _units_seen(x, num_tokens, context_len, LOG_PART: tl.constexpr, MAX_PARTS: tl.constexpr):
    """The first unit that tokens of a request see, on the border of a part, and how many they see, of whole parts."""
    first = _first_seen(x, context_len - num_tokens)
    log_keys = _log_keys(context_len - first, LOG_PART, MAX_PARTS)
    log_step = log_keys - LOG_PART
    first_part, last_part = first >> log_keys, (context_len - 1) >> log_keys
    return first_part << log_step, (last_part + 1 - first_part) << log_step


@triton.jit
def _line_up(x, num_requests, few_rows, LOG_PART: tl.constexpr, MAX_PARTS: tl.constexpr, REQUESTS: tl.constexpr):
    """Where the units of each request with at most few_rows tokens end, [REQUESTS], and a program's share of all: whole
    parts of the first request, as else of two programs on a processor one has a part and the other none."""
    num_tokens, context_len = _load_requests(x, num_requests, REQUESTS)
    _, units = _units_seen(x, num_tokens, context_len, LOG_PART, MAX_PARTS)
    has_units = (num_tokens > 0) & (num_tokens <= few_rows)
    ends = tl.cumsum(tl.where(has_units, num_tokens * x.shape.NUM_KV_HEADS * units, 0), 0)
    share = tl.maximum(tl.cdiv(tl.max(ends, 0), tl.num_programs(0)), 1)
    first_len = tl.load(x.context_lens).to(tl.int32)
    step = 1 << _log_keys(first_len - _first_seen(x, first_len - 1), LOG_PART, MAX_PARTS) - LOG_PART
    return ends, (share + step - 1) & -step


@triton.jit
def _find(x, at, ends, LOG_PART: tl.constexpr, MAX_PARTS: tl.constexpr):
    """Whose unit `at` is."""
    r, before = _locate(at, ends)
    begin, end = tl.load(x.query_starts + r).to(tl.int32), tl.load(x.query_starts + r + 1).to(tl.int32)
    context_len = tl.load(x.context_lens + r).to(tl.int32)
    first_unit, units = _units_seen(x, end - begin, context_len, LOG_PART, MAX_PARTS)
    i = (at - before) // units
    token = begin + i // x.shape.NUM_KV_HEADS
    position = context_len - (end - token)
    first, last = _first_seen(x, position), position
    if x.span_ends is not None:
        span_end = tl.load(x.span_ends + token).to(tl.int32)
        last = tl.maximum(position, tl.minimum(span_end, context_len - 1))
    log_keys = _log_keys(last + 1 - first, LOG_PART, MAX_PARTS)
    units_begin = before + i * units
    return Place(
        r, token, i % x.shape.NUM_KV_HEADS, first, last, log_keys, log_keys - LOG_PART, units_begin - first_unit,
        units_begin, units_begin + units,
    )


@triton.jit
def _part_from(place, unit):
    """The first part that begins at a unit or behind it."""
    return (unit - place.origin + (1 << place.log_step) - 1) >> place.log_step


@triton.jit
def _join(a, b):
    """The sums of two parts. Where it is compiled must not matter, so it is said what is fused."""
    maximum = tl.maximum(a.maximum, b.maximum)
    c, d = tl.exp2(a.maximum - maximum), tl.exp2(b.maximum - maximum)
    c_rows, d_rows = tl.broadcast_to(c[:, None], a.weighted.shape), tl.broadcast_to(d[:, None], a.weighted.shape)
    return Sums(maximum, tl.fma(a.total, c, b.total * d), tl.fma(a.weighted, c_rows, b.weighted * d_rows))


class Parts(NamedTuple):
    """Sums of parts that go through memory. A row for each program in whose share the units of a token begin and do not
    end, which is one token at most: [programs, slots, GROUP]."""

    sums: Sums
    num_slots: int
    arrived: Any  # int32 [programs]: parts that are there; zeros, and zeros again when all were


@triton.jit
def _part_offsets(x, parts, place, share, part, row):
    """Where the sums of a part lie, for heads [rows] of the group."""
    slot = part - (place.first >> place.log_keys)
    return ((place.begin // share) * parts.num_slots + slot) * x.shape.GROUP + row


@triton.jit
def _store_part(x, parts, sums, offsets, there):
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    tl.store(parts.sums.maximum + offsets, sums.maximum, mask=there)
    tl.store(parts.sums.total + offsets, sums.total, mask=there)
    pointers = parts.sums.weighted + offsets[:, None] * x.shape.HEAD_SIZE + column
    tl.store(pointers, sums.weighted, mask=there[:, None] & (column < x.shape.HEAD_SIZE))


@triton.jit
def _load_part(x, parts, offsets, there):
    """What another program stored; of rows that are not there, sums of nothing."""
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    maximum = tl.load(parts.sums.maximum + offsets, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(parts.sums.total + offsets, mask=there, other=0.0, cache_modifier=".cg")
    pointers = parts.sums.weighted + offsets[:, None] * x.shape.HEAD_SIZE + column
    inside = there[:, None] & (column < x.shape.HEAD_SIZE)
    return Sums(maximum, total, tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg"))


@triton.jit
def _join_if_last(x, parts, place, share, num_stored, ROWS: tl.constexpr):
    """Count the parts that this program stored; if they were the last of the token, join all and store its output."""
    first, last = place.first >> place.log_keys, place.last >> place.log_keys
    counter = parts.arrived + place.begin // share
    tl.debug_barrier()  # all of the program's threads have stored
    if tl.atomic_add(counter, num_stored, sem="acq_rel") + num_stored == last - first + 1:
        row = tl.arange(0, ROWS)
        there = row < x.shape.GROUP
        sums = _load_part(x, parts, _part_offsets(x, parts, place, share, first, row), there)
        for begin in range(first + 1, last + 1, 4):
            for i in tl.static_range(4):  # whose loads are under way together
                part = begin + i
                offsets = _part_offsets(x, parts, place, share, part, row)
                is_there = row < tl.where(part <= last, x.shape.GROUP, 0)
                sums = _join(sums, _load_part(x, parts, offsets, is_there))
        _store_out(x, sums, place.token, place.g * x.shape.GROUP + row, there)
        tl.store(counter, 0)


@triton.jit
def _prepare(x, new, place, has_last, row):
    """Rows of the query [rows, WIDTH], normalised and rotated as `rope_and_store_` does it. The one program that is to
    read the token's own key, `has_last`, has it in row GROUP and the value in the next: both go to their slot."""
    HALF: tl.constexpr = x.shape.HEAD_SIZE // 2
    GROUP: tl.constexpr = x.shape.GROUP
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    partner = (column + HALF) % x.shape.HEAD_SIZE
    in_first_half = column < HALF
    is_key, is_value = (row == GROUP)[:, None], (row == GROUP + 1)[:, None]
    inside = (row < tl.where(has_last, GROUP + 2, GROUP))[:, None] & (column < x.shape.HEAD_SIZE)
    slot = tl.load(new.slots + place.token)
    # Vectors are loaded for each row: one that is spread over the rows would go through shared memory.
    if new.q_norm is not None:
        weight = tl.where(is_key, new.k_norm, new.q_norm)
        weight_1 = tl.load(weight + column, mask=inside, other=0.0)
        weight_2 = tl.load(weight + partner, mask=inside, other=0.0)
    wait_for_previous()  # what was read until here was there when the step began

    head = tl.where(row < GROUP, place.g * GROUP + row, x.shape.NUM_KV_HEADS * row + place.g)
    given = _load_query(x, place.token, head, column, inside)
    x1, x2 = given.to(tl.float32), _load_query(x, place.token, head, partner, inside).to(tl.float32)
    token = place.token.to(tl.int64)
    cos = tl.load(new.cos + token * new.cos_token + column % HALF, mask=inside, other=0.0)
    sin = tl.load(new.sin + token * new.sin_token + column % HALF, mask=inside, other=0.0)
    if new.q_norm is not None:
        first_1, first_2 = tl.where(in_first_half, x1, 0.0), tl.where(in_first_half, x2, 0.0)
        factor = norm_factor(first_1, first_2, new.eps, x.shape.HEAD_SIZE)
        x1 = (x1 * factor * weight_1).to(given.dtype).to(tl.float32)
        x2 = (x2 * factor * weight_2).to(given.dtype).to(tl.float32)
    turned = rotate(x1, x2, cos, tl.where(in_first_half, -sin, sin)).to(given.dtype)
    rows = tl.where(is_value, given, turned)
    if has_last:
        _store_new(x, x.key, x.key_scale, slot, place.g, rows, row == GROUP)
        _store_new(x, x.value, x.value_scale, slot, place.g, rows, row == GROUP + 1)
        tl.debug_barrier()  # all of the program's threads will read them
    return rows


@triton.jit
def _store_new(x, store, scales, slot, g, rows, here):
    """Write the one of rows [rows, WIDTH] that is `here` to a slot of the cache."""
    block, offset = slot // x.shape.BLOCK_SIZE, slot % x.shape.BLOCK_SIZE
    column = tl.arange(0, x.shape.WIDTH)[None, :]
    inside = here[:, None] & (column < x.shape.HEAD_SIZE)
    rows = rows.to(tl.float32)
    scale = None
    if scales is not None:
        scale = scale_of(tl.max(tl.abs(rows), 1))
        pointers = scales.numbers + (block * scales.block + offset * scales.slot + g * scales.head)
        tl.store(pointers + tl.zeros(here.shape, tl.int32), scale, mask=here)
    pointers = store.numbers + (block * store.block + offset * store.slot + g * store.head) + column
    numbers = to_cache(rows, scale, store.numbers.dtype.element_ty)
    tl.store(tl.broadcast_to(pointers, rows.shape), numbers, mask=inside)


@triton.jit(do_not_specialize=["num_requests", "few_rows"])
def _decode_kernel(
    x, new, parts, num_requests, few_rows, HAS_NEW: tl.constexpr, LOG_PART: tl.constexpr, MAX_PARTS: tl.constexpr,
    REQUESTS: tl.constexpr, ROWS: tl.constexpr, JOINED_ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Each program computes its share of the units. new: NewTokens or None, as HAS_NEW says: Triton cannot compare a
    tuple in which something is None."""
    let_next_begin()
    ends, share = _line_up(x, num_requests, few_rows, LOG_PART, MAX_PARTS, REQUESTS)
    unit = tl.program_id(0) * share
    stop = tl.minimum(unit + share, tl.max(ends, 0))
    row = tl.arange(0, ROWS)
    there = row < x.shape.GROUP
    while unit < stop:
        place = _find(x, unit, ends, LOG_PART, MAX_PARTS)
        until = tl.minimum(place.end, stop)
        begin = tl.maximum(_part_from(place, unit) << place.log_keys, place.first // KEYS * KEYS)
        end = tl.minimum(_part_from(place, until) << place.log_keys, place.last + 1)
        is_shared = (begin > place.first) | (end <= place.last)  # another program has parts of the token too
        if HAS_NEW:
            # A lone request's keys are on their way while its query is being computed. Where there are more, requests
            # for their lines cost more than they give.
            for i in tl.static_range(2 if REQUESTS == 1 else 0):
                _ask_for_rows(x, x.key, place.r, place.g, begin + i * KEYS, end, KEYS)
                _ask_for_rows(x, x.value, place.r, place.g, begin + i * KEYS, end, KEYS)
            query = _prepare(x, new, place, (begin <= place.last) & (place.last < end), row)
        else:
            wait_for_previous()  # what was read until here was there when the step began
            column = tl.arange(0, x.shape.WIDTH)[None, :]
            inside = there[:, None] & (column < x.shape.HEAD_SIZE)
            query = _load_query(x, place.token, place.g * x.shape.GROUP + row, column, inside)
        part, joined = _no_sums(x, ROWS), _no_sums(x, ROWS)
        for at in range(begin, end, KEYS):
            part = _add_span(
                x, part, query, place.r, place.g, at, place.first, place.last, place.first, place.last, KEYS, True
            )
            number = at >> place.log_keys
            if (at + KEYS >> place.log_keys > number) | (at + KEYS > place.last):  # the part is complete
                if is_shared:
                    _store_part(x, parts, part, _part_offsets(x, parts, place, share, number, row), there)
                else:
                    joined = _join(joined, part)
                part = _no_sums(x, ROWS)
        if begin < end:
            if is_shared:
                num_stored = (end - 1 >> place.log_keys) - (begin >> place.log_keys) + 1
                _join_if_last(x, parts, place, share, num_stored, JOINED_ROWS)
            else:
                _store_out(x, joined, place.token, place.g * x.shape.GROUP + row, there)
        unit = until
    wait_for_previous()  # a kernel that ends tells the next that all before it have


# --- the op ----------------------------------------------------------------------------------------------------------


@cache
def _compiled_in(window: int | None, num_kv_heads: int, group: int, head_size: int, block_size: int) -> Shape:
    sizes = num_kv_heads, group, head_size, max(16, triton.next_power_of_2(head_size)), block_size
    return Shape(None if window is None else tl.constexpr(window), *map(tl.constexpr, sizes))


def paged_attention(
    query: Tensor, cache: ops.LayerCache, block_table: Tensor, query_starts: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, span_ends: Tensor | None = None,
) -> Tensor:
    """`ops.paged_attention`. If there are as many tokens as requests, these are taken for decodes, which is right for
    all but slow for others."""
    return _attend(None, query, cache, block_table, query_starts, context_lens, scale, window, softcap, span_ends)


def rope_and_attend_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, block_table: Tensor, query_starts: Tensor, context_lens: Tensor, scale: float,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:
    """`ops.rope_and_attend_` of decodes, in one kernel; qkv stays as it is."""
    new = NewTokens(cos, cos.stride(0), sin, sin.stride(0), slots, q_norm, k_norm, float(eps))
    query, _, _ = ops.split_heads(qkv, cache)
    return _attend(new, query, cache, block_table, query_starts, context_lens, scale, window, softcap)


def _attend(
    new: NewTokens | None, query: Tensor, cache: ops.LayerCache, block_table: Tensor, query_starts: Tensor,
    context_lens: Tensor, scale: float, window: int | None, softcap: float | None, span_ends: Tensor | None = None,
) -> Tensor:
    """Attention of tokens that are in the cache, or of `new` decodes."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.shape[0] == 0 or context_lens.shape[0] == 0:
        return out
    _, block_size, num_kv_heads, head_size = cache.key.shape
    x = Inputs(
        out, query, query.stride(0), query.stride(1), _store(cache.key), _store(cache.value),
        None if cache.key_scale is None else _store(cache.key_scale),
        None if cache.value_scale is None else _store(cache.value_scale),
        block_table, block_table.stride(0), query_starts, context_lens, span_ends,
        float(scale), None if softcap is None else float(softcap),
        _compiled_in(window, num_kv_heads, query.shape[1] // num_kv_heads, head_size, block_size),
    )
    if query.shape[0] != context_lens.shape[0]:
        _compute_chunks(x)
    _compute_decodes(x, new)
    return out


def _room(num_tokens: int, num_requests: int) -> int:
    """How many requests a kernel is compiled for: few numbers, fewer in steps with prompts, so that a start has all."""
    if num_tokens == num_requests == 1:
        return 1
    return max(128 if num_tokens == num_requests else 256, 1 << (num_requests - 1).bit_length())


def _compute_chunks(x: Inputs) -> None:
    """Requests with more than FEW_TOKENS tokens."""
    (num_tokens, num_heads, head_size), num_requests = x.query.shape, x.context_lens.shape[0]
    group = num_heads // x.key.numbers.shape[2]
    tiling = chunk_tiling(head_size, group, x.query.dtype, shared_memory(x.query.device))
    # at most: each request has two that are not full
    tiles = num_tokens // (tiling.rows // group) + 2 * min(num_requests, num_tokens // (FEW_TOKENS + 1))
    _chunk_kernel[(tiles * (num_heads // group),)](
        x, num_requests, FEW_TOKENS, _room(num_tokens, num_requests), tiling.rows, tiling.keys,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **OVERLAP,
    )


def _compute_decodes(x: Inputs, new: NewTokens | None) -> None:
    """Requests with at most FEW_TOKENS tokens, or all if they could have one token each."""
    (num_tokens, num_heads, head_size), num_requests = x.query.shape, x.context_lens.shape[0]
    num_kv_heads, device = x.key.numbers.shape[2], x.query.device
    group = num_heads // num_kv_heads
    has_prompts = num_tokens != num_requests
    is_many = head_size <= 128 and (has_prompts or num_requests >= MANY_REQUESTS)
    tiling = decode_tiling(head_size, group, x.query.dtype, is_many, is_lone=num_tokens == 1)
    few_rows = FEW_TOKENS if has_prompts else num_tokens
    max_units = triton.cdiv(x.block_table.shape[1] * x.key.numbers.shape[1], PART)
    most = min(num_tokens, num_requests * few_rows) * num_kv_heads * max_units
    num_programs = min(most, (MAX_PROGRAMS + is_many) * num_processors(device))
    _decode_kernel[(num_programs,)](
        x, new, _parts(num_programs, min(max_units, MAX_PARTS), group, head_size, device), num_requests, few_rows,
        new is not None, PART.bit_length() - 1, MAX_PARTS, _room(num_tokens, num_requests), tiling.rows,
        triton.next_power_of_2(group), min(tiling.keys, PART),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers, **OVERLAP,
    )


def _parts(num_programs: int, most: int, group: int, head_size: int, device: torch.device) -> Parts:
    """Room for so many parts of a token."""
    # the borders of a window can cut one part more; a multiple of 4 keeps all addresses aligned
    num_slots = triton.cdiv(most + 1, 4) * 4
    size = num_programs * num_slots * group
    sums = torch.empty(size * (head_size + 2), device=device).split((size, size, size * head_size))
    return Parts(Sums(*sums), num_slots, counters(device))


def accepts_paged_attention(
    query: Tensor, cache: ops.LayerCache, block_table: Tensor, query_starts: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, softcap: float | None = None, span_ends: Tensor | None = None,
) -> bool:
    """Heads that are not too many or too large, whose numbers are adjacent."""
    key, value = cache.key, cache.value
    group, head_size = query.shape[1] // key.shape[2], query.shape[2]
    integers = [t for t in (block_table, query_starts, context_lens, span_ends) if t is not None]
    return (
        on_gpu(query, key, value, cache.key_scale, cache.value_scale, *integers)
        and query.dtype in QUERIES and key.dtype == value.dtype and key.dtype in CACHES
        and (key.dtype == torch.int8) == (cache.key_scale is not None)
        and (key.dtype != torch.float8_e4m3fn or has_float8(key.device))
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and all(t.dtype == torch.int64 and t.stride(-1) == 1 for t in integers)
        and head_size <= MAX_HEAD_SIZE and group <= MAX_GROUP and group * head_size <= MAX_GROUP_SIZE
        and key.shape[1] & (key.shape[1] - 1) == 0 and scale > 0
    )


def accepts_rope_and_attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: ops.LayerCache, slots: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, block_table: Tensor, query_starts: Tensor, context_lens: Tensor, scale: float,
    window: int | None = None, softcap: float | None = None,
) -> bool:
    """Decodes, with room for a key and a value beside the queries of their group."""
    if qkv.shape[0] != context_lens.shape[0]:
        return False
    query, _, _ = ops.split_heads(qkv, cache)
    group, head_size = query.shape[1] // cache.key.shape[2], query.shape[2]
    return (
        accepts_rope_and_store(qkv, cos, sin, cache, slots, q_norm, k_norm, eps)
        and accepts_paged_attention(query, cache, block_table, query_starts, context_lens, scale, window, softcap)
        and (q_norm is None) == (k_norm is None)
        and group + 2 <= decode_tiling(head_size, group, query.dtype).rows
    )


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, prompts: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """`ops.prompt_attention`, by cuDNN: 600 TFLOP/s where the kernel above has 490 (8,192 tokens, on an H200)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return ops.prompt_attention.reference(query, key, value, prompts, scale)


def accepts_prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, prompts: Sequence[tuple[int, int]], scale: float
) -> bool:
    """What cuDNN has fast kernels for."""
    return (
        query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
        and query.dtype in (torch.bfloat16, torch.float16) and query.shape[2] in (64, 128, 256)
    )


def register(add: Callable[..., None]) -> None:
    """Name the kernels of this module's ops."""
    add(ops.paged_attention, paged_attention, accepts_paged_attention)
    add(ops.rope_and_attend_, rope_and_attend_, accepts_rope_and_attend)
    add(ops.prompt_attention, prompt_attention, accepts_prompt_attention)
