"""The passes over logits from which `sampling.py` makes the op `sample`.

A row is cut into pieces, one a program, so that a single row keeps many processors busy. Weights are whole numbers,
2^42 for the most likely token: their sums do not depend on the order, so that neither the cut nor the batch changes a
draw. "The first token up to which more than x stands" is found in the order of likelihood without sorting: each pass of
the search fixes four bits of its logit, and of equal logits each weighs the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pelton.ops.cuda.launch import wait_for_inputs

PIECE = tl.constexpr(4096)  # tokens that one program looks at
ONE = tl.constexpr(float(1 << 42))  # the largest weight
ID_BITS = tl.constexpr(20)  # a vocabulary is smaller than 2^20
LAST_ID = tl.constexpr((1 << 20) - 1)

CUTS = tl.constexpr(16)  # distances from the largest logit at which tokens are counted and weighed
LISTED = tl.constexpr(4096)  # most tokens that are searched as a list; where more are needed, the whole row is
DIGITS = tl.constexpr(16)  # that a pass of the search decides between

PROMPT = tl.constexpr(1 << 24)  # in the notes on a token: it occurs in the prompt; below, how often in the output
ALLOWED = tl.constexpr(1 << 25)

# --- the most likely token -------------------------------------------------------------------------------------------


@triton.jit
def best_kernel(values_ptr, ids_ptr, x_ptr, vocab, stride, num_pieces, FINITE: tl.constexpr):
    """Each piece's largest logit, NaN where one is not finite, and the first id that has it: two [M, pieces]."""
    wait_for_inputs()
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + row * stride + token, mask=token < vocab, other=-float("inf"))
    best = tl.max(x, axis=0)
    first = tl.min(tl.where(x == best, token, LAST_ID), axis=0)
    if FINITE:
        faults = tl.sum(((tl.abs(x) < float("inf")) == (token >= vocab)).to(tl.int32), axis=0)
        best = tl.where(faults > 0, float("nan"), best)
    tl.store(values_ptr + row * num_pieces + piece, best)
    tl.store(ids_ptr + row * num_pieces + piece, first)


@triton.jit
def _merge(values_ptr, ids_ptr, row, num_pieces, PIECES: tl.constexpr):
    """A row's largest logit, the first id that has it, whether all are finite where that was looked at."""
    piece = tl.arange(0, PIECES)
    values = tl.load(values_ptr + row * num_pieces + piece, mask=piece < num_pieces, other=-float("inf"))
    ids = tl.load(ids_ptr + row * num_pieces + piece, mask=piece < num_pieces, other=LAST_ID)
    best = tl.max(values, axis=0)
    first = tl.min(tl.where(values == best, ids, LAST_ID), axis=0)
    return best, first, tl.sum((values != values).to(tl.int32), axis=0) == 0


@triton.jit
def settle_kernel(
    tokens_ptr, raw_values_ptr, raw_ids_ptr, values_ptr, ids_ptr, slots_ptr, forced_ptr, num_pieces,
    PLAIN: tl.constexpr, PIECES: tl.constexpr,
):
    """Each row's token where nothing is drawn, or the code why there is none: int64 [M]."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    best, token, is_finite = _merge(raw_values_ptr, raw_ids_ptr, row, num_pieces, PIECES)
    if not PLAIN:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            best, token, _ = _merge(values_ptr, ids_ptr, slot, num_pieces, PIECES)
            token = tl.where(best == -float("inf"), -2, token)
        forced = tl.load(forced_ptr + row)
        token = tl.where(forced >= 0, forced.to(tl.int32), token)
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1).to(tl.int64))


# --- what changes logits ---------------------------------------------------------------------------------------------


@triton.jit
def note_kernel(addresses_ptr, notes_ptr, count, BLOCK: tl.constexpr):
    """Write notes at addresses: 1 is added, flags are set."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses_ptr + i, mask=i < count, other=0).to(tl.pointer_type(tl.int32))
    note = tl.load(notes_ptr + i, mask=i < count, other=0)
    tl.atomic_add(address, note, mask=note == 1)
    tl.atomic_or(address, note, mask=note > 1)


@triton.jit
def adjust_kernel(out_ptr, x_ptr, wholes_ptr, factors_ptr, masks_ptr, vocab, stride, mask_stride):
    """Adjusted logits [A, V] of some rows of x: what is not allowed to minus infinity, and penalties."""
    slot = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = token < vocab
    row, mask_row = tl.load(wholes_ptr + slot * 4), tl.load(wholes_ptr + slot * 4 + 1)
    has_allowed, address = tl.load(wholes_ptr + slot * 4 + 2), tl.load(wholes_ptr + slot * 4 + 3)
    repetition, frequency = tl.load(factors_ptr + slot * 3), tl.load(factors_ptr + slot * 3 + 1)
    x = tl.load(x_ptr + row * stride + token, mask=inside, other=-float("inf"))
    if masks_ptr is not None:  # noqa: SIM102 (known when it is compiled)
        if mask_row >= 0:
            bits = tl.load(masks_ptr + mask_row * mask_stride + token // 8, mask=inside, other=0).to(tl.int32)
            x = tl.where((bits >> (token % 8)) & 1 == 1, x, -float("inf"))
    if address != 0:
        notes = tl.load(address.to(tl.pointer_type(tl.int32)) + token, mask=inside, other=0)
        x = tl.where((has_allowed == 0) | (notes & ALLOWED != 0), x, -float("inf"))
        penalised = tl.where(x > 0, tl.div_rn(x, tl.broadcast_to(repetition, x.shape)), x * repetition)
        x = tl.where(notes & (ALLOWED - 1) != 0, penalised, x)
        count = notes & (PROMPT - 1)
        presence = tl.load(factors_ptr + slot * 3 + 2)
        x = tl.where(count > 0, x - (frequency * count.to(tl.float32) + presence), x)
    tl.store(out_ptr + slot * vocab + token, x, mask=inside)


# --- draws -----------------------------------------------------------------------------------------------------------


@triton.jit
def _draw_of(draw, wholes_ptr, factors_ptr):
    """The numbers of a draw: row, slot, top_k; 1 / temperature, log(min_p), top_p, the uniform number."""
    wholes, factors = wholes_ptr + draw * 3, factors_ptr + draw * 4
    scale, min_power = tl.load(factors).to(tl.float32), tl.load(factors + 1).to(tl.float32)
    top_p, chance = tl.load(factors + 2), tl.load(factors + 3)
    return tl.load(wholes), tl.load(wholes + 1), tl.load(wholes + 2), scale, min_power, top_p, chance


@triton.jit
def _row_of(
    row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr,
):
    """Where a row's logits are, as they came or adjusted, and the largest of them."""
    if slot >= 0:
        place = x_ptr + slot * vocab
        best, _, _ = _merge(values_ptr, ids_ptr, slot, num_pieces, PIECES)
    else:
        place = raw_ptr + row * stride
        best, _, _ = _merge(raw_values_ptr, raw_ids_ptr, row, num_pieces, PIECES)
    return place, best


@triton.jit
def _weigh(x, best, scale, min_power):
    """The weights of logits."""
    power = (x - best) * scale
    return tl.where(power < min_power, 0.0, tl.exp(power) * ONE).to(tl.int64)


@triton.jit
def _cuts(best):
    """Logits, the last the least likely."""
    return best - 0.5 * tl.exp2(0.375 * tl.arange(0, CUTS).to(tl.float32))


@triton.jit
def _share(total, share):
    """The least whole number, but 1, that is a share of the total."""
    part = total.to(tl.float64) * share
    whole = part.to(tl.int64)
    whole += (whole.to(tl.float64) < part).to(tl.int64)
    return tl.minimum(tl.maximum(whole, 1), total)


@triton.jit
def weigh_kernel(
    weights_ptr, cut_weights_ptr, cut_counts_ptr, wholes_ptr, factors_ptr, raw_ptr, raw_values_ptr, raw_ids_ptr,
    x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Each piece's weight [G, pieces], and where top_k or top_p applies the weight and number of its tokens above
    each cut: two [G, pieces, CUTS]."""
    wait_for_inputs()
    draw, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, slot, top_k, scale, min_power, top_p, chance = _draw_of(draw, wholes_ptr, factors_ptr)
    if row < 0:
        return
    place, best = _row_of(
        row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES
    )
    at = draw * num_pieces + piece
    if (top_k == 0) & (top_p >= 1.0):
        token = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
        tl.store(weights_ptr + at, tl.sum(_weigh(x, best, scale, min_power), axis=0))
    else:
        cuts = _cuts(best)[None, :]
        total = tl.zeros([BLOCK], tl.int64)
        weights, counts = tl.zeros([BLOCK, CUTS], tl.int64), tl.zeros([BLOCK, CUTS], tl.int32)
        for start in range(0, tl.minimum(PIECE, vocab - piece * PIECE), BLOCK):
            token = piece * PIECE + start + tl.arange(0, BLOCK)
            x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
            weight = _weigh(x, best, scale, min_power)
            total += weight
            above = x[:, None] >= cuts
            weights += tl.where(above, weight[:, None], 0)
            counts += above.to(tl.int32)
        tl.store(weights_ptr + at, tl.sum(total, axis=0))
        tl.store(cut_weights_ptr + at * CUTS + tl.arange(0, CUTS), tl.sum(weights, axis=0))
        tl.store(cut_counts_ptr + at * CUTS + tl.arange(0, CUTS), tl.sum(counts, axis=0))


@triton.jit
def _weights_of(weights_ptr, draw, num_pieces, PIECES: tl.constexpr):
    """What a row's pieces weigh."""
    piece = tl.arange(0, PIECES)
    return tl.load(weights_ptr + draw * num_pieces + piece, mask=piece < num_pieces, other=0)


@triton.jit
def list_kernel(
    list_x_ptr, list_ids_ptr, sizes_ptr, weights_ptr, cut_weights_ptr, cut_counts_ptr, wholes_ptr, factors_ptr,
    raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Lists [G, LISTED] of the tokens above the first cut that leaves enough for top_k or top_p, in the order of ids,
    and their sizes [G]: V where there is no such list."""
    wait_for_inputs()
    draw, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, slot, top_k, scale, min_power, top_p, chance = _draw_of(draw, wholes_ptr, factors_ptr)
    if row < 0:
        return
    if (top_k > 0) | (top_p < 1.0):
        place, best = _row_of(
            row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
            PIECES,
        )
        every, cut = tl.arange(0, PIECES)[:, None], tl.arange(0, CUTS)
        at = (draw * num_pieces + every) * CUTS + cut[None, :]
        counts = tl.load(cut_counts_ptr + at, mask=every < num_pieces, other=0)
        count = tl.sum(counts, axis=0)
        weight = tl.sum(tl.load(cut_weights_ptr + at, mask=every < num_pieces, other=0), axis=0)
        total = tl.sum(_weights_of(weights_ptr, draw, num_pieces, PIECES), axis=0)
        is_enough = tl.where(top_k > 0, count >= top_k, weight >= _share(total, top_p))
        chosen = tl.min(tl.where(is_enough & (count <= LISTED), cut, CUTS), axis=0)
        if chosen < CUTS:
            low = tl.max(tl.where(cut == chosen, _cuts(best), -float("inf")), axis=0)
            before = tl.sum(tl.where((every < piece) & (cut[None, :] == chosen), counts, 0))
            for start in range(0, tl.minimum(PIECE, vocab - piece * PIECE), BLOCK):
                token = piece * PIECE + start + tl.arange(0, BLOCK)
                x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
                is_listed = (x >= low) & (token < vocab)
                to = draw * LISTED + before + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
                tl.store(list_x_ptr + to, x, mask=is_listed)
                tl.store(list_ids_ptr + to, token, mask=is_listed)
                before += tl.sum(is_listed.to(tl.int32), axis=0)
        if piece == 0:
            size = tl.sum(tl.where(cut == chosen, count, 0), axis=0)
            tl.store(sizes_ptr + draw, tl.where(chosen < CUTS, size, vocab))


@triton.jit
def _place(total, chance):
    """The whole number below the total at which a draw falls."""
    return tl.minimum((total.to(tl.float64) * chance).to(tl.int64), total - 1)


@triton.jit
def _order(x):
    """uint32 in the order of logits; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _logit(order):
    """The inverse of _order."""
    bits = order.to(tl.int32, bitcast=True)
    return (bits ^ (((bits ^ -1) >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _find(x_ptr, size, best, scale, min_power, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The first token, in the order of likelihood, up to which more than `target` stands, in weight or in number: the
    order of its logit, what stands at larger ones, what one such token has, and which of them it is, from 1."""
    order, above = (target * 0).to(tl.uint32), target * 0
    digit = tl.arange(0, DIGITS)
    for i in range(8):
        bounds = order | (digit.to(tl.uint32) << (28 - 4 * i))
        sums = tl.zeros([BLOCK, DIGITS], tl.int64)
        for start in range(0, size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + token, mask=token < size, other=-float("inf"))
            amount = _weigh(x, best, scale, min_power) if WEIGHTED else (token < size).to(tl.int64)
            sums += tl.where(_order(x)[:, None] >= bounds[None, :], amount[:, None], 0)
        reached = tl.sum(sums, axis=0)  # what stands from each bound on
        last = tl.sum((reached > target).to(tl.int32), axis=0) - 1
        above = tl.where(last == DIGITS - 1, above, tl.sum(tl.where(digit == last + 1, reached, 0), axis=0))
        order = tl.max(tl.where(digit <= last, bounds, 0), axis=0)
    each = tl.maximum(_weigh(_logit(order), best, scale, min_power), 1) if WEIGHTED else target * 0 + 1
    return order, above, each, (target - above) // each + 1


@triton.jit
def _weight_above(x_ptr, size, best, scale, min_power, order, BLOCK: tl.constexpr):
    """What the tokens with larger logits weigh."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token, mask=token < size, other=-float("inf"))
        total += tl.where(_order(x) > order, _weigh(x, best, scale, min_power), 0)
    return tl.sum(total, axis=0)


@triton.jit
def _place_of(x_ptr, size, order, which, BLOCK: tl.constexpr):
    """Where the `which`-th of the tokens with one logit stands."""
    place, before = size * 0, size * 0
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token, mask=token < size, other=-float("inf"))
        is_one = (_order(x) == order) & (token < size)
        number = before + tl.cumsum(is_one.to(tl.int32), axis=0)
        place += tl.sum(tl.where(is_one & (number == which), token, 0), axis=0)
        before += tl.sum(is_one.to(tl.int32), axis=0)
    return place


@triton.jit
def _draw_by_likelihood(x_ptr, size, total, top_k, best, scale, min_power, top_p, chance, BLOCK: tl.constexpr):
    """Where the first token stands, in the order of likelihood, up to which more than chance * total stands. The
    total is that of the whole row, then what top_k and top_p leave of it."""
    if top_k > 0:
        least, before, each, count = _find(x_ptr, size, best, scale, min_power, top_k - 1, False, BLOCK)
        total = _weight_above(x_ptr, size, best, scale, min_power, least, BLOCK)
        total += count * _weigh(_logit(least), best, scale, min_power)
    if top_p < 1.0:
        share = _share(total, top_p) - 1
        least, before, each, count = _find(x_ptr, size, best, scale, min_power, share, True, BLOCK)
        total = before + count * each
    mass = _place(total, chance)
    drawn, before, each, which = _find(x_ptr, size, best, scale, min_power, mass, True, BLOCK)
    return _place_of(x_ptr, size, drawn, which, BLOCK)


@triton.jit
def _draw_by_id(place, weights_ptr, draw, best, scale, min_power, chance, vocab, num_pieces, PIECES: tl.constexpr):
    """The first token, in the order of ids, up to which more than chance * total stands."""
    weights = _weights_of(weights_ptr, draw, num_pieces, PIECES)
    mass = _place(tl.sum(weights, axis=0), chance)
    is_before = tl.cumsum(weights, axis=0) <= mass
    piece = tl.sum(is_before.to(tl.int32), axis=0)
    rest = mass - tl.sum(tl.where(is_before, weights, 0), axis=0)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
    cumulative = tl.cumsum(_weigh(x, best, scale, min_power), axis=0)
    return piece * PIECE + tl.sum((cumulative <= rest).to(tl.int32), axis=0)


@triton.jit
def draw_kernel(
    tokens_ptr, list_x_ptr, list_ids_ptr, sizes_ptr, weights_ptr, wholes_ptr, factors_ptr,
    raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """The token of one row that has any, where the largest logit is finite."""
    wait_for_inputs()
    draw = tl.program_id(0).to(tl.int64)
    row, slot, top_k, scale, min_power, top_p, chance = _draw_of(draw, wholes_ptr, factors_ptr)
    if row < 0:
        return
    place, best = _row_of(
        row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES
    )
    if (tl.load(tokens_ptr + row) >= 0) & (best < float("inf")):
        if (top_k == 0) & (top_p >= 1.0):
            token = _draw_by_id(
                place, weights_ptr, draw, best, scale, min_power, chance, vocab, num_pieces, PIECES
            ).to(tl.int64)
        else:
            size = tl.load(sizes_ptr + draw)
            if size < vocab:
                place = list_x_ptr + draw * LISTED
            total = tl.sum(_weights_of(weights_ptr, draw, num_pieces, PIECES), axis=0)
            token = _draw_by_likelihood(
                place, size, total, top_k, best, scale, min_power, top_p, chance, BLOCK
            ).to(tl.int64)
            if size < vocab:
                token = tl.load(list_ids_ptr + draw * LISTED + token).to(tl.int64)
        tl.store(tokens_ptr + row, token)


# --- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def key_kernel(keys_ptr, x_ptr, rows_ptr, vocab, stride):
    """A number for each token of some rows that is larger for the more likely one: int64 [S, V]."""
    i, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + tl.load(rows_ptr + i) * stride + token, mask=token < vocab, other=0.0)
    key = (_order(x).to(tl.int64) << ID_BITS) | (token ^ LAST_ID).to(tl.int64)
    tl.store(keys_ptr + i * vocab + token, key, mask=token < vocab)


@triton.jit
def rank_kernel(ranks_ptr, x_ptr, rows_ptr, ids_ptr, vocab, stride):
    """Add to each rank how many of a piece's logits are larger than that of a token: int32 [E]."""
    i, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    row = x_ptr + tl.load(rows_ptr + i) * stride
    x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
    tl.atomic_add(ranks_ptr + i, tl.sum((x > tl.load(row + tl.load(ids_ptr + i))).to(tl.int32), axis=0))
